"""Replacing the old job: frozen as a whole, killed while it is held, waited for until its pids are free.

Invariant: until it is killed nothing has happened to the old job, whatever happens to snap, and it is killed whole or not at all
(finisher.py). Its tasks are seized and interrupted (freeze.py), which the kernel undoes when snap dies; a job that was
stopped with SIGSTOP would stay so. And what stands still makes no children, so that none is left behind. A traced task's
pid is not given to another before its tracer has waited for it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterable

from checkpoint import environment, watchdog
from checkpoint.environment import Survey
from checkpoint.finisher import Finisher, signal_all
from checkpoint.freeze import FrozenTree
from checkpoint.kernel import interrupted, proc, ptrace
from checkpoint.restore_context import RestoreContext
from checkpoint.uninterrupted import signals_wait
from snapshotter.base import faults
from snapshotter.base.errors import RestoreConflictError, TargetGoneError

_WAIT_ALL = 0x40000000  # __WALL
_POLL_S = 0.005
_STRAY_WAIT_S = 0.5  # the job stands still meanwhile


def replace(ctx: RestoreContext, found: Survey, finisher: Finisher) -> None:
    """Kill the old job and wait until its pids are free.

    Raises:
        RestoreConflictError: a zombie keeps a pid; whose task it is to reap it is named.
        UnsupportedError, CannotStopError: it cannot be frozen (a debugger has it); it runs on as before.
    """
    wanted = ctx.task_ids()
    if found.old:
        with contextlib.ExitStack() as stack:
            stack.enter_context(watchdog.held())
            trees = _freeze(found, stack)
            # What left the tree after the survey (a daemon was just made) keeps a number for as long as it lives.
            members = set(found.old).union(*(tree.members for tree in trees))
            environment.await_no_stray(
                wanted,
                lambda holder: holder.pid in members,
                time.monotonic() + _STRAY_WAIT_S,
                living_only=True,
            )
            faults.point("restore.held")
            with signals_wait():
                watchdog.lifted()
                held = dict.fromkeys(pid for tree in trees for pid in tree.held)
                signal_all(finisher, list(held), signal.SIGKILL)
            deadline = time.monotonic() + ctx.options.reap_timeout_s
            for tree in trees:
                tree.reap(deadline)
    deadline = time.monotonic() + ctx.options.reap_timeout_s
    _await_free(wanted | set(found.old), deadline)
    environment.await_no_stray(wanted, lambda _: False, deadline)


class _HeldTree(FrozenTree):
    """A frozen tree that is going to be killed: of its tasks nothing needs to be known but that they stand."""

    def __init__(self, root_pid: int) -> None:
        super().__init__(root_pid, max_tasks=1 << 22)
        self.held: list[int] = []
        """Its processes, zombies left out; those that have lost their parent meanwhile too."""
        self.members: set[int] = set()
        """All its processes, its zombies included."""

    def _describe(self, tree: dict[int, list[int]]) -> None:
        self.held = list(dict.fromkeys(task.pid for task in self.seized.tasks.values()))
        self.members = set(tree)
        # As everywhere: if it is let go after all, no system call of it may have been cut short.
        for tid, task in self.seized.tasks.items():
            regs = ptrace.getregs(tid)
            if not task.stop_signal and interrupted.restart_instead(regs):
                ptrace.setregs(tid, regs)

    def reap(self, deadline: float) -> None:
        """Wait, as the tracer, until all have ended; their parents see it then."""
        waiting = self.seized.leaders_last()
        while waiting:
            waiting = [tid for tid in waiting if not self._has_ended(tid)]
            if waiting and time.monotonic() > deadline:
                raise RestoreConflictError(
                    "it was killed but does not end (an uninterruptible wait?)",
                    where=f"task {waiting[0]}",
                    hint="see /proc/PID/stack; nothing was restored, run the rollback again once it is gone",
                )
            if waiting:
                time.sleep(_POLL_S / 10)

    def _has_ended(self, tid: int) -> bool:
        try:
            got, status = os.waitpid(tid, _WAIT_ALL | os.WNOHANG)
        except ChildProcessError:
            got, status = tid, 0
        if not got or os.WIFSTOPPED(status):
            return False
        self.seized.forget(tid)
        return True


def _freeze(found: Survey, stack: contextlib.ExitStack) -> list[_HeldTree]:
    """Hold every process of the old job, and whatever they have made since the survey."""
    trees: list[_HeldTree] = []
    held: set[int] = set()
    # Parents first: their trees hold most of the rest already.
    for holder in sorted(found.old.values(), key=lambda holder: holder.ppid in found.old):
        if holder.pid in held:
            continue
        tree = _HeldTree(holder.pid)
        try:
            tree.freeze()
            mine = proc.read_stat(holder.pid).start_time_ticks == holder.start_time_ticks
        except TargetGoneError:
            tree.thaw()
            continue
        except BaseException:
            tree.thaw()
            raise
        stack.callback(tree.thaw)
        # It stands: if the start time is right now, it is that process for good.
        if mine:
            trees.append(tree)
            held.update(tree.held)
    return trees


def _await_free(wanted: Iterable[int], deadline: float) -> None:
    """Wait until no needed number is held by a dead task; reap those that are our own children."""
    waiting = set(wanted)
    while True:
        for pid in list(waiting):
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
            if not os.path.exists(f"/proc/{pid}"):
                waiting.discard(pid)
        if not waiting:
            return
        if time.monotonic() > deadline:
            _still_held(min(waiting))
        time.sleep(_POLL_S)


def _still_held(pid: int) -> None:
    holder = environment.holder_of(pid)
    if holder is None:
        return
    if holder.state in "ZX":
        parent = environment.holder_of(holder.ppid)
        raise RestoreConflictError(
            f"pid {pid} is still held by a zombie ({holder.comm}) that its parent has not reaped",
            hint=f"{parent or f'task {holder.ppid}'} must wait for it (or end); then run the rollback again",
        )
    raise RestoreConflictError(f"pid {pid} is needed but held by {holder}", hint="nothing was restored")
