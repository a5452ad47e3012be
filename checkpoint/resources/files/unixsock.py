"""Unix sockets: pairs, bound and listening ones, what is queued in them, descriptors in flight.

State: type, address, peer, shutdown, options, and the queue of bytes or messages that the socket has
not read yet, with the descriptors that they carry (SCM_RIGHTS). The queue is copied without consuming
it: MSG_PEEK, and SO_PEEK_OFF only where one peek does not show everything (messages, descriptors, senders).

Restore: both ends of a connection are made as a socketpair, or through a listening socket where one end
has the listener's address; each queue is refilled from the other end; an end that the job no longer has
is closed afterwards, so that the survivor reads its rest and then end-of-file.

Known limit: the kernel shows an empty datagram to the first peek only (skb->peeked), unless it is the first of the
queue and the peek is without offset. One that waits behind others is therefore lost to a second point taken meanwhile, and the
first point warns of that. The start of a message with descriptors in a stream
cannot be told either: they are put back on its last byte, and a warning says so.

An address whose node is gone, or is somebody else's by now, is bound where nobody sees it (unixghost.py).

Refused: a peer outside the job, connections waiting to be accepted, relative addresses through links, sockets of
another network namespace.
"""

from __future__ import annotations

import array
import contextlib
import functools
import itertools
import os
import socket
import stat
import struct
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from checkpoint.kernel import distant, sockdiag
from checkpoint.resources import paths, proof
from checkpoint.resources.files import kind, outside, peers, socketowner, sockets, unixghost, unixnode, urgent
from images import common_pb2, files_pb2
from snapshotter.base.errors import (
    Finding,
    RestoreConflictError,
    SnapshotterError,
    UnsupportedError,
    wrap_os_error,
)

if TYPE_CHECKING:
    from checkpoint.resources.files.dumping import FilesDump
    from checkpoint.resources.files.kind import Seen
    from checkpoint.resources.files.looking import Looking
    from checkpoint.resources.files.opening import Opening

_RIGHTS_MAX = 253
_ANCILLARY_BYTES = socket.CMSG_SPACE(_RIGHTS_MAX * 4) + socket.CMSG_SPACE(12) + socket.CMSG_SPACE(256)
_MESSAGE_MAX_BYTES = 8 << 20
_PEEK = socket.MSG_PEEK | socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
_FILL_SNDBUF_BYTES = 1 << 30
_CREDENTIALS = struct.Struct("=iII")
_TMPFS_MAGIC = 0x01021994
_ENTRIES_MAX = 4096
"""Of a directory that is searched for a node while the job stands still."""


class UnixKind(kind.Kind):
    field = "unix"

    def claims(self, seen: Seen) -> bool:
        return seen.link.startswith(b"socket:") and sockets.protocol_name(seen.pid, seen.fd).startswith(
            "UNIX"
        )

    def refusal(self, seen: Seen) -> Finding | None:
        return sockets.look(seen)

    def look(self, seen: Seen, looking: Looking) -> Finding | None:
        if seen.stat.st_ino not in looking.sockets:
            return None  # made since they were listed; `refusal` finds those of another network namespace
        info = _info_of(seen, looking.sockets)
        if info.name:
            self._bound(seen, info, files_pb2.UnixSocket(address=_name(info.name)))
        return None

    def dump(self, job: FilesDump, seen: Seen, description: files_pb2.Description) -> None:
        info = _info_of(seen, job.sockets)
        image = description.unix
        image.ino, image.peer_ino, image.type, image.state = info.ino, info.peer, info.type, info.state
        image.shutdown = info.shutdown
        image.uid, image.gid = seen.stat.st_uid, seen.stat.st_gid
        image.mode = stat.S_IMODE(seen.stat.st_mode)
        image.backlog = info.wqueue if info.state == sockdiag.STATE_LISTEN else 0
        if info.name:
            image.address, image.node_ino = _name(info.name), info.vfs_ino
            self._bound(seen, info, image)
        with job.borrow(seen) as fd, sockets.borrowed_socket(fd) as sock:
            image.orphan = info.type == socket.SOCK_DGRAM and not info.peer and _has_peer(sock)
            peers.dump(sock, image)
            socketowner.dump(seen, image)
            changed = sockets.changed_options(sock, sockets.GENERIC_OPTIONS)
            for level, name, value in (*changed, *sockets.dump_filter(sock, seen)):
                image.options.add(level=level, name=name, value=value)

    @staticmethod
    def _bound(seen: Seen, info: sockdiag.UnixSocketInfo, image: files_pb2.UnixSocket) -> None:
        if image.address.startswith(b"\0"):
            return
        try:
            folder, name = os.path.split(image.address)
            if not folder.startswith(b"/"):
                cwd = b"/proc/%d/cwd" % seen.pid
                folder = os.path.join(
                    distant.realpath(os.readlink(cwd)) if distant.is_distant(os.readlink(cwd)) else cwd,
                    folder,
                )
            folder = distant.realpath(folder)
            path = os.path.join(folder, name)
            node = _node_at(info, path)
            if node is None and image.address.startswith(b"/"):
                path = _renamed(info, folder)
                node = distant.lstat(path) if path else None
        except OSError:
            return
        if node is None:
            return
        if not image.address.startswith(b"/") and not path.endswith(b"/" + image.address):
            raise _unsupported(
                seen,
                f"is bound to a relative path that leads through links ({paths.shown(image.address)})",
                "let the program bind it under an absolute path",
            )
        image.uid, image.gid = node.st_uid, node.st_gid
        image.bound.CopyFrom(
            common_pb2.FileIdentity(
                path=path,
                dev=node.st_dev,
                ino=node.st_ino,
                mode=node.st_mode,
                mtime_ns=node.st_mtime_ns,
            )
        )
        proof.record(image.bound, node, path)
        image.origin = proof.origin(path, node)

    def finish(self, job: FilesDump, seen: Seen, description: files_pb2.Description) -> None:
        image = description.unix
        info = job.sockets[image.ino]
        if image.peer_ino and not any(
            job.image.descriptions[n - 1].HasField("unix")
            for n in job.by_inode.get((seen.stat.st_dev, image.peer_ino), [])
        ):
            finding = outside.outside_peer(seen, job.sockets.get(image.peer_ino), job.ctx.processes)
            raise UnsupportedError(
                finding.what,
                where=f"task {seen.pid}, {finding.where}",
                hint=finding.hint,
                findings=(finding,),
            )
        if image.state == sockdiag.STATE_LISTEN:
            return
        with job.borrow(seen) as fd, sockets.borrowed_socket(fd) as sock:
            if image.type == socket.SOCK_STREAM and info.rqueue and urgent.is_pending(sock):
                _queue_with_urgent(sock, info, seen, image)
                return
            for data, rights, credentials, address in _queue(job, sock, info, seen):
                kept = [job.keep(right) for right in rights]
                image.queue.add(
                    data=data,
                    descriptions=[job.describe(right) for right in kept],
                    credentials=credentials,
                    address=address,
                )

    def check(self, opening: Opening, description: files_pb2.Description) -> None:
        """The address must be free, or held by the living job that is to be replaced."""
        image = description.unix
        if image.address and image.state != sockdiag.STATE_ESTABLISHED:
            links = {
                b"socket:[%d]" % info.ino
                for info in _holders(image, opening.unix_now.values())
                if info.state != sockdiag.STATE_ESTABLISHED
            }
            for found in (outside.holders(links, opening.ctx.processes) if links else {}).values():
                raise RestoreConflictError(
                    f"process {found[0].pid} ({found[0].comm}) serves the address of the job's socket",
                    where=paths.shown(image.address),
                    hint="end it",
                )
        peers.check(opening, image)
        socketowner.check(image)
        if image.HasField("bound"):
            unixnode.check(opening, image)

    def open(self, opening: Opening, description: files_pb2.Description) -> int:
        image = description.unix
        peer = opening.unix_by_ino.get(image.peer_ino) if image.peer_ino else None
        with_peer = image.orphan or (
            image.state == sockdiag.STATE_ESTABLISHED
            and (image.type != socket.SOCK_DGRAM or (peer is not None and _is_pair(image, peer.unix)))
        )
        if with_peer:
            mine, other = _connected(opening, image, peer.unix if peer else None)
            socketowner.give(mine, image)
            if peer is None:
                opening.far_ends[description.id] = other
            else:
                socketowner.give(other, peer.unix)
                opening.fds[peer.id] = other
            return mine
        sock = socket.socket(socket.AF_UNIX, image.type)
        if image.address:
            unixghost.bind(opening, sock, image)
        if image.state == sockdiag.STATE_LISTEN:
            peers.listen(opening, sock, image, image.backlog)
        socketowner.give(sock.fileno(), image)
        return sock.detach()

    def fill(self, opening: Opening, description: files_pb2.Description, fd: int) -> None:
        image = description.unix
        with sockets.borrowed_socket(fd) as sock:
            options = (o for o in image.options if o.name not in sockets.LATE)
            sockets.apply_options(sock, options, opening.warn)
            if image.queue:
                self._refill(opening, description, sock)

    def _refill(self, opening: Opening, description: files_pb2.Description, sock: socket.socket) -> None:
        image = description.unix
        peer = opening.unix_by_ino.get(image.peer_ino)
        far = opening.far_ends.get(description.id)
        if far is None and peer is not None and _is_pair(image, peer.unix):
            far = opening.fds[peer.id]
        if far is not None:
            with socket.socket(fileno=os.dup(far)) as sender, _roomy(sender):
                for message in image.queue:
                    _send(opening, sender, message)
            return
        for message in image.queue:
            with _sender_at(opening, image.type, message.address) as sender, _roomy(sender):
                send = functools.partial(_send, opening, sender, message)
                if image.address:
                    unixghost.reach(opening, image, send)
                else:
                    send(sock.getsockname())

    def settle(self, opening: Opening, description: files_pb2.Description, fd: int) -> None:
        """Last pass, once all queues are full: one-way connections, shutdown, SO_PEEK_OFF, filters."""
        image = description.unix
        far = opening.far_ends.pop(description.id, None)
        with sockets.borrowed_socket(fd) as sock:
            if far is not None:
                os.close(far)
            elif image.shutdown and image.state == sockdiag.STATE_ESTABLISHED:
                sock.shutdown({1: socket.SHUT_RD, 2: socket.SHUT_WR, 3: socket.SHUT_RDWR}[image.shutdown & 3])
            if image.type == socket.SOCK_DGRAM and image.peer_ino:
                peer = opening.unix_by_ino[image.peer_ino]
                if not _is_pair(image, peer.unix):
                    unixghost.reach(opening, peer.unix, sock.connect)
            options = (o for o in image.options if o.name in sockets.LATE)
            sockets.apply_options(sock, sorted(options, key=lambda o: o.name), opening.warn)


def _info_of(seen: Seen, known: Mapping[int, sockdiag.UnixSocketInfo]) -> sockdiag.UnixSocketInfo:
    """What the kernel lists of a socket; UnsupportedError where that shows that it cannot be dumped."""
    info = known.get(seen.stat.st_ino)
    if info is None:
        what = "is a unix socket of another network namespace"
        raise _unsupported(seen, what, "run snap in that namespace")
    if info.state == sockdiag.STATE_LISTEN and info.rqueue:
        what = f"has {info.rqueue} connections that were not accepted yet"
        raise _unsupported(seen, what, "take the point a moment later")
    return info


def _is_pair(image: files_pb2.UnixSocket, peer: files_pb2.UnixSocket) -> bool:
    """Whether two sockets are connected to each other; a datagram socket may be connected to itself, too."""
    return peer.peer_ino == image.ino != peer.ino


def _name(name: bytes) -> bytes:
    """An address without the NUL that ends a path; in an abstract one every byte counts."""
    return name if name.startswith(b"\0") else name.rstrip(b"\0")


def _holders(
    image: files_pb2.UnixSocket, others: Iterable[sockdiag.UnixSocketInfo]
) -> Iterator[sockdiag.UnixSocketInfo]:
    """Sockets that hold the place of the job's: its abstract address, or their node is where its is to be.

    An address in the file system says nothing by itself: a relative one leads elsewhere from elsewhere, and one that was
    unlinked leads nowhere.
    """
    if not unixnode.has_path(image):
        yield from (info for info in others if info.name == image.address)
    elif image.HasField("bound"):
        path = image.bound.path
        with contextlib.suppress(OSError):
            node = distant.lstat(path)
            yield from (info for info in others if info.name and _is_node(info, node, path))


def _node_at(info: sockdiag.UnixSocketInfo, path: bytes) -> os.stat_result | None:
    """What is at a path, if it is the socket's node."""
    try:
        node = distant.lstat(path)
    except FileNotFoundError:
        return None
    return node if _is_node(info, node, path) else None


def _renamed(info: sockdiag.UnixSocketInfo, folder: bytes) -> bytes:
    """Where the node of a socket is that was bound under another name in this directory (Java's attach socket); b"": not here."""
    device = os.makedev(info.vfs_dev >> 20, info.vfs_dev & 0xFFFFF)
    if distant.is_distant(folder) or os.lstat(folder).st_dev != device:
        return b""
    with os.scandir(folder) as entries:
        for entry in itertools.islice(entries, _ENTRIES_MAX):
            if entry.inode() & 0xFFFFFFFF == info.vfs_ino and stat.S_ISSOCK(
                entry.stat(follow_symlinks=False).st_mode
            ):
                return entry.path
    return b""


def _is_node(info: sockdiag.UnixSocketInfo, node: os.stat_result, path: bytes) -> bool:
    """Whether what is at a socket's address is its node. Numbers of inodes come again in each file system, small ones above
    all in the hidden ones of unixghost.py; only on a tmpfs is st_dev always the number that the kernel shows.
    """
    if node.st_ino & 0xFFFFFFFF != info.vfs_ino or not stat.S_ISSOCK(node.st_mode):
        return False
    device = os.makedev(info.vfs_dev >> 20, info.vfs_dev & 0xFFFFF)
    return node.st_dev == device or distant.filesystem_type(os.path.dirname(path)) != _TMPFS_MAGIC


def _has_peer(sock: socket.socket) -> bool:
    try:
        sock.getpeername()
    except OSError:
        return False
    return True


def _unsupported(seen: Seen, what: str, hint: str) -> UnsupportedError:
    finding = Finding(seen.pid, seen.where, what, hint)
    return UnsupportedError(what, where=f"task {seen.pid}, {seen.where}", hint=hint, findings=(finding,))


def _receive(sock: socket.socket, nr_bytes: int) -> tuple[bytes, list[int], bytes, bytes]:
    """One peek: data, descriptors (ours now), credentials, sender's address."""
    data, ancillary, flags, address = sock.recvmsg(nr_bytes, _ANCILLARY_BYTES, _PEEK)
    rights = array.array("i")
    credentials = b""
    for level, name, value in ancillary:
        if level == socket.SOL_SOCKET and name == socket.SCM_RIGHTS:
            rights.frombytes(value[: len(value) - len(value) % rights.itemsize])
        elif level == socket.SOL_SOCKET and name == socket.SCM_CREDENTIALS:
            credentials = value
    if flags & (socket.MSG_CTRUNC | socket.MSG_TRUNC):
        _close(rights)
        raise SnapshotterError("a queued message could not be read whole", where="unix socket")
    text = os.fsencode(address) if isinstance(address, (str, bytes)) else b""
    return data, list(rights), credentials, text


def _close(fds: list[int] | array.array[int]) -> None:
    for fd in fds:
        distant.close(fd)


def _queue(
    job: FilesDump, sock: socket.socket, info: sockdiag.UnixSocketInfo, seen: Seen
) -> Iterator[tuple[bytes, list[int], bytes, bytes]]:
    """What waits in a socket, unconsumed. Leaves SO_PEEK_OFF as it was."""
    stream = info.type == socket.SOCK_STREAM
    if info.type != socket.SOCK_DGRAM and not info.rqueue:
        return
    if stream:
        data, rights, credentials, _ = _receive(sock, info.rqueue)
        if len(data) == info.rqueue and not rights and not credentials:
            yield data, [], b"", b""
            return
        _close(rights)
    before = sock.getsockopt(socket.SOL_SOCKET, sockets.SO_PEEK_OFF)
    left = info.rqueue
    behind = False
    try:
        if info.type == socket.SOCK_DGRAM and not info.shutdown & 1:
            sock.setsockopt(socket.SOL_SOCKET, sockets.SO_PEEK_OFF, -1)
            with contextlib.suppress(BlockingIOError):
                found = _receive(sock, _MESSAGE_MAX_BYTES)
                if not found[0] and not found[1]:
                    yield found
                    behind = True
                _close(found[1])
        sock.setsockopt(socket.SOL_SOCKET, sockets.SO_PEEK_OFF, 0)
        while left or info.type == socket.SOCK_DGRAM:
            try:
                found = _receive(sock, left if stream else _MESSAGE_MAX_BYTES)
            except BlockingIOError:
                break
            data, rights, credentials, address = found
            if not data and not rights and (stream or info.shutdown & 1):
                break
            left -= len(data)
            if behind and not data and not rights:
                job.ctx.warn(
                    f"task {seen.pid}, {seen.where}: an empty datagram waits behind others; a further point that is "
                    "taken while it does will not have it"
                )
            behind = True
            if stream and rights and len(data) > 1:
                # A peek of any length runs on into the piece that carries descriptors and stops behind it, so
                # that the start of that piece cannot be told; its end can.
                job.ctx.warn(
                    f"task {seen.pid}, {seen.where}: descriptors in flight ride on the last byte of their message"
                )
                yield data[:-1], [], credentials, b""
                data = data[-1:]
            yield data, rights, credentials, address
    finally:
        sock.setsockopt(socket.SOL_SOCKET, sockets.SO_PEEK_OFF, before)
    if left and info.type != socket.SOCK_DGRAM:
        raise SnapshotterError(
            f"{left} bytes queued in a unix socket could not be read", where=f"task {seen.pid}"
        )


def _queue_with_urgent(
    sock: socket.socket, info: sockdiag.UnixSocketInfo, seen: Seen, image: files_pb2.UnixSocket
) -> None:
    parts = urgent.split(sock, info.rqueue)
    if parts is None:
        raise _unsupported(
            seen,
            "has an out-of-band byte (MSG_OOB) in a queue that also holds descriptors or credentials",
            "take the point when the program has read them",
        )
    for data, is_urgent in zip(parts, (False, True, False), strict=True):
        if data:
            image.queue.add(data=data, urgent=is_urgent)


@contextlib.contextmanager
def _roomy(sender: socket.socket) -> Iterator[None]:
    """A socket with a send buffer for whatever a queue holds."""
    before = sender.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
    sender.setsockopt(socket.SOL_SOCKET, sockets.SO_SNDBUFFORCE, _FILL_SNDBUF_BYTES)
    try:
        yield
    finally:
        sender.setsockopt(socket.SOL_SOCKET, sockets.SO_SNDBUFFORCE, before // 2)


def _sender_at(opening: Opening, kind: int, address: bytes) -> socket.socket:
    """A socket with the address that a queued datagram came from: the job's own, if it still has it."""
    for description in opening.descriptions.values():
        unix = description.unix if description.HasField("unix") else None
        if unix is not None and address and unix.address == address and unix.type == kind:
            return socket.socket(fileno=os.dup(opening.fds[description.id]))
    sock = socket.socket(socket.AF_UNIX, kind)
    if address:
        try:
            if not address.startswith(b"\0"):
                raise FileNotFoundError(0, "its sender's node is gone")
            sock.bind(address)
        except OSError as error:
            opening.warn(
                f"a datagram in a unix socket's queue loses its sender's address {paths.shown(address)}: {error.strerror}"
            )
    return sock


def _send(
    opening: Opening, sender: socket.socket, message: files_pb2.QueuedMessage, to: str | bytes | None = None
) -> None:
    ancillary: list[tuple[int, int, bytes]] = []
    if message.descriptions:
        rights = array.array("i", [opening.fds[number] for number in message.descriptions])
        ancillary.append((socket.SOL_SOCKET, socket.SCM_RIGHTS, rights.tobytes()))
    if len(message.credentials) == _CREDENTIALS.size:
        pid, uid, gid = _CREDENTIALS.unpack(message.credentials)
        if pid:  # else it was sent without
            if not os.path.exists(f"/proc/{pid}"):
                pid = (
                    os.getpid()
                )  # the kernel takes no other that is not there; user and group are what is asked for
            credentials = _CREDENTIALS.pack(pid, uid, gid)
            ancillary.append((socket.SOL_SOCKET, socket.SCM_CREDENTIALS, credentials))
    try:
        sent = sender.sendmsg(
            [message.data],
            ancillary,
            socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL | (socket.MSG_OOB if message.urgent else 0),
            *([] if to is None else [to]),
        )
    except OSError as error:
        raise wrap_os_error(error, "cannot put a message back into a unix socket's queue") from error
    if sent != len(message.data):
        raise SnapshotterError(f"only {sent} of {len(message.data)} bytes fit into a unix socket's queue")


def _connected(
    opening: Opening, image: files_pb2.UnixSocket, peer: files_pb2.UnixSocket | None
) -> tuple[int, int]:
    """A connection: (the described end, the other end). Addresses are given through a listening socket."""
    addressed = image if image.address else peer if peer is not None and peer.address else None
    if addressed is None:
        ends = peers.pair(opening, image)
        return ends[0].detach(), ends[1].detach()
    if image.type == socket.SOCK_DGRAM:
        return _connected_datagrams(opening, image, peer)
    client_side = peer if addressed is image else image
    with socket.socket(socket.AF_UNIX, image.type) as client, contextlib.ExitStack() as stack:
        if client_side is not None and client_side.address:
            unixghost.bind(opening, client, client_side)
        listener = opening.unix_listeners.get((addressed.address, addressed.node_ino))
        if listener is not None:
            served = stack.enter_context(sockets.borrowed_socket(opening.open(listener.id)))
            shown = client_side is not None and client_side.HasField("peer")
            if client_side is not None and shown and client_side.peer != listener.unix.peer:
                # Another task let it listen when this client connected.
                peers.listen(opening, served, client_side, max(listener.unix.backlog, 1))
                peers.connect(opening, client, listener.unix, addressed)
                peers.listen(opening, served, listener.unix, listener.unix.backlog)
            else:
                peers.connect(opening, client, listener.unix, addressed)
        else:
            served = stack.enter_context(socket.socket(socket.AF_UNIX, image.type))
            # What stays of it in the file system is what the job's listener had left: a node that nobody serves.
            stack.enter_context(unixghost.bound(opening, served, addressed))
            peers.listen(opening, served, client_side or addressed, 1)
            peers.connect(opening, client, addressed, addressed)
        ends_by_side = (served.accept()[0].detach(), os.dup(client.fileno()))
    return ends_by_side if addressed is image else (ends_by_side[1], ends_by_side[0])


def _connected_datagrams(
    opening: Opening, image: files_pb2.UnixSocket, peer: files_pb2.UnixSocket | None
) -> tuple[int, int]:
    ends = peers.pair(opening, image)
    for end, side in zip(ends, (image, peer), strict=True):
        if side is not None and side.address:
            unixghost.bind(opening, end, side)
    return ends[0].detach(), ends[1].detach()


KIND = UnixKind()
