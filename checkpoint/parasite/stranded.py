"""Tasks that a snap which was killed left inside the parasite: seen, and led out.

A task that runs leaves by itself, in microseconds. A job that is stopped (SIGSTOP) does not: when its tracer dies the
kernel puts it back to sleep wherever it stands, in the blob or before its frames, for as long as the job is stopped.
What it stands on looks like a leftover, and to take that away would kill it. So whoever has stopped a task looks here
before its registers are believed.

Nothing of the job's own runs meanwhile: the task goes from one system call to the next, and the last of them is the
rt_sigreturn that gives it its own registers.
"""

from __future__ import annotations

import contextlib
import os
import time
from typing import TYPE_CHECKING

from checkpoint.kernel import ptrace
from checkpoint.parasite import frames, gadgets
from checkpoint.parasite.remote import ALL_SIGNALS, CODE_SIZE, MAGIC_SIZE, blob
from snapshotter.base.errors import SnapshotterError, TargetGoneError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from checkpoint.kernel.mem import ProcMem
    from checkpoint.kernel.proc import MapsEntry
    from checkpoint.kernel.ptrace import Regs, WaitStatus

_PAGE = 4096
_WORD = 8
_LEAVE_S = 5.0


def code_pages(maps: Iterable[MapsEntry], mem: ProcMem) -> Iterator[int]:
    """Where the parasite's code is mapped in a process."""
    for entry in maps:
        if entry.perms != "r-xp" or entry.path or entry.inode or entry.size_bytes != CODE_SIZE:
            continue
        with contextlib.suppress(OSError):
            if mem.read(entry.start, MAGIC_SIZE) == blob()[:MAGIC_SIZE]:
                yield entry.start


def is_inside(regs: Regs, mem: ProcMem) -> bool:
    """Whether a stopped task with these registers runs the parasite, or would leave it through its frames."""
    with contextlib.suppress(OSError):
        if mem.read(regs.rip & -_PAGE, MAGIC_SIZE) == blob()[:MAGIC_SIZE]:
            return True
    # At a frame's start: `syscall; ret` is about to take it. A word further: the restorer is.
    for passed in (0, _WORD):
        frame = int(regs.rsp) - passed
        if frame % frames.ALIGN:
            continue
        with contextlib.suppress(OSError):
            if passed:
                restorer = int.from_bytes(mem.read(frame, _WORD), "little")
                leaves = restorer <= regs.rip <= restorer + gadgets.MAX_SIGRETURN
            else:
                code = mem.read(regs.rip - 2, 5)
                leaves = gadgets.SYSCALL_RET in {code[:3], code[2:]}
            if leaves and frames.is_ours(frame, mem):
                return True
    return False


def lead_out(tid: int, mem: ProcMem) -> None:
    """Let a stopped task of ours go on until it has left the parasite; it then stands still again, before its next
    own instruction.

    Raises:
        TargetGoneError: it ended.
        UnsupportedError: it does not leave.
    """
    deadline = time.monotonic() + _LEAVE_S
    # A signal that its own mask lets through would run its handler upon the frames. The last frame sets the mask.
    ptrace.set_sigmask(tid, ALL_SIGNALS)
    with contextlib.suppress(SnapshotterError):  # what it still has to call was not its own wish
        ptrace.setoptions(tid, ptrace.O_TRACESYSGOOD | ptrace.O_SUSPEND_SECCOMP)
    call = _end_sleep(tid, mem)
    sig = 0
    while is_inside(ptrace.getregs(tid), mem):
        ptrace.syscall(tid, sig)
        status = _wait(tid, deadline)
        if status is None:
            ptrace.interrupt(tid)
            raise UnsupportedError(
                "it does not leave the code that a snap which was killed has left in it",
                where=f"task {tid}", hint="try again",
            )  # fmt: skip
        if status.gone:
            raise TargetGoneError("it ended while it left the parasite", where=f"task {tid}")
        # Not blocked: SIGSTOP and what an instruction of its own caused.
        sig = 0 if status.event or status.syscall_stop else status.stop_signal
    ptrace.setoptions(tid, ptrace.O_TRACESYSGOOD)
    ptrace.interrupt(tid)
    ptrace.cont(tid)
    if not await_stop(tid, deadline):
        raise TargetGoneError("it ended while it left the parasite", where=f"task {tid}")
    if call is not None:
        regs = ptrace.getregs(tid)
        regs.orig_rax = (
            call  # sigreturn has cleared it; whoever looks sees the short count of that call again
        )
        ptrace.setregs(tid, regs)


def _end_sleep(tid: int, mem: ProcMem) -> int | None:
    """The call that a parked task (parked.py) will return from, its sleep ended; None: it is not parked."""
    regs = ptrace.getregs(tid)
    for passed in (0, _WORD):
        call = frames.noted_call(int(regs.rsp) - passed, mem)
        if call is None:
            continue
        if regs.wants_restart:
            regs.rax, regs.orig_rax = 0, ptrace.NOT_IN_SYSCALL
        regs.rdx = 0  # poll's timeout, for one that was stopped on its way there
        ptrace.setregs(tid, regs)
        return call
    return None


def await_stop(tid: int, deadline: float) -> bool:
    """Wait for the trap of an interrupt; signals that come first are let through. False: it ended."""
    while True:
        try:
            status = _wait(tid, deadline)
        except TargetGoneError:
            return False
        if status is None:
            raise UnsupportedError(
                "it does not stop: it sleeps uninterruptibly (waits for a device)",
                where=f"task {tid}", hint="try again",
            )  # fmt: skip
        if status.gone:
            return False
        if status.event == ptrace.EVENT_STOP:
            return True
        ptrace.interrupt(tid)
        ptrace.cont(tid, 0 if status.event or status.syscall_stop else status.stop_signal)


def _wait(tid: int, deadline: float) -> WaitStatus | None:
    """The next status of a traced task; None after the deadline (CLOCK_MONOTONIC, seconds)."""
    pause = 0.0
    while True:
        status = ptrace.wait(tid, ptrace.WALL | os.WNOHANG)
        if status.tid:
            return status
        if time.monotonic() > deadline:
            return None
        time.sleep(pause)
        pause = min(0.001, pause + 0.00002)
