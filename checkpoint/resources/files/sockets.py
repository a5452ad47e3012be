"""What unix and internet sockets share: protocol names, options that differ from a fresh socket's."""

from __future__ import annotations

import contextlib
import functools
import os
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from snapshotter.base.errors import wrap_os_error

if TYPE_CHECKING:
    from images import files_pb2

SO_PEEK_OFF = 42
SO_SNDBUFFORCE, SO_RCVBUFFORCE = 32, 33
_SOL = socket.SOL_SOCKET
_FORCED = {socket.SO_SNDBUF: SO_SNDBUFFORCE, socket.SO_RCVBUF: SO_RCVBUFFORCE}
_SO_BINDTODEVICE = 25
_OPTION_MAX_BYTES = 64

GENERIC_OPTIONS: tuple[tuple[int, int], ...] = tuple(
    (_SOL, name)
    for name in (
        socket.SO_REUSEADDR,
        socket.SO_REUSEPORT,
        socket.SO_BROADCAST,
        socket.SO_DONTROUTE,
        socket.SO_KEEPALIVE,
        socket.SO_OOBINLINE,
        socket.SO_LINGER,
        socket.SO_PRIORITY,
        socket.SO_MARK,
        socket.SO_PASSCRED,
        socket.SO_RCVLOWAT,
        socket.SO_RCVTIMEO,
        socket.SO_SNDTIMEO,
        socket.SO_SNDBUF,
        socket.SO_RCVBUF,
        29,  # SO_TIMESTAMP
        34,  # SO_PASSSEC
        35,  # SO_TIMESTAMPNS
        46,  # SO_BUSY_POLL
        _SO_BINDTODEVICE,
        SO_PEEK_OFF,
    )
)


def protocol_name(pid: int, fd: int) -> str:
    """The kernel's name of a socket's protocol: "UNIX", "UNIX-STREAM", "TCP", "UDPv6", "NETLINK" ..."""
    try:
        return (
            os.getxattr(f"/proc/{pid}/fd/{fd}", "system.sockprotoname")
            .rstrip(b"\0")
            .decode("ascii", "replace")
        )
    except OSError:
        return ""


@contextmanager
def borrowed_socket(fd: int) -> Iterator[socket.socket]:
    """A socket object on a descriptor that stays open afterwards."""
    sock = socket.socket(fileno=fd)
    try:
        yield sock
    finally:
        sock.detach()


@functools.cache
def _defaults(
    family: int, kind: int, protocol: int, names: tuple[tuple[int, int], ...]
) -> dict[tuple[int, int], bytes]:
    """What a fresh socket answers; without the options that this type of socket does not have."""
    found = {}
    with socket.socket(family, kind, protocol) as fresh:
        for level, name in names:
            with contextlib.suppress(OSError):
                found[level, name] = fresh.getsockopt(level, name, _OPTION_MAX_BYTES)
    return found


def changed_options(
    sock: socket.socket, names: tuple[tuple[int, int], ...]
) -> Iterator[tuple[int, int, bytes]]:
    """(level, name, value) of the options that differ from those of a fresh socket of the same type."""
    for (level, name), default in _defaults(sock.family, sock.type, sock.proto, names).items():
        with contextlib.suppress(OSError):
            value = sock.getsockopt(level, name, _OPTION_MAX_BYTES)
            if value != default:
                yield level, name, value


def apply_options(sock: socket.socket, options: Iterable[files_pb2.SocketOption]) -> None:
    """Sets recorded options. Buffer sizes are forced past the sysctl limits; the kernel doubles them again."""
    for option in options:
        name, value = option.name, option.value
        if option.level == _SOL and name in _FORCED:
            value = (int.from_bytes(value, "little") // 2).to_bytes(4, "little")
            try:
                sock.setsockopt(_SOL, _FORCED[name], value)
                continue
            except PermissionError:
                pass  # without CAP_NET_ADMIN: as far as the limit goes
        try:
            sock.setsockopt(option.level, name, value)
        except OSError as error:
            raise wrap_os_error(
                error, f"cannot set socket option {option.level}/{option.name} again", where="socket"
            ) from error
