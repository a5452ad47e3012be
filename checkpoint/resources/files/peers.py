"""Who a unix socket says is at its other end (SO_PEERCRED, SO_PEERGROUPS, SO_PEERPIDFD): a server grants by it.

The kernel takes pid, user, group and groups from the task that calls socketpair(2), listen(2) or connect(2), for good. Owns that these
calls are made at a restore as they were made then: by the task with that pid where it is one of the job, else by a thread of snap's, and
always with that effective user, group and groups. Its real and saved user stay root's meanwhile (nobody else may signal or trace it), and
its capabilities too, since the sockets that it reaches are the job's own.

A peer that was made by no task that is known is shown as the overflow user, who may do nothing.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from checkpoint.kernel import proc
from checkpoint.kernel.rights import Identity, capability_sets
from checkpoint.kernel.sys import pidfd_getfd, socket_option
from checkpoint.resources.files import unixghost
from images import files_pb2
from snapshotter.base.errors import RestoreConflictError

if TYPE_CHECKING:
    from checkpoint.parasite.batch import Batch
    from checkpoint.parasite.stub import StubTask
    from checkpoint.resources.files.opening import Opening

_Result = TypeVar("_Result")
_SO_PEERGROUPS = 59
_CREDENTIALS = struct.Struct("=III")
_NOBODY = 65534
_KEEP = 0xFFFFFFFF
"""-1: leave that id as it is."""
_CLOEXEC = socket.SOCK_CLOEXEC
_PID_CHANGED = (
    "a unix socket was made by a process that is not in the job: its peer is shown with the same user and groups, but another pid "
    "(SO_PEERCRED)"
)


def dump(sock: socket.socket, image: files_pb2.UnixSocket) -> None:
    """Record what the socket says of its peer; of a listening one, of itself."""
    pid, uid, gid = _CREDENTIALS.unpack(
        sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    )
    if uid == _KEEP:  # it has none
        return
    image.peer.pid, image.peer.uid, image.peer.gid = pid, uid, gid
    raw = socket_option(sock.fileno(), socket.SOL_SOCKET, _SO_PEERGROUPS)
    image.peer.groups.extend(struct.unpack(f"={len(raw) // 4}I", raw))


def check(opening: Opening, image: files_pb2.UnixSocket) -> None:
    """Whether snap may act as who made it.

    Raises:
        RestoreConflictError: no.
    """
    own = _identity(image)
    if own == _own(opening):
        return
    try:
        opening.ctx.acting.start(own)
    except PermissionError as error:
        raise RestoreConflictError(
            f"a unix socket of the job was made by user {own.uid}, group {own.gid}, and snap may not act as these: {error.strerror}",
            where=f"socket {image.ino}",
            hint="run the rollback as root",
        ) from error


def pair(opening: Opening, image: files_pb2.UnixSocket) -> tuple[socket.socket, socket.socket]:
    """Both ends of a connection without addresses."""
    stub = _maker(opening, image)
    if stub is None:
        return _as(opening, image, lambda: socket.socketpair(socket.AF_UNIX, image.type))
    batch = stub.batch()
    made = batch.buffer(8)
    _take_on(opening, batch, _identity(image))
    batch.call("socketpair", socket.AF_UNIX, image.type | _CLOEXEC, 0, made)
    _take_back(opening, batch, _identity(image))
    numbers = struct.unpack("=ii", stub.run(batch).bytes(made))
    pidfd = os.pidfd_open(stub.pid)
    try:
        ends = [socket.socket(fileno=pidfd_getfd(pidfd, number)) for number in numbers]
    finally:
        os.close(pidfd)
    _close(stub, numbers)
    return ends[0], ends[1]


def listen(opening: Opening, sock: socket.socket, image: files_pb2.UnixSocket, backlog: int) -> None:
    """Let it listen. `image` says who is to be shown to its clients."""
    stub = _maker(opening, image)
    if stub is None:
        _as(opening, image, lambda: sock.listen(backlog))
        return
    batch = stub.batch()
    number = opening.ctx.give(batch, sock.fileno())
    _take_on(opening, batch, _identity(image))
    batch.call("listen", number, backlog)
    _take_back(opening, batch, _identity(image))
    batch.call("close", number)
    stub.run(batch)


def connect(
    opening: Opening, client: socket.socket, server: files_pb2.UnixSocket, image: files_pb2.UnixSocket
) -> None:
    """Connect to a socket of the job's that listens under the address of `server`. `image` says who is to be shown to it."""
    stub = _maker(opening, image)
    if stub is None:
        _as(opening, image, lambda: unixghost.reach(opening, server, client.connect))
        return
    batch = stub.batch()
    given = [opening.ctx.give(batch, client.fileno())]
    with unixghost.held(opening, server) as node:
        if node >= 0:
            given.append(opening.ctx.give(batch, node))
        results = stub.run(batch)
    numbers = [results[one] for one in given]
    path = b"/proc/self/fd/%d" % numbers[1] if len(numbers) > 1 else server.address
    address = struct.pack("=H", socket.AF_UNIX) + path + (b"" if path.startswith(b"\0") else b"\0")
    batch = stub.batch()
    _take_on(opening, batch, _identity(image))
    batch.call("connect", numbers[0], address, len(address))
    _take_back(opening, batch, _identity(image))
    stub.run(batch)
    _close(stub, numbers)


def _close(stub: StubTask, numbers: tuple[int, ...] | list[int]) -> None:
    batch = stub.batch()
    for number in numbers:
        batch.call("close", number)
    stub.run(batch)


def _identity(image: files_pb2.UnixSocket) -> Identity:
    if not image.HasField("peer") or _KEEP in {image.peer.uid, image.peer.gid}:
        return Identity(_NOBODY, _NOBODY)
    return Identity(image.peer.uid, image.peer.gid, tuple(sorted(image.peer.groups)))


def _own(opening: Opening) -> Identity:
    own = opening.ctx.acting.own
    return Identity(own.uid, own.gid, own.groups)


def _maker(opening: Opening, image: files_pb2.UnixSocket) -> StubTask | None:
    stub: StubTask | None = opening.ctx.stubs.get(image.peer.pid) if image.HasField("peer") else None
    if stub is None and image.peer.pid:
        opening.warn(_PID_CHANGED)
    return stub


def _as(opening: Opening, image: files_pb2.UnixSocket, work: Callable[[], _Result]) -> _Result:
    own = _identity(image)
    return work() if own == _own(opening) else opening.ctx.acting.run(own, work)


def _take_on(opening: Opening, batch: Batch, identity: Identity) -> None:
    if identity != _own(opening):
        _become(batch, identity)


def _take_back(opening: Opening, batch: Batch, identity: Identity) -> None:
    if identity != _own(opening):
        _become(batch, _own(opening))


def _become(batch: Batch, identity: Identity) -> None:
    """A stub's, whose real and saved ids are snap's, as its capabilities are."""
    batch.call(
        "setgroups", len(identity.groups), struct.pack(f"={len(identity.groups)}I", *identity.groups) or 0
    )
    batch.call("setresgid", _KEEP, identity.gid, _KEEP)
    batch.call("setresuid", _KEEP, identity.uid, _KEEP)
    batch.call("capset", *capability_sets(proc.read_status(os.getpid())))
