"""What unix and internet sockets share: protocol names, options that differ from a fresh socket's, attached filters.

Refused: a filter (SO_ATTACH_FILTER, SO_ATTACH_BPF): what it lets through is the program's to say, and an eBPF one cannot
be read at all.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from checkpoint.kernel import options
from snapshotter.base.errors import Finding, UnsupportedError, wrap_os_error

if TYPE_CHECKING:
    from checkpoint.resources.files.kind import Seen
    from images import files_pb2

_libc = ctypes.CDLL(None, use_errno=True)

SO_PEEK_OFF = 42
SO_SNDBUFFORCE, SO_RCVBUFFORCE = 32, 33
_SOL = socket.SOL_SOCKET
_FORCED = {socket.SO_SNDBUF: SO_SNDBUFFORCE, socket.SO_RCVBUF: SO_RCVBUFFORCE}
_SO_BINDTODEVICE = 25
_SO_GET_FILTER = 26
_SO_TIMESTAMPING, _SO_PASSPIDFD = 37, 76

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
        _SO_TIMESTAMPING,
        _SO_PASSPIDFD,
        _SO_BINDTODEVICE,
        SO_PEEK_OFF,
        11,  # SO_NO_CHECK
        1,  # SO_DEBUG
        40,  # SO_RXQ_OVFL
        45,  # SO_SELECT_ERR_QUEUE
        47,  # SO_MAX_PACING_RATE
        60,  # SO_ZEROCOPY
        61,  # SO_TXTIME
        63,  # SO_TIMESTAMP_NEW
        64,  # SO_TIMESTAMPNS_NEW
        69,  # SO_PREFER_BUSY_POLL
        70,  # SO_BUSY_POLL_BUDGET
        74,  # SO_TXREHASH
        75,  # SO_RCVMARK
        83,  # SO_PASSRIGHTS
        72,  # SO_BUF_LOCK: after the buffers' sizes, which lock them
    )
)


_MAY_FAIL = frozenset(
    {
        (_SOL, _SO_TIMESTAMPING),
        (_SOL, _SO_PASSPIDFD),
        *((_SOL, name) for name in (1, 47, 60, 61, 69, 70, 75)),
        (socket.IPPROTO_TCP, socket.TCP_CONGESTION),
        (socket.IPPROTO_TCP, socket.TCP_MAXSEG),
        (socket.IPPROTO_TCP, socket.TCP_WINDOW_CLAMP),
        (socket.IPPROTO_IP, 4),  # IP_OPTIONS
        (socket.IPPROTO_IP, 50),  # IP_UNICAST_IF
        (socket.IPPROTO_IPV6, 76),  # IPV6_UNICAST_IF
        (socket.IPPROTO_UDP, 100),  # UDP_ENCAP
        (socket.IPPROTO_IP, socket.IP_MULTICAST_IF),
        (socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF),
    }
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
def _defaults(family: int, kind: int, protocol: int, names: tuple[tuple[int, int], ...]) -> bytes:
    """What a fresh socket answers."""
    with socket.socket(family, kind, protocol) as fresh:
        return options.answers(fresh.fileno(), names)


def changed_options(
    sock: socket.socket, names: tuple[tuple[int, int], ...]
) -> Iterator[tuple[int, int, bytes]]:
    """(level, name, value) of the options that differ from those of a fresh socket of the same type."""
    defaults = _defaults(sock.family, sock.type, sock.proto, names)
    given = options.answers(sock.fileno(), names)
    if given == defaults:
        return
    for pair, default, value in zip(names, options.values(defaults), options.values(given), strict=True):
        if default is not None and value is not None and value != default:
            yield *pair, value


def refuse_filter(sock: socket.socket, seen: Seen) -> None:
    """UnsupportedError when a filter is attached."""
    # With length 0 the kernel only counts the filter's instructions. (With another it would count in instructions
    # what is given in bytes, and write beyond the end.)
    length = ctypes.c_uint32(0)
    if _libc.getsockopt(sock.fileno(), _SOL, _SO_GET_FILTER, None, ctypes.byref(length)) == 0:
        if not length.value:
            return
        what = f"has a packet filter of {length.value} instructions attached"
    elif ctypes.get_errno() == errno.EACCES:
        what = "has a BPF program attached"
    else:
        return
    hint = "let the program detach it (SO_DETACH_FILTER) first"
    finding = Finding(seen.pid, seen.where, what, hint)
    raise UnsupportedError(what, where=f"task {seen.pid}, {seen.where}", hint=hint, findings=(finding,))


def apply_options(
    sock: socket.socket, recorded: Iterable[files_pb2.SocketOption], warn: Callable[[str], None]
) -> None:
    """Sets recorded options. Buffer sizes are forced past the sysctl limits; the kernel doubles them again.

    Those that the system may have lost the means for (a congestion control, an interface) are warned about.
    """
    for option in recorded:
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
            if (option.level, option.name) in _MAY_FAIL:
                warn(f"socket option {option.level}/{option.name} could not be set again: {error.strerror}")
                continue
            raise wrap_os_error(
                error, f"cannot set socket option {option.level}/{option.name} again", where="socket"
            ) from error
