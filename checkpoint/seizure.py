"""Tasks that are seized: stopped one and all, and let go again, whatever happens to them meanwhile.

Owns PTRACE_SEIZE, the interrupt and the wait for each stop, children of vfork that must go on for their parent to stop,
and the detach. What the tasks have to do with each other is freeze.py's. A task is never seized with
PTRACE_O_EXITKILL: when snap dies, at any instant, the kernel detaches and the task goes on.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from checkpoint.kernel import proc, ptrace
from checkpoint.kernel.sys import KCMP_VM, kcmp
from checkpoint.kernel.tasks import is_dead
from checkpoint.parasite import attending
from snapshotter.base import faults
from snapshotter.base.errors import (
    PermissionDeniedError,
    SnapshotterError,
    TargetGoneError,
    UnsupportedError,
    wrap_os_error,
)

_STOP_SIGNALS = frozenset({signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU})
_EVENT_STOP = 128  # PTRACE_EVENT_STOP
_WAIT_ALL = 0x40000000  # __WALL
_STUCK_S = 0.003
_LET_GO_S = 5.0
_SEIZE_TRIES = 4


class CannotStopError(SnapshotterError):
    """A task did not stop in time: it sits in an uninterruptible wait, mostly as the parent of a vfork."""

    code = "cannot_stop"


@dataclass(slots=True)
class Seized:
    """One task in our hands."""

    tid: int
    pid: int
    stop_signal: int = 0
    """That of the group-stop which it was in; 0: it ran."""
    stands: bool = False
    """It has stopped for us. Before that it may stop for a signal that is on its way to it, and that must not be lost."""


class Seizure:
    """The tasks that this thread of ours has seized, in that order."""

    def __init__(self) -> None:
        self.tasks: dict[int, Seized] = {}
        self.interrupted_at_ns = 0
        """CLOCK_MONOTONIC just before the first one was interrupted."""
        self.dead: dict[int, int] = {}
        """tid -> pid of what had ended before it could be seized and is still to be seen."""
        self.stuck: list[int] = []
        """What did not stop in time and still is seized: nobody can seize it again before we end."""
        self._vforked: dict[
            int, int
        ] = {}  # tid -> parent, children of vfork that were let go on for a moment

    def __contains__(self, tid: int) -> bool:
        return tid in self.tasks

    def __len__(self) -> int:
        return len(self.tasks)

    # -- in ----------------------------------------------------------------------------------------------------

    def seize(self, pid: int, tid: int) -> bool:
        """Seize one task; False when it has ended meanwhile."""
        try:
            _seize(pid, tid)
        except (OSError, SnapshotterError) as error:
            if is_dead(pid, tid):
                self.dead[tid] = pid
                return False
            if isinstance(error, TargetGoneError):
                return False
            raise _seize_error(pid, tid, error) from error
        self.tasks[tid] = Seized(tid, pid)
        faults.point("freeze.seized")
        return True

    def is_known_dead(self, tid: int) -> bool:
        """Whether it still is what could not be seized; the number may be another's by now."""
        pid = self.dead.get(tid)
        if pid is None:
            return False
        if is_dead(pid, tid):
            return True
        del self.dead[tid]
        return False

    def stop(
        self, tids: Iterable[int], deadline: float, stopped: Callable[[int], None] = lambda _: None
    ) -> None:
        """Interrupt those seized tasks and wait until each stands still or is gone; `stopped` is told of each as it is."""
        waiting = dict.fromkeys(tids)
        for tid in list(waiting):
            # One in a group-stop has trapped before SEIZE returned; interrupting it would leave a second trap behind.
            if self._poll(tid):
                del waiting[tid]
                stopped(tid)
        if not self.interrupted_at_ns:
            self.interrupted_at_ns = time.monotonic_ns()
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
                stopped(tid)
            now = time.monotonic()
            if done or not waiting:
                pause, quiet_until = 0.0, now + _STUCK_S
                continue
            if now > deadline:
                raise self._stop_error(list(waiting))
            if now > quiet_until:
                quiet_until = now + _STUCK_S
                self._release_vforked(waiting)
            time.sleep(pause)
            pause = min(0.001, pause + 0.00002)

    def _release_vforked(self, waiting: dict[int, None]) -> None:
        """Let children of vfork go on until their exec: before it the parent cannot stop, nor return if they stay."""
        parents = {self.tasks[tid].pid for tid in waiting if tid in self.tasks}
        for tid, task in list(self.tasks.items()):
            if tid in waiting or task.pid in parents or tid != task.pid:
                continue
            try:
                parent = proc.read_stat(tid).ppid
                if parent not in parents or kcmp(tid, parent, KCMP_VM) != 0:
                    continue
                ptrace.cont(tid)
            except (OSError, SnapshotterError):
                continue
            task.stands = False
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
            stop = _stop_of(tid)
            if stop is None:
                return False
            if stop and stop >> 8 != _EVENT_STOP:
                self._pass_on(tid, _signal_of(stop))
                return False
            os.waitpid(tid, _WAIT_ALL)
        except ChildProcessError:
            stop = 0
        if not stop:
            self.forget(tid)
            return True
        # SIGTRAP: our interrupt. Anything else is the stop signal of a group-stop.
        sig = stop & 0xFF
        self.tasks[tid].stop_signal = sig if sig in _STOP_SIGNALS else 0
        self.tasks[tid].stands = True
        return True

    def _pass_on(self, tid: int, sig: int) -> None:
        """A signal was being delivered (every trap cancels a pending interrupt): ask again first, then let the signal
        through; the task sets up its handler's frame and traps before it runs a single instruction of it.

        Its stop has not been waited for: the kernel would forget the signal, which is lost if snap is killed then (wait_task_stopped,
        kernel/exit.c).
        """
        faults.point("freeze.signal")
        with contextlib.suppress(TargetGoneError):
            ptrace.interrupt(tid)
            ptrace.cont(tid, sig)

    def forget(self, tid: int) -> None:
        """It is gone, or somebody else's."""
        self.tasks.pop(tid, None)

    # -- out ---------------------------------------------------------------------------------------------------

    def leaders_last(self) -> list[int]:
        """Last seized first, but a leader cannot be reaped before its last thread is, whose tid may be the smaller."""
        order = list(self.tasks)[::-1]
        order.sort(key=lambda tid: self.tasks[tid].pid == tid)
        return order

    def let_go(self, *, killed: bool) -> BaseException | None:
        """Detach all, or wait for the end of what was killed. The first error comes back after all were tried."""
        problem: BaseException | None = None
        running: list[int] = []
        for tid in self.leaders_last():
            try:
                if killed:
                    _reap(tid)
                elif not self.detach(tid):
                    running.append(tid)
            except BaseException as error:
                problem = problem or error
        self._let_go_late(running)
        self.tasks.clear()
        self.dead.clear()
        self._vforked.clear()
        return problem

    def detach(self, tid: int) -> bool:
        """Let one task go; False when it has not stopped yet, which is what the kernel asks for."""
        try:
            ptrace.detach(tid, 0 if self.tasks[tid].stands else _signal_of(_stop_of(tid)))
        except ChildProcessError:
            return True
        except TargetGoneError:
            return _reap(tid, block=False)
        faults.point("thaw.detached")
        return True

    def _let_go_late(self, tids: list[int]) -> None:
        """Tasks that were interrupted and have not stopped (a freeze that failed): let them go as soon as they do."""
        deadline = time.monotonic() + _LET_GO_S
        while tids and time.monotonic() < deadline:
            tids = [tid for tid in tids if not self.detach(tid)]
            if tids:
                time.sleep(0.001)
        self.stuck = tids

    def _stop_error(self, tids: list[int]) -> SnapshotterError:
        tid = tids[0]
        return _does_not_stop(self.tasks[tid].pid if tid in self.tasks else tid, tid)


def _seize(pid: int, tid: int) -> None:
    for _ in range(_SEIZE_TRIES):
        try:
            return ptrace.seize(tid, ptrace.O_TRACESYSGOOD)
        except PermissionDeniedError:
            # An attendant may also have gone by itself just now, or its guard have come.
            if not attending.dismiss(pid, tid) and proc.read_status(pid, tid).tracer_pid:
                raise
    return ptrace.seize(tid, ptrace.O_TRACESYSGOOD)


def _stop_of(tid: int) -> int | None:
    """The signal and, above its 8 bits, the event that a seized task has stopped for, to be waited for by somebody else; 0: it has ended;
    None: neither.

    Raises ChildProcessError: it is gone.
    """
    seen = os.waitid(os.P_PID, tid, os.WEXITED | os.WSTOPPED | os.WNOHANG | os.WNOWAIT | _WAIT_ALL)
    if seen is None:
        return None
    return seen.si_status if seen.si_code in {os.CLD_TRAPPED, os.CLD_STOPPED} else 0


def _signal_of(stop: int | None) -> int:
    """The signal that is being delivered to a task that has stopped so; 0: it has stopped for something else."""
    return stop if stop and not stop >> 8 and not stop & 0x80 else 0


def _does_not_stop(pid: int, tid: int) -> SnapshotterError:
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
    if tracer and os.path.exists(f"/proc/self/task/{tracer}"):
        return _does_not_stop(pid, tid)  # one that we could not let go again, see Seizure.stuck
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
