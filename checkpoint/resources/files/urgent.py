"""The out-of-band byte of a unix stream socket (MSG_OOB, Linux 5.15).

State: the byte, its place in the queue. A peek ends before it, SIOCATMARK says whether it is the next one, and POLLPRI whether
there is one at all (unix(7); net/unix/af_unix.c, manage_oob).

Refused: one in a queue that also holds descriptors or credentials in flight.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import select
import socket
from collections.abc import Iterator

from checkpoint.resources.files import sockets

_SIOCATMARK = 0x8905
_PEEK = socket.MSG_PEEK | socket.MSG_DONTWAIT


def is_pending(sock: socket.socket) -> bool:
    """Whether an out-of-band byte waits to be read."""
    state = select.poll()
    state.register(sock, select.POLLPRI)
    return any(events & select.POLLPRI for _, events in state.poll(0))


def split(sock: socket.socket, nr_bytes: int) -> tuple[bytes, bytes, bytes] | None:
    """The queue of a socket in which such a byte waits: (what comes before it, the byte, what comes after).

    Consumes nothing. None: the queue holds more than bytes.

    Args:
        sock: a stream socket.
        nr_bytes: how many bytes its queue holds, the out-of-band one included.
    """
    before = b"" if _at_mark(sock) else _peek(sock, 0, nr_bytes)
    if sock.getsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE):
        byte = _peek(sock, len(before), 1)
    else:
        byte = sock.recv(1, socket.MSG_OOB | _PEEK)
    nr_after = nr_bytes - len(before) - 1
    after = b""
    if nr_after > 0:
        # At the mark a peek passes the byte over, unless it is inline.
        passes = not before and not sock.getsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE)
        after = _peek(sock, 0 if passes else len(before) + 1, nr_after)
    return (before, byte, after) if len(byte) == 1 and len(after) == max(nr_after, 0) else None


def _at_mark(sock: socket.socket) -> bool:
    answer = array.array("i", [0])
    fcntl.ioctl(sock, _SIOCATMARK, answer, True)
    return bool(answer[0])


def _peek(sock: socket.socket, offset: int, nr_bytes: int) -> bytes:
    """What waits at an offset; nothing where something else rides on it (unix(7): ancillary messages)."""
    with _peek_offset(sock, offset) if offset else contextlib.nullcontext():
        data, _, flags, _ = sock.recvmsg(nr_bytes, 0, _PEEK)
    return b"" if flags & socket.MSG_CTRUNC else data


@contextlib.contextmanager
def _peek_offset(sock: socket.socket, offset: int) -> Iterator[None]:
    before = sock.getsockopt(socket.SOL_SOCKET, sockets.SO_PEEK_OFF)
    sock.setsockopt(socket.SOL_SOCKET, sockets.SO_PEEK_OFF, offset)
    try:
        yield
    finally:
        sock.setsockopt(socket.SOL_SOCKET, sockets.SO_PEEK_OFF, before)
