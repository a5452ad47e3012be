"""The frozen tree: every task of a job seized and stopped, and let go again whatever happens.

Owns seizing, interrupting, finding tasks that appear meanwhile, and the thaw. Invariants:

- A task is seized with PTRACE_SEIZE and never with PTRACE_O_EXITKILL: when snap dies, at any instant, the kernel
  detaches and the job goes on (a group-stopped task stays stopped).
- After `freeze()` every task of the tree is in `processes` and stopped, or is a zombie; none can appear any more,
  because only a running task can make one.
- Leaving the context thaws in reverse order of seizing (threads before leaders), also when tasks have died and when
  curing one failed.
- A task that stands in what a snap that was killed left in it is led out before its registers are read.

ptrace requests must come from the thread that seized: a FrozenTree belongs to the thread that made it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Literal, Self

from checkpoint.context import FrozenProcess, FrozenTask, ProcessState
from checkpoint.kernel import interrupted, proc, ptrace
from checkpoint.kernel.mem import ProcMem
from checkpoint.kernel.sys import KCMP_VM, kcmp
from checkpoint.kernel.tasks import children, is_dead, task_ids
from checkpoint.parasite import cure, stranded
from checkpoint.uninterrupted import stops_wait
from snapshotter.base import faults
from snapshotter.base.errors import SnapshotterError, TargetGoneError, UnsupportedError, wrap_os_error

_STOP_SIGNALS = frozenset({signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU})
_EVENT_STOP = 128  # PTRACE_EVENT_STOP
_WAIT_ALL = 0x40000000  # __WALL
_MAX_PASSES = 64
_STUCK_S = 0.003
_LET_GO_S = 5.0


class CannotStopError(SnapshotterError):
    """A task did not stop in time: it sits in an uninterruptible wait, mostly as the parent of a vfork."""

    code = "cannot_stop"


class TreeChangedError(SnapshotterError):
    """Processes came and went faster than they could be frozen; trying again may do."""

    code = "tree_changed"


class FrozenTree:
    """Freezes a whole process tree for as long as the context lasts.

    Args:
        root_pid: the root of the job.
        timeout_s: how long the job may take to stop.
        max_tasks: more tasks than this are refused (a fork bomb, mostly).
    """

    def __init__(self, root_pid: int, *, timeout_s: float = 10.0, max_tasks: int = 32768) -> None:
        self.root_pid = root_pid
        self.timeout_s = timeout_s
        self.max_tasks = max_tasks
        self.processes: dict[int, FrozenProcess] = {}
        self.frozen_at_ns = 0
        """CLOCK_MONOTONIC just before the first task was interrupted."""
        self.thawed_at_ns = 0
        self._seized: dict[
            int, tuple[int, bool, int]
        ] = {}  # tid -> pid, group_stopped, stop_signal; stopped ones
        self._order: list[int] = []  # tids in the order of seizing
        self._tasks: dict[int, FrozenTask] = {}
        self._vforked: dict[
            int, int
        ] = {}  # tid -> parent, children of vfork that were let go on for a moment
        self._left: Literal["run", "stop", "kill"] = "run"

    # -- the context -------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        try:
            self.freeze()
        except BaseException:
            self.thaw()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.thaw()

    @property
    def frozen_us(self) -> int:
        """How long the job stood still; so far, when it still does."""
        end = self.thawed_at_ns or time.monotonic_ns()
        return (end - self.frozen_at_ns) // 1000 if self.frozen_at_ns else 0

    # -- freezing ----------------------------------------------------------------------------------------------

    def freeze(self) -> None:
        """Stop every task of the tree and read what it was doing."""
        deadline = time.monotonic() + self.timeout_s
        for _ in range(_MAX_PASSES):
            tree, fresh = self._look()
            if not fresh:
                break
            if len(self._seized) + len(fresh) > self.max_tasks:
                raise UnsupportedError(
                    f"the job has more than {self.max_tasks} tasks and is still growing",
                    where=f"task {self.root_pid}",
                    hint="a fork bomb? raise max_tasks in the configuration if it is not",
                )
            self._stop([item for item in fresh if self._seize(*item)], deadline)
        else:
            raise TreeChangedError(
                f"new tasks kept appearing in {_MAX_PASSES} passes",
                where=f"task {self.root_pid}",
                hint="try again",
            )
        self._describe(tree)

    def _look(self) -> tuple[dict[int, list[int]], list[tuple[int, int]]]:
        """The tree as it is now, parents first (pid -> its tids), and the (pid, tid) not yet stopped."""
        tree: dict[int, list[int]] = {}
        fresh: list[tuple[int, int]] = []
        queue = [self.root_pid]
        for pid in queue:
            tids = task_ids(pid)
            if not tids:
                if pid == self.root_pid:
                    raise TargetGoneError("no such process", where=f"task {pid}")
                continue
            tree[pid] = tids
            fresh += [(pid, tid) for tid in tids if tid not in self._seized and not is_dead(pid, tid)]
            queue += [child for child in children(pid, tids) if child not in tree]
        return tree, fresh

    def _seize(self, pid: int, tid: int) -> bool:
        """Seize one task; False when it has ended meanwhile."""
        try:
            ptrace.seize(tid, ptrace.O_TRACESYSGOOD)
        except TargetGoneError:
            return False
        except (OSError, SnapshotterError) as error:
            if is_dead(pid, tid):
                return False
            raise _seize_error(pid, tid, error) from error
        self._order.append(tid)
        self._seized[tid] = (pid, False, 0)
        faults.point("freeze.seized")
        return True

    def _stop(self, items: list[tuple[int, int]], deadline: float) -> None:
        """Interrupt those seized tasks and wait until each stands still or is gone."""
        waiting = dict.fromkeys(tid for _, tid in items)
        for tid in list(waiting):
            # One in a group-stop has trapped before SEIZE returned; interrupting it would leave a second trap behind.
            if self._poll(tid):
                del waiting[tid]
        if not self.frozen_at_ns:
            self.frozen_at_ns = time.monotonic_ns()
        for tid in waiting:
            with contextlib.suppress(TargetGoneError):
                ptrace.interrupt(tid)
        if waiting:
            faults.point("freeze.interrupted")
        pause = 0.0
        quiet_until = time.monotonic() + _STUCK_S
        while waiting:
            done = [tid for tid in waiting if self._poll(tid)]
            for tid in done:
                del waiting[tid]
            now = time.monotonic()
            if done or not waiting:
                pause, quiet_until = 0.0, now + _STUCK_S
                continue
            if now > deadline:
                raise _stop_error(self._seized, list(waiting))
            if now > quiet_until:
                quiet_until = now + _STUCK_S
                self._release_vforked(waiting)
            time.sleep(pause)
            pause = min(0.001, pause + 0.00002)

    def _release_vforked(self, waiting: dict[int, None]) -> None:
        """Let children of vfork go on until their exec: before it the parent cannot stop, nor return if they stay."""
        parents = {self._seized[tid][0] for tid in waiting if tid in self._seized}
        for tid, (pid, _, _) in list(self._seized.items()):
            if tid in waiting or pid in parents or tid != pid:
                continue
            try:
                parent = proc.read_stat(pid).ppid
                if parent not in parents or kcmp(pid, parent, KCMP_VM) != 0:
                    continue
                ptrace.cont(tid)
            except (OSError, SnapshotterError):
                continue
            # Interrupted again by hand: it has one exec or exit to make, and stops after it.
            self._vforked[tid] = parent
            waiting[tid] = None
        for tid, parent in list(self._vforked.items()):
            with contextlib.suppress(OSError, SnapshotterError):
                if kcmp(tid, parent, KCMP_VM) == 0:
                    continue
            del self._vforked[tid]
            with contextlib.suppress(TargetGoneError):
                ptrace.interrupt(tid)

    def _poll(self, tid: int) -> bool:
        """Whether a seized task has stopped for good (or is gone); passes on signals that come in between."""
        try:
            got, status = os.waitpid(tid, _WAIT_ALL | os.WNOHANG)
        except ChildProcessError:
            self._forget(tid)
            return True
        if got == 0:
            return False
        if not os.WIFSTOPPED(status):
            self._forget(tid)
            return True
        sig, event = os.WSTOPSIG(status), status >> 16
        pid = self._seized[tid][0]
        if event == _EVENT_STOP:
            # SIGTRAP: our interrupt. Anything else is the stop signal of a group-stop.
            self._seized[tid] = (pid, sig in _STOP_SIGNALS, sig if sig in _STOP_SIGNALS else 0)
            return True
        # A signal was being delivered (every trap cancels a pending interrupt): ask again first, then let the signal
        # through; the task sets up its handler's frame and traps before it runs a single instruction of it.
        with contextlib.suppress(TargetGoneError):
            ptrace.interrupt(tid)
            ptrace.cont(tid, 0 if event or sig & 0x80 else sig)
        return False

    def _forget(self, tid: int) -> None:
        self._seized.pop(tid, None)
        self._tasks.pop(tid, None)
        if tid in self._order:
            self._order.remove(tid)

    def _describe(self, tree: dict[int, list[int]]) -> None:
        """Fill `processes` from the final tree; detach what has left it."""
        inside = {tid for tids in tree.values() for tid in tids}
        for tid in [tid for tid in self._order if tid not in inside]:
            self._detach(tid)
            self._forget(tid)
        self.processes = {}
        for pid, tids in tree.items():
            mem = self._lead_out(pid, tids)
            stat, status = proc.read_stat(pid), proc.read_status(pid)
            stopped = [tid for tid in tids if tid in self._seized]
            if not stopped:
                self.processes[pid] = FrozenProcess(
                    pid, None, [], stat, status, None, "zombie", 0, stat.start_time_ticks
                )
                continue
            if pid not in self._seized:
                raise UnsupportedError(
                    "the main thread has ended and other threads go on",
                    where=f"task {pid}",
                    hint="such a process cannot be made again exactly",
                )
            threads = [
                self._task(pid, tid, stat.start_time_ticks)
                for tid in [pid, *(t for t in stopped if t != pid)]
            ]
            leader = threads[0]
            state: ProcessState = "stopped" if leader.group_stopped else "running"
            self.processes[pid] = FrozenProcess(
                pid,
                leader,
                threads,
                stat,
                status,
                mem,
                state,
                leader.stop_signal,
                stat.start_time_ticks,
            )

    def _lead_out(self, pid: int, tids: list[int]) -> ProcMem | None:
        """See to it that no task stands in what a snap that was killed left behind; the memory of the process."""
        stopped = [tid for tid in tids if tid in self._seized]
        if not stopped:
            return None
        mem = ProcMem(pid)
        for tid in stopped:
            if not stranded.is_inside(ptrace.getregs(tid), mem):
                continue
            try:
                stranded.lead_out(tid, mem)
            except TargetGoneError:
                self._forget(tid)
        return mem

    def _task(self, pid: int, tid: int, leader_start: int) -> FrozenTask:
        start = leader_start if tid == pid else proc.read_stat(pid, tid).start_time_ticks
        _, group_stopped, stop_signal = self._seized[tid]
        regs = ptrace.getregs(tid)
        if not group_stopped and interrupted.restart_instead(regs):
            ptrace.setregs(tid, regs)
        task = FrozenTask(
            tid=tid,
            pid=pid,
            regs=regs,
            sigmask=ptrace.get_sigmask(tid),
            start_time_ticks=start,
            group_stopped=group_stopped,
            stop_signal=stop_signal,
        )
        self._tasks[tid] = task
        return task

    def tasks(self) -> Iterator[FrozenTask]:
        """Every stopped task, in the order of seizing."""
        return (self._tasks[tid] for tid in self._order if tid in self._tasks)

    # -- letting go --------------------------------------------------------------------------------------------

    def leave(self, after: Literal["run", "stop", "kill"]) -> None:
        """Say what the thaw shall do: let the job run, leave it stopped by SIGSTOP, or kill it."""
        self._left = after

    def cure(self) -> None:
        """Take the parasite out of every task that has one, last infected first; the job stays frozen.

        One that fails does not keep the others in: the first error is raised after all were tried.
        """
        problem: BaseException | None = None
        for task in reversed(list(self.tasks())):
            if task.remote is None:
                continue
            remote, task.remote = task.remote, None
            try:
                cure(remote)
            except TargetGoneError:
                continue
            except BaseException as error:
                problem = problem or error
        if problem is not None:
            raise problem

    def thaw(self) -> None:
        """Let every task go. Does nothing the second time. The first error is raised after all were let go."""
        if not self._order:
            return
        faults.point("thaw.begin")
        problem: BaseException | None = None
        try:
            self.cure()
        except BaseException as error:  # the rest must be let go whatever happened
            problem = error
        signo = {"run": 0, "stop": signal.SIGSTOP, "kill": signal.SIGKILL}[self._left]
        if signo:
            for pid in self.processes:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signo)
        running: list[int] = []
        # A leader cannot be reaped before its last thread is, and a thread's tid may be the smaller one.
        order = self._order[::-1]
        order.sort(key=self._is_leader)
        for tid in order:
            try:
                if self._left == "kill":
                    _reap(tid)
                elif not self._detach(tid):
                    running.append(tid)
            except BaseException as error:
                problem = problem or error
        self._let_go_late(running)
        self.thawed_at_ns = time.monotonic_ns()
        self._order.clear()
        self._seized.clear()
        self._tasks.clear()
        self._vforked.clear()
        for process in self.processes.values():
            if process.mem is not None:
                process.mem.close()
        if problem is not None:
            raise problem

    def _is_leader(self, tid: int) -> bool:
        return tid in self._seized and self._seized[tid][0] == tid

    def _detach(self, tid: int) -> bool:
        """Let one task go; False when it has not stopped yet, which is what the kernel asks for."""
        try:
            ptrace.detach(tid)
        except TargetGoneError:
            return _reap(tid, block=False)
        faults.point("thaw.detached")
        return True

    def _let_go_late(self, tids: list[int]) -> None:
        """Tasks that were interrupted and have not stopped (a freeze that failed): let them go as soon as they do."""
        deadline = time.monotonic() + _LET_GO_S
        while tids and time.monotonic() < deadline:
            tids = [tid for tid in tids if not self._detach(tid)]
            if tids:
                time.sleep(0.001)


@contextlib.contextmanager
def stopped_process(pid: int, *, timeout_s: float = 5.0) -> Iterator[FrozenProcess]:
    """All threads of one process stand still for the time of the context; its children go on.

    Raises:
        TargetGoneError: it has ended, or is a zombie.
    """
    with stops_wait(), _OneProcess(pid, timeout_s=timeout_s) as tree:
        process = tree.processes[pid]
        if process.is_zombie:
            raise TargetGoneError("has ended", where=f"task {pid}")
        yield process


def lead_out(pids: Iterable[int]) -> None:
    """Let these processes leave what a snap that was killed has left in them, with all that it had opened there.

    One that runs does so by itself, one that is stopped (SIGSTOP) does not. Processes without such a thing are not touched.
    """
    for pid in pids:
        with contextlib.suppress(OSError, SnapshotterError):
            with ProcMem(pid) as mem:
                there = any(stranded.code_pages(proc.read_maps(pid), mem))
            if there:
                with stopped_process(pid):
                    pass  # entering it has led them out


class _OneProcess(FrozenTree):
    """A frozen tree without branches."""

    def _look(self) -> tuple[dict[int, list[int]], list[tuple[int, int]]]:
        tids = task_ids(self.root_pid)
        if not tids:
            raise TargetGoneError("no such process", where=f"task {self.root_pid}")
        fresh = [
            (self.root_pid, tid)
            for tid in tids
            if tid not in self._seized and not is_dead(self.root_pid, tid)
        ]
        return {self.root_pid: tids}, fresh


def _reap(tid: int, *, block: bool = True) -> bool:
    """Collect the end of a traced task, so that its own parent gets to see it; False: it has not ended."""
    for _ in range(1000):
        try:
            got, status = os.waitpid(tid, _WAIT_ALL | (0 if block else os.WNOHANG))
        except (ChildProcessError, InterruptedError):
            return True
        if got == 0:
            return False
        if not os.WIFSTOPPED(status):
            return True
        if not block:
            return False
    return True


def _seize_error(pid: int, tid: int, error: Exception) -> SnapshotterError:
    where = f"task {pid}" if pid == tid else f"task {pid}, thread {tid}"
    try:
        tracer = proc.read_status(pid).tracer_pid
    except (OSError, SnapshotterError):
        tracer = 0
    if tracer:
        return UnsupportedError(
            f"traced by task {tracer} already",
            where=where,
            hint="stop the debugger, strace or other snap first",
        )
    hint = "run as root, or set kernel.yama.ptrace_scope=0"
    cause = error if isinstance(error, OSError) else error.__cause__
    if isinstance(cause, OSError):
        return wrap_os_error(cause, "cannot seize", where=where, hint=hint)
    return SnapshotterError(f"cannot seize: {error}", where=where, hint=hint)


def _stop_error(seized: dict[int, tuple[int, bool, int]], tids: list[int]) -> SnapshotterError:
    tid = tids[0]
    pid = seized[tid][0] if tid in seized else tid
    try:
        with open(f"/proc/{pid}/task/{tid}/wchan", encoding="ascii") as file:
            place = file.read() or "?"
    except OSError as error:
        if error.errno in {errno.ENOENT, errno.ESRCH}:
            return TargetGoneError("ended while it was being frozen", where=f"task {pid}")
        place = "?"
    return CannotStopError(
        f"does not stop (it waits in the kernel at {place})",
        where=f"task {pid}, thread {tid}",
        hint="a parent in vfork waits for its child, others for a device: try again",
    )
