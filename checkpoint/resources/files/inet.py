"""Internet sockets without a remote end: TCP that listens or was never connected, and UDP.

State: addresses, options, multicast groups, backlog, what was shut down. A datagram that waits in a UDP socket at the dump is dropped, as
the network may drop any, and a warning says so. A datagram that is kept back by its sender (UDP_CORK) is
refused, for its bytes cannot be read. Established TCP connections are refused: their other
end lives on and would not follow a rollback.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import select
import socket
import struct
import time
from typing import TYPE_CHECKING, NamedTuple

from checkpoint.kernel import descriptors, sockdiag
from checkpoint.resources.files import kind, multicast, outside, socketowner, sockets
from images import files_pb2
from snapshotter.base.errors import Finding, RestoreConflictError, UnsupportedError

if TYPE_CHECKING:
    from checkpoint.resources.files.dumping import FilesDump
    from checkpoint.resources.files.kind import Seen
    from checkpoint.resources.files.opening import Opening

TCP_LISTEN, TCP_CLOSE = 10, 7
_V4_MAPPED = bytes(10) + b"\xff\xff"
_Address = tuple[str, int] | tuple[str, int, int, int]
_PROTOCOLS = frozenset({"TCP", "TCPv6", "UDP", "UDPv6"})
_TCP_INFO = 11
_IP_FREEBIND = 15
_IP, _IPV6, _TCP = socket.IPPROTO_IP, socket.IPPROTO_IPV6, socket.IPPROTO_TCP
_UDP, _UDP_CORK = socket.IPPROTO_UDP, 1
_SIOCOUTQ = 0x5411
_BOTH_SIDES = 3
"""Of shutdown(2), as the kernel keeps them: 1 for reading, 2 for writing; SHUT_* is one less."""
_IN_FLIGHT_TRIES, _IN_FLIGHT_PAUSE_S = 5, 0.001
_BEFORE_BIND = {
    (socket.SOL_SOCKET, socket.SO_REUSEADDR),
    (socket.SOL_SOCKET, socket.SO_REUSEPORT),
    (_IPV6, socket.IPV6_V6ONLY),
    (_IP, _IP_FREEBIND),
    (_IP, 19),
    (_IP, 24),
    (_IP, 51),
    (_IPV6, 75),
    (_IPV6, 78),
}
"""IP_TRANSPARENT, _BIND_ADDRESS_NO_PORT, _LOCAL_PORT_RANGE, IPV6_TRANSPARENT, _FREEBIND are the last ones."""
_OPTIONS = (
    *sockets.GENERIC_OPTIONS,
    (_IPV6, socket.IPV6_V6ONLY),
    (_IP, socket.IP_TOS),
    (_IP, socket.IP_TTL),
    (_IP, 8),  # IP_PKTINFO
    (_IP, 15),
    (_IP, 19),
    (_IPV6, socket.IPV6_UNICAST_HOPS),
    (_IPV6, socket.IPV6_RECVPKTINFO),
    (_IPV6, socket.IPV6_TCLASS),
    (_TCP, socket.TCP_NODELAY),
    (_TCP, socket.TCP_CORK),
    (_TCP, socket.TCP_KEEPIDLE),
    (_TCP, socket.TCP_KEEPINTVL),
    (_TCP, socket.TCP_KEEPCNT),
    (_TCP, socket.TCP_DEFER_ACCEPT),
    (_TCP, socket.TCP_USER_TIMEOUT),
    (_TCP, 23),  # TCP_FASTOPEN
    (_TCP, socket.TCP_CONGESTION),
    (_IP, 10),  # IP_MTU_DISCOVER
    (_IP, 11),  # IP_RECVERR
    (_IP, socket.IP_MULTICAST_IF),
    (_IP, socket.IP_MULTICAST_TTL),
    (_IP, socket.IP_MULTICAST_LOOP),
    (_IPV6, socket.IPV6_MULTICAST_IF),
    (_IPV6, socket.IPV6_MULTICAST_HOPS),
    (_IPV6, socket.IPV6_MULTICAST_LOOP),
    (_IPV6, 23),  # IPV6_MTU_DISCOVER
    (_IPV6, 25),  # IPV6_RECVERR
    (_UDP, _UDP_CORK),
    # IP_OPTIONS, _RECVOPTS, _RETOPTS, _RECVTTL, _RECVTOS, _PASSSEC, _RECVORIGDSTADDR, _MINTTL, _NODEFRAG, _CHECKSUM,
    # _BIND_ADDRESS_NO_PORT, _RECVFRAGSIZE, _RECVERR_RFC4884, _MULTICAST_ALL, _UNICAST_IF, _LOCAL_PORT_RANGE
    *((_IP, name) for name in (4, 6, 7, 12, 13, 18, 20, 21, 22, 23, 24, 25, 26, 49, 50, 51)),
    # IPV6_2292PKTINFO, _HOPOPTS, _DSTOPTS, _RTHDR, _HOPLIMIT, IPV6_MULTICAST_ALL, _RECVERR_RFC4884, _FLOWINFO_SEND,
    # _RECVHOPLIMIT, _RECVHOPOPTS, _RECVRTHDR, _RECVDSTOPTS, _RECVPATHMTU, _DONTFRAG, _RECVTCLASS, _AUTOFLOWLABEL,
    # _ADDR_PREFERENCES, _MINHOPCOUNT, _RECVORIGDSTADDR, _TRANSPARENT, _UNICAST_IF, _RECVFRAGSIZE, _FREEBIND
    *(
        (_IPV6, name)
        for name in (2, 3, 4, 5, 8, 29, 31, 33, 51, 53, 56, 58, 60, 62, 66, 70, 72, 73, 74, 75, 76, 77, 78)
    ),
    # TCP_MAXSEG, _SYNCNT, _LINGER2, _WINDOW_CLAMP, _THIN_LINEAR_TIMEOUTS, _NOTSENT_LOWAT, _SAVE_SYN, _FASTOPEN_CONNECT,
    # _FASTOPEN_NO_COOKIE, _INQ, _TX_DELAY
    *((_TCP, name) for name in (2, 7, 8, 10, 16, 25, 27, 30, 34, 36, 37)),
    # UDP_ENCAP, _NO_CHECK6_TX, _NO_CHECK6_RX, _SEGMENT, _GRO
    *((_UDP, name) for name in (100, 101, 102, 103, 104)),
)
_OF_CONNECTION = frozenset({(_TCP, socket.TCP_MAXSEG), (_TCP, socket.TCP_WINDOW_CLAMP)})
"""What a connection has changed by itself, and keeps when it has ended."""


_MULTICAST = frozenset(
    [
        (_IP, socket.IP_MULTICAST_TTL),
        (_IP, socket.IP_MULTICAST_LOOP),
        (_IPV6, socket.IPV6_MULTICAST_HOPS),
    ]
)

_OF_STREAM = tuple(option for option in _OPTIONS if option not in _MULTICAST)
_OF_ENDED = tuple(option for option in _OF_STREAM if option not in _OF_CONNECTION)


class InetKind(kind.Kind):
    field = "inet"

    def claims(self, seen: Seen) -> bool:
        return seen.link.startswith(b"socket:") and sockets.protocol_name(seen.pid, seen.fd) in _PROTOCOLS

    def refusal(self, seen: Seen) -> Finding | None:
        refused = sockets.look(seen)
        if refused is not None or not sockets.protocol_name(seen.pid, seen.fd).startswith("TCP"):
            return refused
        remote = _connection(seen.pid, seen.stat.st_ino)
        if remote is None:
            return None
        return Finding(
            seen.pid,
            seen.where,
            f"is a TCP connection ({remote}), which cannot be dumped",
            "let the program close it, or take the point while it is not connected",
        )

    def dump(self, job: FilesDump, seen: Seen, description: files_pb2.Description) -> None:
        image = description.inet
        image.ino = seen.stat.st_ino
        socketowner.dump(seen, image)
        with job.borrow(seen) as fd, sockets.borrowed_socket(fd) as sock:
            image.family, image.type, image.protocol = sock.family, sock.type, sock.proto
            image.state = TCP_CLOSE
            image.source = _address(sock.getsockname())
            if sock.type == socket.SOCK_STREAM:
                info = sock.getsockopt(_TCP, _TCP_INFO, 256)
                image.state = info[0]
                if image.state == TCP_CLOSE:
                    _look_ended(job, sock, image, seen)
                if image.state not in {TCP_LISTEN, TCP_CLOSE}:
                    raise UnsupportedError("is a TCP connection, which cannot be dumped", where=seen.where)
                waiting, image.backlog = struct.unpack_from("=II", info, 24)
                if image.state == TCP_LISTEN and waiting:
                    job.ctx.warn(
                        f"{waiting} connections wait at {sock.getsockname()}; they are lost by a rollback"
                    )
            else:
                try:
                    image.destination = _address(sock.getpeername())
                except OSError:
                    pass  # not connected
                image.shutdown = _sides_of_udp(job, sock, seen)
                _refuse_corked(fd, seen)
                if descriptors.nr_readable(fd):
                    job.ctx.warn(
                        f"datagrams that wait in the UDP socket at {sock.getsockname()} are not saved"
                    )
            # A TCP socket cannot set what concerns multicast, but an accepted one has the TTL of its first packet.
            if sock.type != socket.SOCK_STREAM:
                wanted = _OPTIONS
                multicast.dump(sock, job.multicast_groups, image)
            else:
                wanted = _OF_ENDED if image.shutdown else _OF_STREAM
            for level, name, value in (
                *sockets.changed_options(sock, wanted),
                *sockets.dump_filter(sock, seen),
            ):
                image.options.add(level=level, name=name, value=value)

    def check(self, opening: Opening, description: files_pb2.Description) -> None:
        """The address must be free, or held by the living job that is to be replaced."""
        image = description.inet
        socketowner.check(image)
        address = _parsed(image.source)
        shared = any((o.level, o.name) == (socket.SOL_SOCKET, socket.SO_REUSEPORT) for o in image.options)
        if not address[1] or (image.type == socket.SOCK_STREAM and image.state != TCP_LISTEN):
            return
        users = _users(image, address[0], address[1])
        if shared:  # with sockets of the same owner only, which may have been opened since
            users = [one for one in users if one.uid != socketowner.uid_of(image)]
        links = {b"socket:[%d]" % one.ino for one in users if one.ino and _is_in_the_way(image, one.state)}
        others = outside.holders(links, opening.ctx.processes) if links else {}
        for found in others.values():
            raise RestoreConflictError(
                f"process {found[0].pid} ({found[0].comm}) uses the address of the job's socket",
                where=f"{address[0]} port {address[1]}",
                hint="end it",
            )
        if not shared and any(_lingers(image, one.state) for one in users) and not sockdiag.can_destroy():
            raise RestoreConflictError(
                "connections of the job's socket that have ended, or that the rollback would end, keep its address for a "
                "minute (TIME_WAIT), and this kernel cannot forget them (CONFIG_INET_DIAG_DESTROY)",
                where=f"{address[0]} port {address[1]}",
                hint="end the job if it runs, and roll back a minute later",
            )

    def open(self, opening: Opening, description: files_pb2.Description) -> int:
        image = description.inet
        with socket.socket(image.family, image.type, image.protocol) as sock:
            socketowner.give(sock.fileno(), image)
            early = [o for o in image.options if (o.level, o.name) in _BEFORE_BIND]
            sockets.apply_options(sock, early, opening.warn)
            address = _parsed(image.source)
            reuse = _reuses(image)
            try:
                if address[1] and not (image.shutdown and image.type == socket.SOCK_STREAM):
                    if image.type == socket.SOCK_STREAM:
                        if not reuse:
                            _forget_connections(image, address)
                        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    _bind(sock, address)
                if image.state == TCP_LISTEN:
                    sock.listen(image.backlog)
                if image.destination:
                    sock.connect(_parsed(image.destination))
            except OSError as error:
                raise RestoreConflictError(
                    f"cannot bind the job's socket: {error.strerror}",
                    where=f"{address[0]} port {address[1]}",
                    hint="end what uses this address",
                ) from error
            if image.type == socket.SOCK_STREAM and not reuse:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
            late = [o for o in image.options if (o.level, o.name) not in _BEFORE_BIND]
            late.sort(key=lambda o: (o.level == socket.SOL_SOCKET and o.name in sockets.LATE) * o.name)
            sockets.apply_options(sock, late, opening.warn)
            multicast.join(sock, image, opening.warn)
            if image.shutdown & _BOTH_SIDES:
                with contextlib.suppress(OSError):  # ENOTCONN, yet it is shut down
                    sock.shutdown((image.shutdown & _BOTH_SIDES) - 1)
            return os.dup(sock.fileno())


def _bind(sock: socket.socket, address: _Address) -> None:
    """To an address that the machine does not have (any more, or yet) too: a bound socket keeps its own in any case."""
    try:
        sock.bind(address)
    except OSError as error:
        if error.errno != errno.EADDRNOTAVAIL:
            raise
        sock.setsockopt(_IP, _IP_FREEBIND, 1)
        try:
            sock.bind(address)
        finally:
            sock.setsockopt(_IP, _IP_FREEBIND, 0)


def _look_ended(job: FilesDump, sock: socket.socket, image: files_pb2.InetSocket, seen: Seen) -> None:
    """A TCP connection that both sides have ended: reads end-of-file, writes EPIPE. One that was never made is not shut down."""
    poll = select.poll()
    poll.register(sock, select.POLLRDHUP | select.POLLERR)
    events = dict(poll.poll(0)).get(sock.fileno(), 0)
    if not events & select.POLLRDHUP:
        return
    if events & select.POLLERR or descriptors.nr_readable(sock.fileno()):
        what = "is a TCP connection that has ended, with data or an error that was not read yet"
        finding = Finding(seen.pid, seen.where, what, "let the program read or close it first")
        raise UnsupportedError(
            what, where=f"task {seen.pid}, {seen.where}", hint=finding.hint, findings=(finding,)
        )
    image.shutdown = 3
    job.ctx.warn(
        f"task {seen.pid}, {seen.where}: the addresses of a TCP connection that has ended are not kept"
    )


def _sides_of_udp(job: FilesDump, sock: socket.socket, seen: Seen) -> int:
    """Which sides are shut down: 1 reading, 2 writing. That of writing is not to be seen in the socket itself."""
    poll = select.poll()
    poll.register(sock, select.POLLRDHUP)
    events = dict(poll.poll(0)).get(sock.fileno(), 0)
    visible = _BOTH_SIDES if events & select.POLLHUP else int(bool(events & select.POLLRDHUP))
    known = job.udp_shutdown(sock.family, seen.stat.st_ino)
    if known is None and visible != _BOTH_SIDES:
        job.ctx.warn(
            f"task {seen.pid}, {seen.where}: this kernel does not show whether writing to it was shut down "
            "(udp_diag); a rollback forgets that"
        )
    return visible | (known or 0)


def _refuse_corked(fd: int, seen: Seen) -> None:
    """Data that UDP_CORK or MSG_MORE keeps back: nothing shows its bytes."""
    for _ in range(_IN_FLIGHT_TRIES):
        if not struct.unpack("=i", fcntl.ioctl(fd, _SIOCOUTQ, bytes(4)))[0]:
            return
        time.sleep(_IN_FLIGHT_PAUSE_S)  # on its way out, mostly
    what = "keeps back an unfinished datagram (UDP_CORK or MSG_MORE)"
    hint = "take the point a moment later"
    finding = Finding(seen.pid, seen.where, what, hint)
    raise UnsupportedError(what, where=f"task {seen.pid}, {seen.where}", hint=hint, findings=(finding,))


def _connection(pid: int, ino: int) -> str | None:
    """The ports as text, "local - remote (state)" in the kernel's hexadecimal, if a TCP socket is connected."""
    for name in ("tcp", "tcp6"):
        try:
            with open(f"/proc/{pid}/net/{name}", encoding="ascii") as file:
                lines = file.read().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            words = line.split()
            if int(words[9]) == ino and int(words[3], 16) not in {TCP_LISTEN, TCP_CLOSE}:
                return f"local port {int(words[1].split(':')[1], 16)}, remote port {int(words[2].split(':')[1], 16)}"
    return None


def _is_in_the_way(image: files_pb2.InetSocket, state: int) -> bool:
    """Whether the socket cannot be bound beside another in this state, given that somebody has that one open."""
    return image.type != socket.SOCK_STREAM or state == TCP_LISTEN or not _reuses(image)


def _lingers(image: files_pb2.InetSocket, state: int) -> bool:
    """Whether one in this state, of the old job's, holds the address when nobody has it open any more: an accepted connection has
    SO_REUSEADDR as its listener had it, and only if both have it the address is free.
    """
    return image.type == socket.SOCK_STREAM and state != TCP_LISTEN and not _reuses(image)


def _reuses(image: files_pb2.InetSocket) -> bool:
    return any((o.level, o.name) == (socket.SOL_SOCKET, socket.SO_REUSEADDR) for o in image.options)


def _forget_connections(image: files_pb2.InetSocket, address: _Address) -> None:
    """Those that nobody has open any more and that keep the address: in TIME_WAIT, or just ended with the old job."""
    host = socket.inet_pton(image.family, address[0].partition("%")[0])
    with contextlib.suppress(OSError):  # the bind says what is wrong then
        for info in sockdiag.tcp_sockets(address[1]):
            mapped = info.host.removeprefix(_V4_MAPPED)
            if info.ino == 0 and (not any(host) or host in {info.host, mapped}):
                with contextlib.suppress(FileNotFoundError):
                    sockdiag.destroy(info)


class _User(NamedTuple):
    """A socket at an address, and its owner; inode 0: nobody has it open any more."""

    state: int
    ino: int
    uid: int


def _users(image: files_pb2.InetSocket, host: str, port: int) -> list[_User]:
    """The sockets at this address."""
    stream = image.type == socket.SOCK_STREAM
    name = ("tcp" if stream else "udp") + ("6" if image.family == socket.AF_INET6 else "")
    packed = socket.inet_pton(image.family, host.partition("%")[0])
    # The kernel prints the address as 32-bit words in host order.
    wanted = b"".join(packed[at : at + 4][::-1] for at in range(0, len(packed), 4)).hex().upper()
    any_address = "0" * len(wanted)
    found = []
    try:
        with open(f"/proc/self/net/{name}", encoding="ascii") as file:
            lines = file.read().splitlines()[1:]
    except OSError:
        return []
    for line in lines:
        words = line.split()
        local, _, number = words[1].partition(":")
        if int(number, 16) == port and (wanted == any_address or local in {wanted, any_address}):
            found.append(_User(int(words[3], 16), int(words[9]), int(words[7])))
    return found


def _address(address: tuple[object, ...]) -> bytes:
    """Host, port, and for IPv6 flow and scope, as text: "host port [flow scope]"."""
    return " ".join(str(part) for part in address).encode()


def _parsed(text: bytes) -> _Address:
    words = text.decode().split()
    if len(words) == 4:
        return words[0], int(words[1]), int(words[2]), int(words[3])
    return words[0], int(words[1])


KIND = InetKind()
