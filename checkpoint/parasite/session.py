"""The parasite as a library: a running process is stopped, runs batches and goes on.

Owns stopping all of its threads for the time. What happens inside is infection.py's.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from checkpoint.kernel import interrupted, proc, ptrace
from checkpoint.kernel.mem import ProcMem
from checkpoint.parasite import stranded
from checkpoint.parasite.infection import cure, infect
from snapshotter.base.errors import SnapshotterError, TargetGoneError, UnsupportedError

if TYPE_CHECKING:
    from types import TracebackType

    from checkpoint.kernel.ptrace import Regs
    from checkpoint.parasite.remote import RemoteTask

_STOP_TIMEOUT_S = 5.0


@dataclass(slots=True)
class _Stopped:
    tid: int
    pid: int
    regs: Regs
    sigmask: int
    places: list[tuple[int, int]]
    facts: None = None


class Parasite:
    """Runs batches in a running process: all of its threads are stopped for the time, `tid` (default: the main
    thread) runs them. A context manager; leaving it cures and lets the process go on.
    """

    def __init__(self, pid: int, tid: int = 0) -> None:
        self.pid = pid
        self.tid = tid or pid
        self._seized: list[int] = []
        self._task: RemoteTask | None = None

    def __enter__(self) -> RemoteTask:
        try:
            self._stop_all()
            with ProcMem(self.pid) as mem:
                for tid in self._seized:
                    regs = ptrace.getregs(tid)
                    if stranded.is_inside(regs, mem):
                        stranded.lead_out(tid, mem)
                        regs = ptrace.getregs(tid)
                    if interrupted.restart_instead(regs):
                        ptrace.setregs(tid, regs)
            target = _Stopped(self.tid, self.pid, ptrace.getregs(self.tid), ptrace.get_sigmask(self.tid), [])
            self._task = infect(target)
        except BaseException:
            self._let_go()
            raise
        return self._task

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._task is not None:
                with contextlib.suppress(TargetGoneError):
                    cure(self._task)
        finally:
            self._task = None
            self._let_go()

    def _stop_all(self) -> None:
        deadline = time.monotonic() + _STOP_TIMEOUT_S
        while True:
            fresh = [tid for tid in proc.threads(self.pid) if tid not in self._seized]
            if not fresh:
                break
            for tid in fresh:
                try:
                    _await_vfork(self.pid, tid, deadline)
                    ptrace.seize(tid, ptrace.O_TRACESYSGOOD)
                except TargetGoneError:
                    continue
                self._seized.append(tid)
                ptrace.interrupt(tid)
                if not stranded.await_stop(tid, deadline):
                    self._seized.remove(tid)
        if self.tid not in self._seized:
            raise TargetGoneError("it has ended", where=f"task {self.tid}")

    def _let_go(self) -> None:
        for tid in reversed(self._seized):
            with contextlib.suppress(SnapshotterError):
                ptrace.detach(tid)
        self._seized = []


def _await_vfork(pid: int, tid: int, deadline: float) -> None:
    """A parent in vfork stops, and can be let go, only after its child's exec or end: seize it after that."""
    while proc.waits_for_vfork(pid, tid):
        if time.monotonic() > deadline:
            raise UnsupportedError(
                "it does not stop: it waits for its vfork child", where=f"task {tid}", hint="try again"
            )
        time.sleep(0.001)
