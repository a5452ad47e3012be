"""The multicast groups that a socket has joined, with their lists of sources.

A socket does not list its groups, but says of a given one whether and how it is a member (MCAST_MSFILTER). The groups that any
socket of the network namespace has joined stand in /proc/net/igmp and igmp6, so that asking for each of those is exact.
"""

from __future__ import annotations

import ctypes
import socket
import struct
from collections.abc import Callable, Iterator

from images import files_pb2

_libc = ctypes.CDLL(None, use_errno=True)

_MCAST_JOIN_GROUP, _MCAST_MSFILTER = 42, 48
_LEVELS: dict[int, int] = {socket.AF_INET: socket.IPPROTO_IP, socket.AF_INET6: socket.IPPROTO_IPV6}
_ADDRESS_BYTES = 128
_FILTER = struct.Struct(f"=I4x{_ADDRESS_BYTES}sII")
"""struct group_filter: interface, group, mode, number of sources; then the sources."""
_MCAST_EXCLUDE = 0
_SOURCES_MOST = 64

Group = tuple[int, int, bytes]
"""(family, interface, struct sockaddr_storage)."""


def groups() -> list[Group]:
    """Every group that somebody in this network namespace is in."""
    found: list[Group] = []
    for name, parse in (("igmp", parse_igmp), ("igmp6", parse_igmp6)):
        try:
            with open(f"/proc/self/net/{name}", encoding="ascii", errors="replace") as file:
                found += parse(file.read())
        except FileNotFoundError:
            continue
    return found


def parse_igmp(text: str) -> Iterator[Group]:
    """Lines of an interface are followed by indented ones of its groups, each a number in the machine's byte order."""
    interface = 0
    for line in text.splitlines()[1:]:
        words = line.split()
        if not words:
            continue
        if line[0].isspace():
            address = int(words[0], 16).to_bytes(4, "little")
            yield socket.AF_INET, interface, struct.pack("=H2x4s", socket.AF_INET, address).ljust(128, b"\0")
        else:
            interface = int(words[0])


def parse_igmp6(text: str) -> Iterator[Group]:
    """One line for each: interface, its name, the group, ..."""
    for line in text.splitlines():
        words = line.split()
        if len(words) > 2:
            address = struct.pack("=H2x4x16s", socket.AF_INET6, bytes.fromhex(words[2]))
            yield socket.AF_INET6, int(words[0]), address.ljust(_ADDRESS_BYTES, b"\0")


def dump(sock: socket.socket, among: list[Group], image: files_pb2.InetSocket) -> None:
    """Add the groups that a socket is in."""
    for family, interface, address in among:
        if family == socket.AF_INET6 and sock.family == socket.AF_INET:
            continue
        asked = _FILTER.pack(interface, address, 0, _SOURCES_MOST) + bytes(_SOURCES_MOST * _ADDRESS_BYTES)
        given = _get(sock, _LEVELS[family], asked)
        if given is not None:
            nr_sources = min(_FILTER.unpack_from(given)[3], _SOURCES_MOST)
            image.groups.add(
                level=_LEVELS[family], filter=given[: _FILTER.size + nr_sources * _ADDRESS_BYTES]
            )


def _get(sock: socket.socket, level: int, asked: bytes) -> bytes | None:
    """Getsockopt with a value that asks."""
    value = ctypes.create_string_buffer(asked, len(asked))
    length = ctypes.c_uint32(len(asked))
    if _libc.getsockopt(sock.fileno(), level, _MCAST_MSFILTER, value, ctypes.byref(length)) != 0:
        return None
    return value.raw


def join(sock: socket.socket, image: files_pb2.InetSocket, warn: Callable[[str], None]) -> None:
    """Join them again; one that cannot be (its interface is gone) is a warning."""
    for group in image.groups:
        interface, address, mode, nr_sources = _FILTER.unpack_from(group.filter)
        try:
            sock.setsockopt(
                group.level, _MCAST_JOIN_GROUP, struct.pack(f"=I4x{_ADDRESS_BYTES}s", interface, address)
            )
            if mode != _MCAST_EXCLUDE or nr_sources:
                sock.setsockopt(group.level, _MCAST_MSFILTER, group.filter)
        except OSError as error:
            warn(f"multicast group {shown(address)} could not be joined again: {error.strerror}")


def shown(address: bytes) -> str:
    """A struct sockaddr_storage as text."""
    (family,) = struct.unpack_from("=H", address)
    if family == socket.AF_INET6:
        return socket.inet_ntop(family, address[8:24])
    return socket.inet_ntop(socket.AF_INET, address[4:8])
