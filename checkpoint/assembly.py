"""Building the tasks of a restore out of stubs, and letting them go together (or killing them all).

Owns the execution of the tree plan, the stubs' arena and their way to snap's descriptors, threads, the order in which
task state is set, and the release. Every task stays in snap's hands, signals blocked, until `release`; then each gets
its registers and mask, stopped processes enter their group-stop, and all are detached, the root last.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import resource
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from checkpoint import environment
from checkpoint.finisher import Finisher
from checkpoint.kernel import cut_short, ptrace
from checkpoint.model import inherited, tree
from checkpoint.parasite import StubTask, attending, spawn_root_stub
from checkpoint.parasite.stub import CLONE_FILES, CLONE_FS, CLONE_PARENT, THREAD_FLAGS
from checkpoint.plan import RestorePlan
from checkpoint.resources import (
    cgroups,
    directories,
    files,
    loginuids,
    memory,
    policies,
    prctl,
    registers,
    scheduling,
    signals,
    task,
)
from checkpoint.restore_context import RestoreContext
from checkpoint.uninterrupted import signals_wait
from images import task_pb2
from snapshotter.base import faults
from snapshotter.base.errors import SnapshotterError, TargetGoneError

ARENA_BYTES = 1 << 20
_WALL = 0x40000000
_O_CLOEXEC = 0o2000000
_LEAST_SUPERVISOR_FD = 63
_HELPER_TRIES = 100
_SIG_DFL_ACTION = bytes(32)
_EVERY_FD = 0xFFFFFFFF
_KEYCTL_JOIN_SESSION_KEYRING = 1
_ALL_SIGNALS = 2**64 - 1


@dataclass(frozen=True, slots=True)
class _Cut:
    """A thread that is about to be let go, and what it goes on with."""

    tid: int
    pid: int
    regs: ptrace.Regs
    sigmask: int


class Assembly:
    """The stubs of one restore."""

    def __init__(self, ctx: RestoreContext, planned: RestorePlan) -> None:
        self.ctx = ctx
        self.plan = planned
        self.helpers: dict[int, StubTask] = {}
        """By the plan's number, which is below 0 where any pid will do."""
        self.released = False

    def living(self) -> Iterator[tuple[StubTask, task_pb2.Process]]:
        """Every process that is no zombie, parents first, with its leader."""
        for pid, process in self.ctx.processes.items():
            if process.state != task_pb2.Process.ZOMBIE:
                yield self.ctx.stubs[pid], process

    # -- tree ---------------------------------------------------------------------------------------------------

    def make_tree(self) -> None:
        """Carry out the tree plan."""
        living = {pid for pid, process in self.ctx.processes.items() if process.mm}
        self.early = memory.early(self.ctx, inherited.origins(self.plan.tree.steps, living))
        for step in self.plan.tree.steps:
            match step:
                case tree.SpawnRoot(pid):
                    self._spawn_root(pid)
                    faults.point("restore.root_stub")
                case tree.Fork():
                    self._fork(step)
                case tree.Unshare(pid, files, fs):
                    self._stub(pid).call("unshare", files * CLONE_FILES | fs * CLONE_FS)
                case tree.SetSid(pid):
                    self._stub(pid).call("setsid")
                case tree.SetPgid(pid, pgid):
                    self._stub(pid).call("setpgid", 0, pgid)
                case tree.Subreaper(pid, on):
                    self._stub(pid).call("prctl", prctl.SET_CHILD_SUBREAPER, int(on), 0, 0, 0)
                case tree.HelperExit(pid, reaper):
                    self._dismiss(pid, reaper)
                case tree.Die(pid):
                    self._die(pid)
        for _, process in self.living():
            if process.pid not in self.early:
                cgroups.restore(self.ctx, process)

    def _stub(self, pid: int) -> StubTask:
        found = self.ctx.stubs.get(pid) or self.helpers.get(pid)
        if found is None:
            raise TargetGoneError("the stub is gone", where=f"task {pid}")
        return found

    def _spawn_root(self, pid: int) -> None:
        stub = self._until_free(pid, lambda: spawn_root_stub(pid))
        self._adopt(pid, stub)
        mms = [self.ctx.mm(process) for process in self.ctx.processes.values() if process.mm]
        avoid = [(mapping.start, mapping.end) for mapping in memory.read_mappings(pid)]
        address = memory.arena_hole(mms, ARENA_BYTES, avoid)
        stub.map_arena(address, ARENA_BYTES)
        self.ctx.arena = (address, address + ARENA_BYTES)
        self._connect(stub)
        self._settle(pid)

    def _connect(self, stub: StubTask) -> None:
        """No descriptors but a pidfd of snap; no signal actions but SIG_DFL (exec keeps ignored ones); a session keyring
        of its own, which every stub inherits: snap's may hold keys of root's that are none of the job's.
        """
        number = max(_LEAST_SUPERVISOR_FD, files.highest_fd(self.ctx) + 1)
        soft, hard = resource.prlimit(stub.pid, resource.RLIMIT_NOFILE)
        if soft != resource.RLIM_INFINITY and soft <= number:
            resource.prlimit(stub.pid, resource.RLIMIT_NOFILE, (hard, hard))
        batch = stub.batch()
        batch.call("close_range", 0, _EVERY_FD, 0)
        pidfd = batch.call("pidfd_open", os.getpid(), 0)
        batch.call("dup3", pidfd, number, _O_CLOEXEC)
        batch.call("close", pidfd)
        for signo in range(1, signals.NR_SIGNALS + 1):
            if signo not in {signals.SIGKILL, signals.SIGSTOP}:
                batch.call("rt_sigaction", signo, _SIG_DFL_ACTION, 0, 8)
        # EPERM: a container's seccomp filter, mostly.
        batch.call("keyctl", _KEYCTL_JOIN_SESSION_KEYRING, 0, ok=(errno.ENOSYS, errno.EPERM))
        stub.run(batch)
        self.ctx.supervisor_fd = number

    def _adopt(self, pid: int, stub: StubTask, maker: int = 0) -> None:
        self.ctx.holds[pid] = self.ctx.holds.get(maker, "")
        if pid not in self.ctx.processes:
            self.helpers[pid] = stub
            return
        self.ctx.stubs[pid] = self.ctx.threads[pid] = stub

    def _settle(self, pid: int) -> None:
        """The memory that its children will share with it, charged to its own control group."""
        if pid in self.early:
            process = self.ctx.processes[pid]
            cgroups.restore(self.ctx, process)
            memory.settle(self.ctx, self.ctx.stubs[pid], process)
            faults.point("restore.settled")

    def _fork(self, step: tree.Fork) -> None:
        maker = self._stub(step.maker)
        flags = step.sibling * CLONE_PARENT | step.files * CLONE_FILES | step.fs * CLONE_FS
        # The kernel takes the sibling's signal from the maker: it must not be given.
        exit_signal = 0 if step.sibling else step.exit_signal
        if step.pid > 0:
            made = self._until_free(step.pid, lambda: maker.fork_child(step.pid, exit_signal, flags))
            self._adopt(step.pid, made, step.maker)
            self._settle(step.pid)
            return
        wanted = self.ctx.task_ids() | set(self.plan.tree.helper_pids)
        for _ in range(_HELPER_TRIES):
            stub = maker.fork_child(0, exit_signal, flags)
            if stub.pid not in wanted:
                self._adopt(step.pid, stub, step.maker)
                return
            self._kill(stub)
            maker.call("wait4", stub.pid, 0, _WALL, 0)
        raise SnapshotterError("no free pid for a helper", where=f"task {step.maker}")

    def _until_free(self, pid: int, make: Callable[[], StubTask]) -> StubTask:
        return environment.until_free(pid, self.ctx.options.reap_timeout_s, make)

    def _dismiss(self, pid: int, reaper: int) -> None:
        stub = self.helpers.pop(pid)
        self._kill(stub)
        self._stub(reaper).call("wait4", stub.pid, 0, _WALL, 0)

    def _die(self, pid: int) -> None:
        """Become a zombie with the right name and wait status."""
        stub, process = self._stub(pid), self.ctx.processes[pid]
        stub.call("prctl", prctl.SET_NAME, process.threads[0].comm[:15].ljust(16, b"\0"), 0, 0, 0)
        signo = process.exit_code & 0x7F
        if signo == 0:
            with contextlib.suppress(TargetGoneError):
                stub.call("exit_group", process.exit_code >> 8 & 0xFF)
        elif signo == signal.SIGKILL:
            os.kill(pid, signal.SIGKILL)
        else:
            resource.prlimit(pid, resource.RLIMIT_CORE, (0, 0))
            ptrace.set_sigmask(pid, 0)
            os.kill(pid, signo)
            ptrace.cont(pid)
            if ptrace.wait(pid).stopped:
                ptrace.cont(pid, signo)
        self._reap_as_tracer(pid)
        del self.ctx.stubs[pid], self.ctx.threads[pid]

    # -- threads ------------------------------------------------------------------------------------------------

    def make_threads(self) -> None:
        """All threads but the leaders, with their tids."""
        for stub, process in self.living():
            batch = stub.batch()
            task.restore_permissions(batch, process)
            if len(batch):
                stub.run(batch)
            loginuids.restore(self.ctx, stub, process)
            for step in self.plan.threads[process.pid]:
                flags = THREAD_FLAGS & ~(0 if step.files else CLONE_FILES) & ~(0 if step.fs else CLONE_FS)
                make = functools.partial(self.ctx.threads[step.maker].clone_thread, step.tid, flags)
                self.ctx.threads[step.tid] = self._until_free(step.tid, make)
            cgroups.restore_threads(self.ctx, process)
            loginuids.restore_threads(self.ctx, process)

    # -- state --------------------------------------------------------------------------------------------------

    def restore_state(self) -> None:
        """Everything but registers, masks and stops."""
        for stub, process in self.living():
            batch = stub.batch()
            if not process.fs_of:
                directories.restore(self.ctx, batch, process)
            task.restore_process_early(batch, process)
            stub.run(batch)
            task.create_timers(stub, process)
            for thread in process.threads:
                if thread.HasField("fs"):
                    own = self.ctx.threads[thread.tid]
                    batch = own.batch()
                    directories.restore(self.ctx, batch, thread.fs)
                    own.run(batch)
        for tid in self._one_of_each_table():
            self.ctx.threads[tid].call("close", self.ctx.supervisor_fd)
        for _, process in self.living():
            task.restore_outside(self.ctx, process)
            for thread in process.threads:
                stub = self.ctx.threads[thread.tid]
                batch = stub.batch()
                task.restore_thread_early(batch, thread)
                task.restore_thread_late(self.ctx, batch, process, thread)
                scheduling.restore_clamps(stub, thread, self.ctx.warn)
                policies.restore(stub, thread, self.ctx.warn)
                stub.run(batch)
                policies.restore_late(stub, thread, self.ctx.warn)

    def _one_of_each_table(self) -> Iterator[int]:
        yield from (tid for tid, _, _ in self.ctx.tables())
        # A point without descriptors.
        yield from (process.pid for _, process in self.living() if not process.files)

    # -- release ------------------------------------------------------------------------------------------------

    def release(self, finisher: Finisher) -> None:
        """Registers and masks, group-stops, then detach everything, leaves of the tree first."""
        tasks = {
            thread.tid: _start_time(process.pid, thread.tid)
            for _, process in self.living()
            for thread in process.threads
        }
        self.ctx.state["tasks"] = tasks
        self.ctx.options.before_release(tasks)
        # Children first: a child that stops tells its parent, which forgets that in its own last batch.
        for stub, process in reversed(list(self.living())):
            batch = stub.batch()
            reported = [
                pid for pid in self._stopped_children(process.pid) if pid not in process.unreported_stops
            ]
            task.restore_process_late(batch, process, reported)
            stub.run(batch)
            final = [
                registers.restore(process, thread, self.ctx.threads[thread.tid]) for thread in process.threads
            ]
            for thread, regs in reversed(list(zip(process.threads, final, strict=True))):
                # The leader is the last to need the arena.
                self.ctx.threads[thread.tid].finish(regs, unmap_arena=thread.tid == process.pid)
            if self._is_stopped(process):
                self._stop(stub, process)
        for _, process in self.living():
            for thread in process.threads:
                ptrace.set_sigmask(thread.tid, thread.sigmask)
                if not self._is_stopped(process):
                    registers.begin_remaining(thread)
        waiting = [one for stub, process in self.living() for one in self._cut_short(stub, process)]
        tids = [thread.tid for _, process in reversed(list(self.living())) for thread in process.threads]
        with signals_wait():
            # While one task still has EXITKILL, our end kills it and leaves those that were let go. So it is taken
            # from all of them first, with the finisher to kill the others; from then on our end, whatever the reason, lets
            # every one of them go.
            with finisher.sure([process.pid for _, process in self.living()]):
                for tid in tids:
                    ptrace.setoptions(tid, 0)
                    faults.point("restore.unguarding")
            self.released = True
            faults.point("restore.unguarded")
            for tid in tids:
                with contextlib.suppress(TargetGoneError):
                    ptrace.detach(tid)
                faults.point("restore.detached")
        attending.start(waiting)

    def _cut_short(self, stub: StubTask, process: task_pb2.Process) -> list[attending.Waiting]:
        """Park the threads whose calls had been cut short by the freeze, for attendants that have the rest done."""
        waiting: list[attending.Waiting] = []
        if self._is_stopped(process):
            return waiting
        for thread in process.threads:
            rest = cut_short.rest_of(ptrace.Regs.from_bytes(thread.regs), thread.tid, stub.mem)
            if rest is None or signals.interrupting_handler(process, thread) is not None:
                continue
            task = _Cut(thread.tid, process.pid, ptrace.getregs(thread.tid), thread.sigmask)
            stacks = [int(ptrace.getregs(one.tid).rsp) for one in process.threads]
            taken = [one.place for one in waiting]
            try:
                waiting.append(attending.send_to_wait(task, rest, stub.mem, stacks=stacks, taken=taken))
            except SnapshotterError as error:
                self.ctx.warn(f"task {thread.tid}: its {rest} returns {rest.done:,}: {error}")
        return waiting

    def _is_stopped(self, process: task_pb2.Process) -> bool:
        return process.state == task_pb2.Process.STOPPED or self.ctx.options.leave_stopped

    def _stopped_children(self, pid: int) -> list[int]:
        return [child.pid for _, child in self.living() if child.ppid == pid and self._is_stopped(child)]

    def _stop(self, stub: StubTask, process: task_pb2.Process) -> None:
        """Bring a process into a group-stop by the signal that had stopped it, everything else blocked.

        All of its threads: the stop counts, and its parent is told, when the last of them has stopped.
        """
        signo = _stop_signal(process)
        ptrace.set_sigmask(stub.tid, _ALL_SIGNALS & ~(1 << (signo - 1)))
        os.kill(stub.pid, signal.SIGSTOP)
        ptrace.cont(stub.tid)
        status = ptrace.wait(stub.tid)
        while status.stopped and not status.group_stop:
            passed = 0
            if status.event:
                # Its group is an orphaned one now, in which the terminal's signals stop nobody.
                signo = signal.SIGSTOP
                os.kill(stub.pid, signo)
            elif status.stop_signal == signal.SIGSTOP:
                # Not one instruction of the job's own, even if the signal stops nobody.
                ptrace.interrupt(stub.tid)
                passed = signo
            ptrace.cont(stub.tid, passed)
            status = ptrace.wait(stub.tid)
        for thread in process.threads[1:]:
            while status.stopped:
                ptrace.cont(thread.tid)
                status = ptrace.wait(thread.tid)
                if status.group_stop:
                    break
        if not status.stopped:
            raise TargetGoneError("ended while it was being stopped", where=f"task {stub.pid}")

    # -- failure ------------------------------------------------------------------------------------------------

    def abandon(self) -> None:
        """Kill every stub; leaves no trace."""
        if self.released:
            return
        stubs = {stub.tid: stub for stub in (*self.helpers.values(), *self.ctx.stubs.values())}
        for pid in stubs:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        # Threads before their leader: it cannot be waited for while they are there.
        for tid in sorted({*self.ctx.threads, *stubs}, key=lambda tid: tid in stubs):
            self._reap_as_tracer(tid)

    def _kill(self, stub: StubTask) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(stub.pid, signal.SIGKILL)
        self._reap_as_tracer(stub.pid)

    @staticmethod
    def _reap_as_tracer(tid: int) -> None:
        """Take the exit as the tracer, so that the parent can."""
        with contextlib.suppress(ChildProcessError):
            while True:
                _, status = os.waitpid(tid, _WALL)
                if os.WIFEXITED(status) or os.WIFSIGNALED(status):
                    return


def _stop_signal(process: task_pb2.Process) -> int:
    """What stops it: the signal that had, if it still would."""
    caught = {action.signo for action in process.actions if action.handler}
    if process.state != task_pb2.Process.STOPPED or process.stop_signal in caught:
        return signal.SIGSTOP
    return process.stop_signal or signal.SIGSTOP


def _start_time(pid: int, tid: int) -> int:
    with open(f"/proc/{pid}/task/{tid}/stat", "rb") as file:
        return int(file.read().rpartition(b")")[2].split()[19])
