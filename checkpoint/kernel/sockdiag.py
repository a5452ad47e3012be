"""Asks the kernel for its lists of sockets, and to forget one (sock_diag netlink: unix_diag.h, inet_diag.h).

Owns the encoding of the requests and the parsing of the answers; sees the network namespace of snap only.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from snapshotter.base.errors import UnsupportedError

NETLINK_SOCK_DIAG = 4
SOCK_DIAG_BY_FAMILY, SOCK_DESTROY = 20, 21
_NLM_F_REQUEST_DUMP, _NLM_F_REQUEST_ACK = 0x1 | 0x300, 0x1 | 0x4
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_SHOW_NAME, _SHOW_VFS, _SHOW_PEER, _SHOW_ICONS, _SHOW_RQLEN = 0x1, 0x2, 0x4, 0x8, 0x10
_ATTR_NAME, _ATTR_VFS, _ATTR_PEER, _ATTR_ICONS, _ATTR_RQLEN, _ATTR_SHUTDOWN = 0, 1, 2, 3, 4, 6
_INET_ID_BYTES, _INET_MESSAGE_BYTES, _INET_SHUTDOWN = 48, 72, 8
"""sizes of inet_diag_sockid and inet_diag_msg, whose last field is the inode."""

STATE_ESTABLISHED, STATE_CLOSE, STATE_LISTEN = 1, 7, 10


@dataclass(frozen=True, slots=True)
class UnixSocketInfo:
    """One unix socket. `rqueue` is bytes waiting (of the first datagram only, for SOCK_DGRAM) or, on a
    listening one, connections waiting; `wqueue` is then its backlog. `peer` is 0 without one.
    """

    ino: int
    type: int
    state: int
    name: bytes
    vfs_ino: int
    vfs_dev: int
    peer: int
    pending: tuple[int, ...]
    rqueue: int
    wqueue: int
    shutdown: int


def parse_attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Netlink attributes (type, value) packed in `data`."""
    offset = 0
    while offset + 4 <= len(data):
        length, kind = struct.unpack_from("=HH", data, offset)
        if length < 4:
            return
        yield kind & 0x3FFF, data[offset + 4 : offset + length]
        offset += (length + 3) & ~3


def parse_unix_message(body: bytes) -> UnixSocketInfo:
    """One struct unix_diag_msg (16 bytes) with its attributes."""
    _family, kind, state, _pad, ino = struct.unpack_from("=BBBBI", body)
    name, pending = b"", ()
    vfs_ino = vfs_dev = peer = rqueue = wqueue = shutdown = 0
    for attribute, value in parse_attributes(body[16:]):
        if attribute == _ATTR_NAME:
            name = value
        elif attribute == _ATTR_VFS:
            vfs_ino, vfs_dev = struct.unpack("=II", value[:8])
        elif attribute == _ATTR_PEER:
            peer = struct.unpack("=I", value[:4])[0]
        elif attribute == _ATTR_ICONS:
            pending = struct.unpack(f"={len(value) // 4}I", value)
        elif attribute == _ATTR_RQLEN:
            rqueue, wqueue = struct.unpack("=II", value[:8])
        elif attribute == _ATTR_SHUTDOWN:
            shutdown = value[0]
    return UnixSocketInfo(ino, kind, state, name, vfs_ino, vfs_dev, peer, pending, rqueue, wqueue, shutdown)


def unix_sockets() -> dict[int, UnixSocketInfo]:
    """Every unix socket of this network namespace, by inode number.

    Raises:
        UnsupportedError: the kernel has no unix_diag, or may not load the module.
    """
    show = _SHOW_NAME | _SHOW_VFS | _SHOW_PEER | _SHOW_ICONS | _SHOW_RQLEN
    request = struct.pack("=BBHIIIII", socket.AF_UNIX, 0, 0, 0xFFFFFFFF, 0, show, 0xFFFFFFFF, 0xFFFFFFFF)
    try:
        messages = list(_ask(request))
    except OSError as error:
        raise UnsupportedError(
            f"this kernel cannot list its unix sockets: {error.strerror}",
            where="unix_diag",
            hint="modprobe unix_diag (CONFIG_UNIX_DIAG)",
        ) from error
    return {info.ino: info for info in map(parse_unix_message, messages)}


def udp_shutdowns(family: int) -> dict[int, int]:
    """Which sides of the UDP sockets of this network namespace are shut down (1: reading, 2: writing), by inode number.

    Sockets that were never bound are not among them. Raises OSError: the kernel has no udp_diag.
    """
    request = _inet_request(family, socket.IPPROTO_UDP, bytes(_INET_ID_BYTES))
    return dict(map(parse_inet_shutdown, _ask(request)))


def parse_inet_shutdown(body: bytes) -> tuple[int, int]:
    """(inode, sides) of one struct inet_diag_msg (72 bytes) with its attributes."""
    (ino,) = struct.unpack_from("=I", body, _INET_MESSAGE_BYTES - 4)
    sides = [
        value[0] for kind, value in parse_attributes(body[_INET_MESSAGE_BYTES:]) if kind == _INET_SHUTDOWN
    ]
    return ino, sides[0] if sides else 0


@dataclass(frozen=True, slots=True)
class TcpSocketInfo:
    """One TCP socket. `identity` is the kernel's struct inet_diag_sockid. `ino` is 0 when nobody has it open any more."""

    family: int
    state: int
    host: bytes
    ino: int
    identity: bytes


def parse_tcp_message(body: bytes) -> TcpSocketInfo:
    """One struct inet_diag_msg (72 bytes)."""
    family, state = body[0], body[1]
    host = body[8 : 8 + (16 if family == socket.AF_INET6 else 4)]
    (ino,) = struct.unpack_from("=I", body, _INET_MESSAGE_BYTES - 4)
    return TcpSocketInfo(family, state, host, ino, body[4 : 4 + _INET_ID_BYTES])


def tcp_sockets(port: int) -> list[TcpSocketInfo]:
    """TCP sockets of this network namespace with that local port, those that linger in TIME_WAIT included. OSError: the kernel
    does not say.
    """
    found = []
    for family in (socket.AF_INET, socket.AF_INET6):
        packed = struct.pack(">H", port)
        request = _inet_request(family, socket.IPPROTO_TCP, packed + bytes(_INET_ID_BYTES - 2))
        found += [parse_tcp_message(body) for body in _ask(request) if body[4:6] == packed]
    return found


def destroy(info: TcpSocketInfo) -> None:
    """Let the kernel forget a TCP socket (`ss --kill`); the other side gets a reset.

    Raises:
        OSError: EOPNOTSUPP or EINVAL: it cannot (CONFIG_INET_DIAG_DESTROY); ENOENT: it is gone already; EPERM.
    """
    request = _inet_request(info.family, socket.IPPROTO_TCP, info.identity)
    for _ in _ask(request, SOCK_DESTROY, _NLM_F_REQUEST_ACK):
        pass


def can_destroy() -> bool:
    """Whether `destroy` would work here: tried on a socket that cannot be."""
    nobody = struct.pack(">HH", 1, 1) + bytes(_INET_ID_BYTES - 4)
    try:
        destroy(TcpSocketInfo(socket.AF_INET, 0, b"", 0, nobody))
    except OSError as error:
        return error.errno == errno.ENOENT
    return True


def _inet_request(family: int, protocol: int, identity: bytes) -> bytes:
    """A struct inet_diag_req_v2."""
    return struct.pack("=BBBBI", family, protocol, 0, 0, 0xFFFFFFFF) + identity


def _ask(
    request: bytes, kind: int = SOCK_DIAG_BY_FAMILY, flags: int = _NLM_F_REQUEST_DUMP
) -> Iterator[bytes]:
    """The bodies of the messages that answer a request, by rule one for a dump. OSError: the kernel's own."""
    header = struct.pack("=IHHII", 16 + len(request), kind, flags, 1, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_SOCK_DIAG) as link:
        link.send(header + request)
        while True:
            data = link.recv(1 << 17)
            offset = 0
            while offset + 16 <= len(data):
                length, kind, _flags, _seq, _pid = struct.unpack_from("=IHHII", data, offset)
                if kind == _NLMSG_DONE or length < 16:
                    return
                if kind == _NLMSG_ERROR:
                    code = -struct.unpack_from("=i", data, offset + 16)[0]
                    if not code:  # an acknowledgement
                        return
                    raise OSError(code, os.strerror(code))
                yield data[offset + 16 : offset + length]
                offset += (length + 3) & ~3
