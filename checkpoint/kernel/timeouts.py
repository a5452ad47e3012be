"""Timeouts of calls that begin anew when the call is restarted: how long they are, and when they really end.

A freeze ends epoll_wait and its like with EINTR; snap has the kernel restart them (interrupted.py), with the whole timeout. A job that is
frozen more often than the timeout would wait for ever. So the deadline must outlive the restart, and it must be certain that a later freeze
meets the same wait and not the next one with equal arguments.

The restarted call carries its deadline itself. The kernel restarts a call with all 64 bits of orig_rax in rax, and uses only
the lower 32 as the number (do_syscall_64 takes an int; so do seccomp, audit and /proc/PID/syscall). The upper half holds the deadline.
When the call returns, rax has its result: the program never sees the deadline, and a call that it makes itself has none.

Milliseconds of CLOCK_MONOTONIC, modulo 2**31 (bit 63 must stay clear: it says "not in a system call"). Timeouts of more than 12 days are left
as they are: they begin anew.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from checkpoint.kernel import sys as ksys
from checkpoint.kernel.ptrace import NOT_IN_SYSCALL
from checkpoint.kernel.syscalls import NUMBERS

if TYPE_CHECKING:
    from checkpoint.kernel.mem import ProcMem
    from checkpoint.kernel.ptrace import Regs

_SHIFT = 32
_MODULUS_MS = 1 << 31
_MOST_MS = 1 << 30
_PIDFD_THREAD = os.O_EXCL
_TIME = struct.Struct("<qq")
_MILLISECONDS = {NUMBERS["epoll_wait"]: "r10", NUMBERS["epoll_pwait"]: "r10"}
_TIMESPEC = {
    NUMBERS["epoll_pwait2"]: ("r10", 0), NUMBERS["ppoll"]: ("rdx", 0), NUMBERS["pselect6"]: ("r8", 0),
    NUMBERS["io_getevents"]: ("r8", 0), NUMBERS["io_pgetevents"]: ("r8", 0),
    NUMBERS["rt_sigtimedwait"]: ("rdx", -errno.EAGAIN), NUMBERS["semtimedop"]: ("r10", -errno.EAGAIN),
}  # fmt: skip
"""Where the timespec lies, and what the call returns when it is over."""
_SELECT, _CONNECT, _SPLICE = NUMBERS["select"], NUMBERS["connect"], NUMBERS["splice"]
_RECEIVES = frozenset(
    NUMBERS[name]
    for name in ("read", "readv", "preadv2", "recvfrom", "recvmsg", "recvmmsg", "accept", "accept4")
)
_SENDS = frozenset(
    NUMBERS[name] for name in ("write", "writev", "pwritev2", "sendto", "sendmsg", "sendmmsg", "sendfile")
)
_CONNECT_RESULTS = {
    socket.AF_INET: -errno.EINPROGRESS, socket.AF_INET6: -errno.EINPROGRESS, socket.AF_UNIX: -errno.EAGAIN,
}  # fmt: skip
"""What connect returns after SO_SNDTIMEO (inet_stream_connect, unix_stream_connect)."""


@dataclass(frozen=True, slots=True)
class Timeout:
    """Of one call."""

    length_ms: int
    """All of it, rounded up."""
    result: int
    """What the call returns when it is over."""


def timeout_of(regs: Regs, tid: int, mem: ProcMem) -> Timeout | None:
    """The timeout of a call that a stop has ended with EINTR (interrupted.restart_instead); None: it has none, or it is not to be known."""
    call = regs.call
    if call in _MILLISECONDS:
        (length_ms,) = struct.unpack("<i", struct.pack("<I", int(regs.r10) & 0xFFFFFFFF))
        return Timeout(length_ms, 0) if length_ms > 0 else None
    with contextlib.suppress(OSError, ValueError, struct.error):
        if call in _TIMESPEC:
            register, result = _TIMESPEC[call]
            return _at(mem, int(getattr(regs, register)), 1_000_000_000, result)
        if call == _SELECT:
            return _at(mem, int(regs.r8), 1_000_000, 0)
        return _of_socket(call, regs, tid)
    return None


def keep_deadline(regs: Regs, tid: int, mem: ProcMem) -> int:
    """Have a call that will be restarted (interrupted.restart_instead) end when it would have ended; what keep() returns."""
    timeout = timeout_of(regs, tid, mem)
    return keep(regs, timeout, time.monotonic_ns() // 1_000_000) if timeout else 0


def keep(regs: Regs, timeout: Timeout, now_ms: int) -> int:
    """Put the deadline into the registers of a call that will be restarted, unless it is there already.

    A call whose time is over does not restart: it returns what it returns then.

    Args:
        regs: changed.
        timeout: its.
        now_ms: CLOCK_MONOTONIC.

    Returns:
        milliseconds until the deadline; 0 when it is over, or too far away to be kept.
    """
    if timeout.length_ms >= _MOST_MS:
        return 0
    left_ms = timeout.length_ms
    if mark := int(regs.orig_rax) >> _SHIFT:
        known_ms = (mark - now_ms + _MOST_MS) % _MODULUS_MS - _MOST_MS
        # The upper half may also come from a program that leaves something there.
        if abs(known_ms) <= timeout.length_ms:
            left_ms = known_ms
    if left_ms <= 0:
        regs.rax, regs.orig_rax = timeout.result % 2**64, NOT_IN_SYSCALL
        return 0
    regs.orig_rax = marked(regs.call, left_ms, now_ms)
    return left_ms


def marked(call: int, left_ms: int, now_ms: int) -> int:
    """What rax must have for a call that is to end so soon."""
    deadline = (now_ms + left_ms) % _MODULUS_MS
    return call | (deadline or 1) << _SHIFT


def _at(mem: ProcMem, address: int, units_per_s: int, result: int) -> Timeout | None:
    if not address:
        return None
    seconds, rest = _TIME.unpack(mem.read(address, _TIME.size))
    return _made(seconds, rest, units_per_s, result)


def _made(seconds: int, rest: int, units_per_s: int, result: int) -> Timeout | None:
    length_ms = seconds * 1000 - (-rest * 1000 // units_per_s)
    return Timeout(length_ms, result) if length_ms > 0 else None


def _of_socket(call: int, regs: Regs, tid: int) -> Timeout | None:
    fd, result = int(regs.rdi) & 0xFFFFFFFF, -errno.EAGAIN
    sends = call in _SENDS or call == _CONNECT
    pidfd = ksys.pidfd_open(tid, _PIDFD_THREAD)
    try:
        if call == _SPLICE and not os.readlink(f"/proc/{tid}/fd/{fd}").startswith("socket:"):
            fd, sends = int(regs.rdx) & 0xFFFFFFFF, True
        elif call not in _RECEIVES and call != _SPLICE and not sends:
            return None
        with socket.socket(fileno=ksys.pidfd_getfd(pidfd, fd)) as its:
            if call == _CONNECT:
                if its.family not in _CONNECT_RESULTS:
                    return None
                result = _CONNECT_RESULTS[its.family]
            option = socket.SO_SNDTIMEO if sends else socket.SO_RCVTIMEO
            seconds, rest = _TIME.unpack(its.getsockopt(socket.SOL_SOCKET, option, _TIME.size))
    finally:
        os.close(pidfd)
    return _made(seconds, rest, 1_000_000, result)
