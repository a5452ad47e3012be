"""Options, filters and multicast groups of sockets: every one that can be set is there again, what cannot be read is refused."""

from __future__ import annotations

import contextlib
import ctypes
import socket
import struct

import pytest

from checkpoint.kernel import options
from checkpoint.resources.files import inet, multicast, sockets
from images import files_pb2
from snapshotter.base.errors import UnsupportedError
from tests.kernel.descriptor_jobs import child, dump, files_findings

pytestmark = pytest.mark.requires("kcmp", "pidfd_getfd")


def test_socket_options_come_back(again):
    def prepare():
        udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        udp.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, 7)
        udp.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_LOOP, 0)
        udp.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton("127.0.0.1"))
        udp.setsockopt(socket.IPPROTO_IP, 11, 1)  # IP_RECVERR
        udp.setsockopt(socket.IPPROTO_IP, 10, 2)  # IP_MTU_DISCOVER
        udp.setsockopt(socket.SOL_SOCKET, 37, 0x18)  # SO_TIMESTAMPING
        udp.setsockopt(socket.IPPROTO_UDP, 1, 1)  # UDP_CORK
        tcp = socket.socket(socket.AF_INET)
        tcp.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")
        tcp.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 1)
        udp.setsockopt(socket.SOL_SOCKET, 11, 1)  # SO_NO_CHECK
        udp.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        udp.setsockopt(socket.SOL_SOCKET, 72, 1)  # SO_BUF_LOCK: the send buffer's size only
        return udp, tcp

    r = again(prepare)
    with r.socket(3) as udp, r.socket(4) as tcp:
        ip = socket.IPPROTO_IP
        assert udp.getsockopt(ip, socket.IP_MULTICAST_TTL) == 7
        assert udp.getsockopt(ip, socket.IP_MULTICAST_LOOP) == 0
        assert udp.getsockopt(ip, socket.IP_MULTICAST_IF, 4) == socket.inet_aton("127.0.0.1")
        assert (udp.getsockopt(ip, 11), udp.getsockopt(ip, 10)) == (1, 2)
        assert udp.getsockopt(socket.SOL_SOCKET, 37) == 0x18
        assert udp.getsockopt(socket.IPPROTO_UDP, 1) == 1
        assert udp.getsockopt(socket.SOL_SOCKET, 11) == 1
        assert udp.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) == 131072
        assert udp.getsockopt(socket.SOL_SOCKET, 72) == 1
        assert tcp.getsockopt(socket.IPPROTO_TCP, socket.TCP_CORK) == 1
        assert tcp.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0") == b"reno"
    assert r.warnings == []


def _attach(sock, *instructions, locked=False):
    """SO_ATTACH_FILTER."""
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *one) for one in instructions))
    program = struct.pack("=H6xQ", len(instructions), ctypes.addressof(code))
    sock.setsockopt(socket.SOL_SOCKET, 26, program)
    if locked:
        sock.setsockopt(socket.SOL_SOCKET, 44, 1)  # SO_LOCK_FILTER


def test_an_attached_filter_comes_back(again):
    """It lets the first byte's worth of each datagram through; what waited is not cut."""

    def prepare():
        one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        one.send(b"before")
        _attach(other, (0x06, 0, 0, 1), locked=True)  # BPF_RET 1
        udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        udp.bind(("127.0.0.1", 0))
        _attach(udp, (0x06, 0, 0, 8 + 2))  # the UDP header counts
        return one, other, udp

    r = again(prepare)
    with r.socket(3) as one, r.socket(4) as other, r.socket(5) as udp:
        one.send(b"after")
        assert other.recv(100) == b"before"
        assert other.recv(100) == b"a"
        with pytest.raises(PermissionError):
            _attach(other, (0x06, 0, 0, 9))
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.sendto(b"long", udp.getsockname())
        assert udp.recv(100) == b"lo"
        assert udp.getsockopt(socket.SOL_SOCKET, 44) == 0


def test_a_bpf_program_is_refused_by_name(monkeypatch):
    """Loading one takes more than every machine allows: the kernel's answer for it is what counts."""
    monkeypatch.setattr(sockets, "_filter_length", lambda _sock: None)
    with child(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as pid:
        (finding,) = files_findings(pid)
        assert "BPF program" in finding.what
        with pytest.raises(UnsupportedError, match="BPF program"):
            dump(pid)


def _set_everything(family: int, kind: int) -> socket.socket:
    """A socket with every option changed that can be."""
    sock = socket.socket(family, kind)
    for level, name in inet._OPTIONS:
        if (level, name) in {
            (socket.SOL_SOCKET, socket.SO_LINGER),
            (socket.IPPROTO_TCP, socket.TCP_CONGESTION),
        }:
            continue
        before = options.read(sock.fileno(), [(level, name)])[0]
        for value in (1, 0, 2, 60, 600):
            with contextlib.suppress(OSError):
                sock.setsockopt(level, name, value)
                if options.read(sock.fileno(), [(level, name)])[0] != before:
                    break
    return sock


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
def test_every_option_that_can_be_changed_comes_back(again, family, kind):
    wanted = inet._OF_STREAM if kind == socket.SOCK_STREAM else inet._OPTIONS
    with _set_everything(family, kind) as expected, socket.socket(family, kind) as fresh:
        values = [options.read(one.fileno(), wanted) for one in (expected, fresh)]
        assert sum(one != other for one, other in zip(*values, strict=True)) > 20
        r = again(lambda: _set_everything(family, kind))
        with r.socket(3) as restored:
            got = options.read(restored.fileno(), wanted)
        wrong = {
            name: (one, two) for name, one, two in zip(wanted, values[0], got, strict=True) if one != two
        }
        assert not wrong
        assert not r.warnings


def test_multicast_groups_come_back(again):
    join, join_source, block = 42, 46, 43

    def request(*addresses):
        loopback = socket.if_nametoindex("lo")
        packed = (
            struct.pack("=H2x4s", socket.AF_INET, socket.inet_aton(one)).ljust(128, b"\0")
            for one in addresses
        )
        return struct.pack("=I4x", loopback) + b"".join(packed)

    def prepare():
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.bind(("", 0))
        sock.setsockopt(socket.IPPROTO_IP, join, request("239.1.2.3"))
        sock.setsockopt(socket.IPPROTO_IP, join, request("239.1.2.4"))
        sock.setsockopt(socket.IPPROTO_IP, block, request("239.1.2.4", "10.9.8.7"))
        sock.setsockopt(socket.IPPROTO_IP, join_source, request("232.1.2.3", "10.0.0.1"))
        six = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
        six.setsockopt(
            socket.IPPROTO_IPV6,
            socket.IPV6_JOIN_GROUP,
            socket.inet_pton(socket.AF_INET6, "ff02::1234") + struct.pack("=I", socket.if_nametoindex("lo")),
        )
        return sock, six, socket.socket(socket.AF_INET, socket.SOCK_DGRAM)

    r = again(prepare)
    image = {d.id: d.inet for d in r.opening.descriptions.values() if d.HasField("inet")}
    found = [image[r.table[fd].description].groups for fd in (3, 4, 5)]
    assert [len(groups) for groups in found] == [3, 1, 0]
    assert not r.warnings
    for fd, groups in zip((3, 4), found, strict=False):
        again_image = files_pb2.InetSocket()
        with r.socket(fd) as sock:
            multicast.dump(sock, multicast.groups(), again_image)
        assert sorted(map(str, again_image.groups)) == sorted(map(str, groups))
