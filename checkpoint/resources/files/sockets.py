"""What unix and internet sockets share: protocol names, options that differ from a fresh socket's, attached filters.

A classic filter (SO_ATTACH_FILTER) can be read and is attached again, last, so that it does not filter what is put back. Refused: an
eBPF program (SO_ATTACH_BPF), which cannot be read; sockets of another network namespace. Programs that choose
among sockets of one port (SO_ATTACH_REUSEPORT_CBPF) are not to be seen.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import functools
import os
import socket
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from checkpoint.kernel import options
from checkpoint.kernel.sys import PIDFD_THREAD, pidfd_getfd
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
SO_ATTACH_FILTER, _SO_LOCK_FILTER = 26, 44
_INSTRUCTION_BYTES = 8
_SO_TIMESTAMPING, _SO_PASSPIDFD = 37, 76
_SO_NETNS_COOKIE, _SIOCGSKNS = 71, 0x894C
LATE = frozenset({SO_PEEK_OFF, SO_ATTACH_FILTER, _SO_LOCK_FILTER, socket.SO_PASSCRED, _SO_PASSPIDFD})
"""Options that are set once the queue is full, in the order of their numbers. SO_PASSCRED: the kernel would put snap's own
credentials on a message that was sent without.
"""

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
        _SO_LOCK_FILTER,
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


def look(seen: Seen) -> Finding | None:
    """Whether a socket of a process that may be running cannot be made again: it is of another network namespace, or has a program
    attached that cannot be read.
    """
    try:
        pidfd = _pidfd(seen.pid)
        try:
            fd = pidfd_getfd(pidfd, seen.fd)
        finally:
            os.close(pidfd)
    except OSError:
        return None  # closed or ended meanwhile, or not ours to see: the dump will say so
    with socket.socket(fileno=fd) as sock:
        if _network(sock) != _own_network():
            return Finding(
                seen.pid,
                seen.where,
                "is a socket of another network namespace",
                "run snap in that namespace, with the whole job in it, or let the program close the socket",
            )
        return None if _filter_length(sock) is not None else _unreadable(seen)


def _network(sock: socket.socket) -> bytes:
    """What names the network namespace of a socket: its cookie, never used again until the machine starts anew, which everybody may
    ask for; before Linux 5.14 the file of the namespace, which takes CAP_NET_ADMIN in it. b"": the kernel does not say.
    """
    try:
        return sock.getsockopt(_SOL, _SO_NETNS_COOKIE, 8)
    except OSError:
        pass
    try:
        fd = fcntl.ioctl(sock, _SIOCGSKNS)
    except OSError:
        return b""
    try:
        state = os.fstat(fd)
    finally:
        os.close(fd)
    return b"%d:%d" % (state.st_dev, state.st_ino)


def _own_network() -> bytes:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as own:
        return _network(own)


def _pidfd(task: int) -> int:
    try:
        return os.pidfd_open(task)
    except OSError as error:
        if error.errno not in {errno.EINVAL, errno.ENOENT}:
            raise
        return os.pidfd_open(task, PIDFD_THREAD)  # a thread with a table of its own


def _filter_length(sock: socket.socket) -> int | None:
    """How many instructions the filter has; None: a BPF program, which cannot be read."""
    # With length 0 the kernel only counts the filter's instructions. (With another it would count in instructions
    # what is given in bytes, and write beyond the end.)
    length = ctypes.c_uint32(0)
    if _libc.getsockopt(sock.fileno(), _SOL, SO_ATTACH_FILTER, None, ctypes.byref(length)) == 0:
        return length.value
    return None if ctypes.get_errno() == errno.EACCES else 0


def _unreadable(seen: Seen) -> Finding:
    hint = "let the program detach it (SO_DETACH_FILTER) first"
    return Finding(seen.pid, seen.where, "has a BPF program attached", hint)


def dump_filter(sock: socket.socket, seen: Seen) -> Iterator[tuple[int, int, bytes]]:
    """The filter that is attached, as an option. UnsupportedError for an eBPF program."""
    count = _filter_length(sock)
    if count is None:
        finding = _unreadable(seen)
        raise UnsupportedError(
            finding.what, where=f"task {seen.pid}, {seen.where}", hint=finding.hint, findings=(finding,)
        )
    if not count:
        return
    length = ctypes.c_uint32(count)
    program = ctypes.create_string_buffer(count * _INSTRUCTION_BYTES)
    if _libc.getsockopt(sock.fileno(), _SOL, SO_ATTACH_FILTER, program, ctypes.byref(length)) != 0:
        raise wrap_os_error(
            OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno())), "cannot read a filter"
        )
    yield _SOL, SO_ATTACH_FILTER, program.raw


def _attach_filter(sock: socket.socket, program: bytes) -> None:
    code = ctypes.create_string_buffer(program, len(program))
    sock.setsockopt(
        _SOL,
        SO_ATTACH_FILTER,
        struct.pack("=H6xQ", len(program) // _INSTRUCTION_BYTES, ctypes.addressof(code)),
    )


def apply_options(
    sock: socket.socket, recorded: Iterable[files_pb2.SocketOption], warn: Callable[[str], None]
) -> None:
    """Sets recorded options. Buffer sizes are forced past the sysctl limits; the kernel doubles them again.

    Those that the system may have lost the means for (a congestion control, an interface) are warned about.
    """
    for option in recorded:
        name, value = option.name, option.value
        if option.level == _SOL and name == SO_ATTACH_FILTER:
            _attach_filter(sock, value)
            continue
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
