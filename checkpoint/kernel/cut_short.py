"""System calls that an interruption ends with a part of their work done: which call it was, and what is left of it.

A blocking write to a pipe, a terminal or a stream socket returns only when all is written, unless a signal with a handler comes;
the same holds for receives with MSG_WAITALL, for sendfile to a stream socket, and for reads of the kernel's random numbers. A freeze is
seen by them as a signal, and ends them with a short count. `rest_of` says which calls transfer what is left.

A recvmmsg that is cut short is not completed; the error that the stop leaves on its socket is cleared (`clear_error`).

Owns that knowledge and the reading of iovecs; carrying it out is the attendant's (parasite/attending.py).
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from checkpoint.kernel import sys as ksys
from checkpoint.kernel.fdinfo import parse_fdinfo
from checkpoint.kernel.syscalls import NAMES, NUMBERS
from snapshotter.base.errors import SnapshotterError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from checkpoint.kernel.mem import ProcMem
    from checkpoint.kernel.ptrace import Regs

_WRITE, _SENDTO, _RECVFROM, _READ, _SENDFILE, _GETRANDOM = (
    NUMBERS[name] for name in ("write", "sendto", "recvfrom", "read", "sendfile", "getrandom")
)
_WRITEV, _SENDMSG, _RECVMSG, _PWRITEV2 = (
    NUMBERS[name] for name in ("writev", "sendmsg", "recvmsg", "pwritev2")
)
_CALLS = frozenset(
    {_WRITE, _SENDTO, _RECVFROM, _READ, _SENDFILE, _GETRANDOM, _WRITEV, _SENDMSG, _RECVMSG, _PWRITEV2}
)
_RECVMMSG = NUMBERS["recvmmsg"]
_MSG_WAITFORONE = 0x10000
_PIDFD_THREAD = os.O_EXCL
_MSG_DONTWAIT, _MSG_WAITALL, _MSG_PEEK, _MSG_NOSIGNAL = 0x40, 0x100, 0x2, 0x4000
_GRND_NONBLOCK = 1
_IOV_MAX = 1024
_NONE = 6
_TERMINALS = frozenset({4, 5, *range(136, 144), 188, 204})
"""Major numbers: consoles, /dev/tty, pseudo terminals, serial lines."""
_ENDLESS = frozenset({(1, 5), (1, 8), (1, 9)})
"""/dev/zero, random, urandom."""
_SYSCALL = b"\x0f\x05"
_INTERRUPTED = frozenset({0, errno.EINTR, *range(512, 517)})
"""Errors that say that a call was interrupted: EINTR, and those that the kernel uses inside (ERESTARTSYS and its like). 0: none."""


@dataclass(frozen=True, slots=True)
class Rest:
    """What is left of a call."""

    cut: int
    """The number of the call that was cut short."""
    done: int
    """What it has returned."""
    wanted: int
    """What it was to transfer."""
    descriptor: int
    """Between our process and what; -1: none."""
    nr: int
    """The call that transfers a piece."""
    args: tuple[int, int, int, int, int, int]
    address_arg: int
    """Which of them is a piece's address; 6: none."""
    length_arg: int
    pieces: tuple[tuple[int, int], ...]
    """(address, length)."""

    def __str__(self) -> str:
        where = f" on descriptor {self.descriptor}" if self.descriptor >= 0 else ""
        return f"{NAMES[self.cut]} of {self.wanted:,} bytes{where}"


def may_be_cut(regs: Regs) -> bool:
    """Whether the registers of a stopped task show a count that may be a short one. Reads nothing."""
    return regs.in_syscall and regs.call in _CALLS and 0 < int(regs.rax) < 2**63


def clear_error(regs: Regs, tid: int) -> str:
    """Clear the error that a stop has left on a socket from which a stopped task was receiving several messages.

    A recvmmsg that is interrupted after its first message returns the messages so far, and keeps the error for the next call on
    the socket (do_recvmmsg, net/socket.c). That error is ERESTARTSYS (512), which no program knows.

    Reading the error is the only way to clear it, and it cannot be put back.

    Returns:
        what to tell the user when it was another error; mostly "".
    """
    if not regs.in_syscall or regs.call != _RECVMMSG or not 0 < int(regs.rax) < int(regs.rdx) & 0xFFFFFFFF:
        return ""
    if int(regs.r10) & (_MSG_DONTWAIT | _MSG_WAITFORONE):
        return ""  # it did not wait any more
    fd, error = int(regs.rdi) & 0xFFFFFFFF, 0
    with contextlib.suppress(OSError, SnapshotterError):
        pidfd = ksys.pidfd_open(tid, _PIDFD_THREAD)
        try:
            with socket.socket(fileno=ksys.pidfd_getfd(pidfd, fd)) as its:
                error = its.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        finally:
            os.close(pidfd)
    if error in _INTERRUPTED:
        return ""
    return (
        f"task {tid}: an error of the socket at descriptor {fd} is not reported to it: {os.strerror(error)}"
    )


def rest_of(regs: Regs, tid: int, mem: ProcMem) -> Rest | None:
    """What is left of the call that a stopped task was in; None: nothing, or it is not one that waits until all is done."""
    if not may_be_cut(regs):
        return None
    with contextlib.suppress(OSError, ValueError, struct.error):
        if mem.read(int(regs.rip) - len(_SYSCALL), len(_SYSCALL)) == _SYSCALL:
            return _rest(regs, tid, mem)
    return None


def _rest(regs: Regs, tid: int, mem: ProcMem) -> Rest | None:
    cut, done = regs.call, int(regs.rax)
    fd, second, third, fourth = (int(regs.rdi), int(regs.rsi), int(regs.rdx), int(regs.r10))
    fd &= 0xFFFFFFFF
    if cut == _GETRANDOM:
        if third & _GRND_NONBLOCK:
            return None
        return _make(cut, done, -1, [(int(regs.rdi), second)], _GETRANDOM, (0, 0, third), 0, 1)
    kind = _kind(tid, fd)
    if cut == _READ:
        return _make(cut, done, fd, [(second, third)], _READ, (fd,)) if kind == "endless" else None
    if kind not in {"stream", "socket"}:
        return None
    if cut == _SENDFILE:
        if kind != "socket":
            return None  # a pipe takes what it has room for
        # The kernel has moved the offset on, the file's or the one that rsi points to.
        return _make(cut, done, fd, [(0, fourth)], _SENDFILE, (fd, second, third), _NONE, 3)
    flags = 0
    if cut in {_WRITE, _SENDTO, _RECVFROM}:
        buffers = [(second, third)]
        flags = 0 if cut == _WRITE else fourth
    elif cut in {_WRITEV, _PWRITEV2}:
        buffers = _vector(mem, second, third)
    else:
        at, count = struct.unpack("<QQ", mem.read(second + 16, 16))  # msg_iov, msg_iovlen
        buffers = _vector(mem, at, count)
        flags = third
    if flags & (_MSG_DONTWAIT | _MSG_PEEK):
        return None
    if cut in {_RECVFROM, _RECVMSG}:
        if not flags & _MSG_WAITALL:
            return None
        return _make(cut, done, fd, buffers, _RECVFROM, (fd, 0, 0, _MSG_WAITALL))
    if kind == "socket":
        # A peer that has gone is for the next call of the program to find out, as it is after a short count.
        return _make(cut, done, fd, buffers, _SENDTO, (fd, 0, 0, flags | _MSG_NOSIGNAL))
    return _make(cut, done, fd, buffers, _WRITE, (fd,))


def _make(
    cut: int, done: int, fd: int, buffers: Sequence[tuple[int, int]], nr: int, args: tuple[int, ...],
    address_arg: int = 1, length_arg: int = 2,
) -> Rest | None:  # fmt: skip
    wanted, skip = sum(length for _, length in buffers), done
    pieces = []
    for address, length in buffers:
        passed = min(skip, length)
        skip -= passed
        if length > passed:
            pieces.append((address + passed, length - passed))
    if not pieces:
        return None
    one, two, three, four, five, six = (*args, *[0] * (6 - len(args)))
    return Rest(
        cut, done, wanted, fd, nr, (one, two, three, four, five, six), address_arg, length_arg, tuple(pieces)
    )


def _vector(mem: ProcMem, at: int, count: int) -> list[tuple[int, int]]:
    if count > _IOV_MAX:
        raise ValueError(count)
    return list(struct.iter_unpack("<QQ", mem.read(at, 16 * count)))


def _kind(tid: int, fd: int) -> str:
    """What a descriptor of a task leads to: "stream" (pipe, terminal), "socket", "endless"; "": none that waits for the whole."""
    with open(f"/proc/{tid}/fdinfo/{fd}", "rb") as file:
        if parse_fdinfo(file.read()).flags & os.O_NONBLOCK:
            return ""
    found = os.stat(f"/proc/{tid}/fd/{fd}")
    if stat.S_ISSOCK(found.st_mode):
        return "socket"
    if stat.S_ISFIFO(found.st_mode):
        return "stream"
    if stat.S_ISCHR(found.st_mode):
        major, minor = os.major(found.st_rdev), os.minor(found.st_rdev)
        return "stream" if major in _TERMINALS else "endless" if (major, minor) in _ENDLESS else ""
    return ""
