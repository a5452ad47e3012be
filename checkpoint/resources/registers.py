"""Registers of a thread: general ones, xstate, rseq, robust list, and what an interrupted system call needs.

Interrupted calls. A task that was stopped inside a call shows orig_rax >= 0 and rax = -512 (ERESTARTSYS),
-513 (ERESTARTNOINTR), -514 (ERESTARTNOHAND) or -516 (ERESTART_RESTARTBLOCK). The live job is not affected: its
registers go back as they were and the kernel restarts the call itself. A restored task has no restart block, so the
call is issued again: rax = number, rip back by the two bytes of `syscall`. If a caught signal is pending and
unblocked, the kernel's rule is applied instead (EINTR, except ERESTARTSYS with SA_RESTART).

Relative timeouts (-516). What the kernel tells:
- nanosleep, clock_nanosleep with a remainder pointer: the kernel wrote the remaining time there when the point was
  taken, so the call is issued again with that as its request. Exact.
- without one, and for poll and futex: the deadline is inside the kernel and nothing shows it. The call is issued
  again with its whole timeout: it may end late, by at most the time it had waited, and never early.
- epoll_wait, sigtimedwait, receives with SO_RCVTIMEO and so on begin anew even in the live job. Snap keeps their deadlines
  (kernel/timeouts.py); the image has what was left, and the restored call gets that as its deadline.
A call that was interrupted before shows number 219 (restart_syscall); its own number is found in the code before
`syscall` (mov $nr,%eax), else by the shape of its arguments, which the kernel leaves in place.

rseq. A critical section that was interrupted must be left through its abort address. Running the parasite would
make the kernel forget that, so the dump itself moves rip there, as any preemption might have.
"""

from __future__ import annotations

import struct
import time
from typing import TYPE_CHECKING

from checkpoint.kernel import interrupted, ptrace, timeouts
from checkpoint.kernel.ptrace import Regs
from checkpoint.resources import signals
from images import task_pb2
from snapshotter.base.errors import RestoreConflictError

if TYPE_CHECKING:
    from checkpoint.context import FrozenTask
    from checkpoint.kernel.mem import ProcMem
    from checkpoint.parasite import Batch, StubTask

_MASK = (1 << 64) - 1
_EINTR = 4
ERESTARTSYS, ERESTARTNOINTR, ERESTARTNOHAND, ERESTART_RESTARTBLOCK = 512, 513, 514, 516
_RESTARTS = {ERESTARTSYS, ERESTARTNOINTR, ERESTARTNOHAND, ERESTART_RESTARTBLOCK}
_SYSCALL = b"\x0f\x05"
_RSEQ_CS = struct.Struct("<IIQQQ")  # version, flags, start_ip, post_commit_offset, abort_ip
_XSTATE_BV_OFFSET, _XCR0_OFFSET = 512, 464
_XSTATE_LEGACY_BYTES = 576
_XFEATURE_XTILEDATA = 18


def signed(value: int) -> int:
    """A register as the signed number it holds."""
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


# -- dump -------------------------------------------------------------------------------------------------------


def leave_critical_section(task: FrozenTask, mem: ProcMem) -> None:
    """If the task stands in an rseq critical section, move it to the abort address. Before any infection."""
    section = int(task.facts.raw.rseq_section)
    if not section:
        return
    try:
        _, _, start, length, abort = _RSEQ_CS.unpack(mem.read(section, _RSEQ_CS.size))
    except OSError:
        return  # a stale pointer: the kernel would kill the task for it at its next preemption, not we
    if start <= task.regs.rip < start + length:
        task.regs.rip = abort
        ptrace.setregs(task.tid, task.regs)


def dump(task: FrozenTask, thread: task_pb2.Thread) -> None:
    """General registers and xstate, exactly as the kernel gives them."""
    thread.regs = bytes(task.regs)
    thread.xstate = bytes(task.facts.xstate)
    thread.in_syscall = signed(task.regs.orig_rax) >= 0
    if task.wait_left_ms:
        # The image has what is left; the registers' deadline means nothing at a restore.
        thread.regs = bytes(_without_deadline(task.regs))
        thread.has_restart_remaining = True
        seconds, milliseconds = divmod(task.wait_left_ms, 1000)
        thread.restart_remaining.sec, thread.restart_remaining.nsec = seconds, milliseconds * 1_000_000


def _without_deadline(regs: Regs) -> Regs:
    result = regs.copy()
    result.orig_rax = regs.call
    return result


def xfeatures(xstate: bytes) -> int:
    """XCR0 as the kernel noted it in the xstate header; 0 for a plain FXSAVE image."""
    return struct.unpack_from("<Q", xstate, _XCR0_OFFSET)[0] if len(xstate) >= _XSTATE_LEGACY_BYTES else 0


# -- restore ----------------------------------------------------------------------------------------------------


def restore_user_pointers(batch: Batch, thread: task_pb2.Thread) -> None:
    """Robust list, clear_child_tid, rseq: what the kernel reaches in the thread's memory (in place by now)."""
    if thread.robust_list_len:
        batch.call("set_robust_list", thread.robust_list_head, thread.robust_list_len)
    batch.call("set_tid_address", thread.clear_child_tid)
    if thread.rseq_pointer:
        batch.call("rseq", thread.rseq_pointer, thread.rseq_size, 0, thread.rseq_signature)


def final_regs(process: task_pb2.Process, thread: task_pb2.Thread, mem: ProcMem) -> Regs:
    """The registers that the restored thread starts with."""
    regs = Regs.from_bytes(thread.regs)
    call, result, inside = regs.call, -signed(regs.rax), regs.in_syscall
    regs.orig_rax = _MASK  # not in a system call: the kernel must not restart anything itself
    if not inside or result not in _RESTARTS:
        return regs
    action = signals.interrupting_handler(process, thread)
    restarts = result == ERESTARTNOINTR or (
        result == ERESTARTSYS and action is not None and action.flags & signals.SA_RESTART
    )
    if action is not None and not restarts:
        regs.rax = -_EINTR & _MASK
        return regs
    if result == ERESTART_RESTARTBLOCK or call == interrupted.NR_RESTART_SYSCALL:
        if call == interrupted.NR_RESTART_SYSCALL:
            call = interrupted.restarted_call(regs, interrupted.code_before(mem, regs.rip))
        interrupted.use_remainder(regs, call)
    regs.rax = call
    regs.rip -= len(_SYSCALL)
    return regs


def begin_remaining(thread: task_pb2.Thread) -> None:
    """Give a restored thread, about to be let go, the deadline of the call that it makes again (kernel/timeouts.py)."""
    if not thread.has_restart_remaining:
        return
    regs, was = ptrace.getregs(thread.tid), Regs.from_bytes(thread.regs)
    if regs.rax != was.call or regs.rip != was.rip - len(_SYSCALL):
        return  # a signal has ended it
    left_ms = thread.restart_remaining.sec * 1000 + thread.restart_remaining.nsec // 1_000_000
    regs.rax = timeouts.marked(was.call, left_ms, time.monotonic_ns() // 1_000_000)
    ptrace.setregs(thread.tid, regs)


def fit_xstate(xstate: bytes, size_bytes: int, where: str) -> bytes:
    """The blob in the size that this kernel and CPU use: the standard format has fixed offsets, a tail is unused.

    Raises:
        RestoreConflictError: the tail that does not fit is in use.
    """
    if len(xstate) <= size_bytes:
        return xstate.ljust(size_bytes, b"\0")
    if any(xstate[size_bytes:]):
        raise RestoreConflictError(
            f"its extended state has {len(xstate)} bytes, this CPU's {size_bytes}",
            where=where,
            hint="restore on a machine with the features of the one where the point was taken",
        )
    return xstate[:size_bytes]


def restore(process: task_pb2.Process, thread: task_pb2.Thread, stub: StubTask) -> Regs:
    """Set the xstate and return the general registers, which are set when the stub is finished."""
    if thread.xstate:
        size = len(ptrace.get_xstate(thread.tid))
        xstate = fit_xstate(thread.xstate, size, f"task {thread.tid}")
        if _in_use(xstate) >> _XFEATURE_XTILEDATA & 1:
            stub.load_xstate(xstate)
        ptrace.set_xstate(thread.tid, xstate)
    return final_regs(process, thread, stub.mem)


def _in_use(xstate: bytes) -> int:
    """The components that are not in their initial state (XSTATE_BV)."""
    return (
        struct.unpack_from("<Q", xstate, _XSTATE_BV_OFFSET)[0] if len(xstate) >= _XSTATE_LEGACY_BYTES else 0
    )
