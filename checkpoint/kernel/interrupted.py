"""System calls that were interrupted: which call it was, and how to make it again without its restart block.

A stopped task shows them as orig_rax >= 0 with a restart code in rax. While its own registers go back to it, the
kernel restarts the call. Where that is not so (a restored task; a task that returns through rt_sigreturn, which
clears the restart block) the call must be issued again: `resumable` gives the registers for that.

Some calls are not restarted by the kernel even when nothing but a stop interrupted them (signal(7), "Interruption of
system calls and library functions by stop signals"). A job must not notice that it was stopped: `restart_instead`.
"""

from __future__ import annotations

import errno
import struct
from typing import TYPE_CHECKING

from checkpoint.kernel.ptrace import NOT_IN_SYSCALL
from checkpoint.kernel.syscalls import NUMBERS

if TYPE_CHECKING:
    from checkpoint.kernel.mem import ProcMem
    from checkpoint.kernel.ptrace import Regs

NR_POLL, NR_NANOSLEEP, NR_FUTEX, NR_RESTART_SYSCALL, NR_CLOCK_NANOSLEEP = 7, 35, 202, 219, 230
ERESTART_RESTARTBLOCK = 516
_RESTARTABLE = {NR_POLL, NR_NANOSLEEP, NR_FUTEX, NR_CLOCK_NANOSLEEP}
_ERESTARTNOHAND = 514
_ENDED_BY_STOPS = frozenset(
    NUMBERS[name]
    for name in (
        "epoll_wait", "epoll_pwait", "epoll_pwait2", "rt_sigtimedwait", "semop", "semtimedop", "io_getevents",
        "io_pgetevents", "io_uring_enter", "read", "readv", "preadv2", "write", "writev", "pwritev2", "recvfrom", "recvmsg",
        "recvmmsg", "sendto", "sendmsg", "sendmmsg", "accept", "accept4", "connect", "sendfile", "splice", "select",
        "pselect6", "ppoll",
    )
)  # fmt: skip
"""Waits that fail with EINTR before they did anything.

Those on sockets do so where there is a SO_RCVTIMEO or SO_SNDTIMEO (sock_intr_errno). select, pselect6 and ppoll do where the kernel
cannot write the remaining time back: it lies in read-only memory, or the personality has STICKY_TIMEOUTS
(poll_select_finish). A connect that is made again goes on waiting for the same connection.
"""
_TIMER_ABSTIME = 1
_FUTEX_FLAGS = 128 | 256  # FUTEX_PRIVATE_FLAG, FUTEX_CLOCK_REALTIME
_SYSCALL = b"\x0f\x05"
_MOV_EAX = 0xB8
_MIN_POINTER = 65536
_MAX_NFDS = 1 << 20


def restart_instead(regs: Regs) -> bool:
    """Make the kernel restart a call that it would end with EINTR for our stop alone; True: `regs` were changed.

    A signal with a handler that is pending still ends the call with EINTR, as it would have without us. A timeout starts
    anew, unless its deadline is kept (timeouts.py).
    """
    if not regs.in_syscall or regs.call not in _ENDED_BY_STOPS or regs.rax != 2**64 - errno.EINTR:
        return False
    regs.rax = 2**64 - _ERESTARTNOHAND
    return True


def resumable(regs: Regs, mem: ProcMem) -> Regs:
    """Registers with which user space can be entered directly: an interrupted call is issued again."""
    result = regs.copy()
    result.orig_rax = NOT_IN_SYSCALL
    if not regs.wants_restart:
        return result
    call = regs.call
    if regs.rax == 2**64 - ERESTART_RESTARTBLOCK or call == NR_RESTART_SYSCALL:
        if call == NR_RESTART_SYSCALL:
            call = restarted_call(regs, code_before(mem, regs.rip))
        use_remainder(result, call)
        result.rax = call
    else:
        result.rax = regs.orig_rax  # a deadline in the upper half stays
    result.rip -= len(_SYSCALL)
    return result


def restarted_call(regs: Regs, code: bytes) -> int:
    """The number of the call that restart_syscall stands for; `code` are the bytes before the return address."""
    if code.endswith(_SYSCALL) and len(code) >= 7 and code[-7] == _MOV_EAX:
        (number,) = struct.unpack("<I", code[-6:-2])
        if number in _RESTARTABLE:
            return int(number)
    if regs.rdi < _MIN_POINTER or regs.rdi >> 63:
        if regs.rdx >= _MIN_POINTER:
            return NR_CLOCK_NANOSLEEP  # a clock id and a request
        return NR_POLL  # no array, 0 entries
    if (
        regs.rsi & ~_FUTEX_FLAGS in {0, 9, 11}
        and regs.rsi < 512
        and regs.r10 >= _MIN_POINTER
        and not regs.rdi & 3
    ):
        return NR_FUTEX  # FUTEX_WAIT, FUTEX_WAIT_BITSET with a timeout
    if 0 < regs.rsi < _MAX_NFDS:
        return NR_POLL
    return NR_NANOSLEEP


def use_remainder(regs: Regs, call: int) -> None:
    """Sleep only what was left, where the kernel wrote that down."""
    if call == NR_NANOSLEEP and regs.rsi:
        regs.rdi = regs.rsi
    elif call == NR_CLOCK_NANOSLEEP and regs.r10 and not regs.rsi & _TIMER_ABSTIME:
        regs.rdx = regs.r10


def code_before(mem: ProcMem, rip: int) -> bytes:
    try:
        return mem.read(rip - 16, 16)
    except OSError:
        return b""
