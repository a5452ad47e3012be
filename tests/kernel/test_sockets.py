"""Sockets of a child of ours are dumped, the child is killed, and they are made again in this process."""

from __future__ import annotations

import array
import os
import pathlib
import socket
import stat
import tempfile

import pytest

from checkpoint.resources.files import unixnode
from snapshotter.base.errors import PermissionDeniedError, RestoreConflictError, UnsupportedError
from tests.kernel.descriptor_jobs import Restored, child, dump

pytestmark = pytest.mark.requires("kcmp", "pidfd_getfd")


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET])
def test_socketpairs_with_queues(again, kind):
    def prepare():
        a, b = socket.socketpair(socket.AF_UNIX, kind)
        a.send(b"one")
        a.send(b"two")
        b.send(b"back")
        return a, b

    r = again(prepare)
    a, b = r.socket(3), r.socket(4)
    with a, b:
        assert b.recv(100, socket.MSG_DONTWAIT) == (b"onetwo" if kind == socket.SOCK_STREAM else b"one")
        if kind != socket.SOCK_STREAM:
            assert b.recv(100, socket.MSG_DONTWAIT) == b"two"
        assert a.recv(100, socket.MSG_DONTWAIT) == b"back"
        a.send(b"on it goes")
        assert b.recv(100) == b"on it goes"


def test_descriptors_in_flight_and_shutdown(again):
    def prepare():
        a, b = socket.socketpair()
        _, write_end = os.pipe()
        a.sendall(b"plain text")
        a.sendmsg([b"with fd"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [write_end]))])
        a.sendall(b"after")
        os.close(write_end)
        a.shutdown(socket.SHUT_WR)
        return a, b

    r = again(prepare)
    with r.socket(4) as b:
        data, fds, _, _ = socket.recv_fds(b, 10, 4)
        assert (data, fds) == (b"plain text", [])
        data, fds, _, _ = socket.recv_fds(b, 100, 4)
        assert data == b"with fd" and len(fds) == 1
        os.write(fds[0], b"reached")
        os.close(fds[0])
        assert os.read(r[5], 100) == b"reached"
        assert b.recv(100) == b"after"
        assert b.recv(100) == b""


def test_a_socket_whose_peer_is_gone(again):
    def prepare():
        a, b = socket.socketpair()
        a.sendall(b"last words")
        a.close()
        return b

    r = again(prepare)
    with r.socket(4) as b:
        assert b.recv(100) == b"last words"
        assert b.recv(100) == b""


def test_listening_accepted_and_bound_sockets(again, tmp_path):
    path = str(tmp_path / "sock")

    def prepare():
        server = socket.socket(socket.AF_UNIX)
        server.bind(path)
        server.listen(7)
        client = socket.socket(socket.AF_UNIX)
        client.connect(path)
        accepted, _ = server.accept()
        client.sendall(b"request")
        bound = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        bound.bind(f"\0snap-test-{os.getpid()}")
        sender = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        sender.connect(bound.getsockname())
        sender.send(b"datagram")
        return server, client, accepted, bound, sender

    r = again(prepare)
    with r.socket(5) as accepted, r.socket(4) as client, r.socket(3) as server:
        assert accepted.recv(100) == b"request"
        assert accepted.getsockname() == path == client.getpeername()
        fresh = socket.socket(socket.AF_UNIX)
        fresh.connect(path)
        server.accept()[0].close()
        fresh.close()
    with r.socket(6) as bound, r.socket(7) as sender:
        assert bound.recv(100, socket.MSG_DONTWAIT) == b"datagram"
        sender.send(b"next")
        assert bound.recv(100, socket.MSG_DONTWAIT) == b"next"


def test_a_socket_renamed_since_it_was_bound_is_reached_by_its_new_name(again, tmp_path):
    first, path = str(tmp_path / "sock.new"), str(tmp_path / "sock")

    def prepare():
        server = socket.socket(socket.AF_UNIX)
        server.bind(first)
        os.rename(first, path)
        server.listen(7)
        client = socket.socket(socket.AF_UNIX)
        client.connect(path)
        accepted, _ = server.accept()
        client.sendall(b"request")
        mailbox = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        mailbox.bind(first)
        os.rename(first, path + ".mail")
        sender = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        sender.connect(path + ".mail")
        sender.send(b"datagram")
        return server, client, accepted, mailbox, sender

    r = again(prepare)
    assert sorted(os.listdir(tmp_path)) == ["sock", "sock.mail"]
    with r.socket(3) as server, r.socket(4) as client, r.socket(5) as accepted:
        assert server.getsockname() == first == client.getpeername()
        assert accepted.recv(100) == b"request"
        with socket.socket(socket.AF_UNIX) as fresh:
            fresh.connect(path)
            server.accept()[0].close()
    with r.socket(6) as mailbox, r.socket(7) as sender:
        assert mailbox.recv(100, socket.MSG_DONTWAIT) == b"datagram"
        sender.send(b"next")
        assert mailbox.recv(100, socket.MSG_DONTWAIT) == b"next"


def test_what_has_the_name_that_a_socket_was_bound_under_is_a_conflict(tmp_path):
    def prepare():
        server = socket.socket(socket.AF_UNIX)
        server.bind(str(tmp_path / "new"))
        os.rename(tmp_path / "new", tmp_path / "sock")
        return server

    with child(prepare) as pid:
        ctx = dump(pid)
    (tmp_path / "new").write_text("somebody's")
    with pytest.raises(RestoreConflictError, match=r"new.*cannot bind the job's socket"):
        Restored(ctx, pid)
    assert (tmp_path / "new").read_text() == "somebody's"


def test_tcp_listener_and_udp(again):
    ports: list[int] = []

    def prepare():
        server = socket.socket(socket.AF_INET)
        server.bind(("127.0.0.1", 0))
        server.listen(5)
        udp = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
        udp.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 100_000)
        udp.bind(("::1", 0))
        return server, udp

    r = again(prepare)
    with r.socket(3) as server, r.socket(4) as udp:
        port = server.getsockname()[1]
        assert port and not ports
        with socket.create_connection(("127.0.0.1", port)):
            server.accept()[0].close()
        assert udp.getsockname()[0] == "::1"
        assert udp.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) == 200_000


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_connections_of_the_old_job_do_not_keep_its_address(family):
    """They linger in TIME_WAIT, and those that lack SO_REUSEADDR let nobody bind."""

    def serve():
        server = socket.socket(family)
        server.bind(("127.0.0.1" if family == socket.AF_INET else "", 0))
        server.listen(5)
        port = server.getsockname()[1]
        client = socket.create_connection(("127.0.0.1", port))
        server.accept()[0].close()  # the side that closes first lingers
        client.close()
        return server

    with child(serve) as pid:
        ctx = dump(pid)
    r = Restored(ctx, pid)
    with r.socket(3) as server:
        assert not server.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR)
        with socket.create_connection(("127.0.0.1", server.getsockname()[1])):
            server.accept()[0].close()
    r.opening.close()


def test_a_tcp_connection_that_has_ended(again):
    def prepare():
        with socket.create_server(("127.0.0.1", 0)) as server:
            client = socket.create_connection(server.getsockname())
            accepted, _ = server.accept()
        accepted.shutdown(socket.SHUT_WR)
        client.shutdown(socket.SHUT_WR)
        assert client.recv(1) == b"" == accepted.recv(1)
        return client, accepted

    r = again(prepare)
    for fd in (4, 5):
        with r.socket(fd) as sock:
            assert sock.recv(1) == b""
            with pytest.raises(BrokenPipeError):
                sock.send(b"x", socket.MSG_NOSIGNAL)


def test_an_address_that_the_machine_does_not_have(again):
    def prepare():
        sock = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
        sock.setsockopt(socket.IPPROTO_IP, 15, 1)  # IP_FREEBIND
        sock.bind(("2001:db8::ff00:42:8329", 0))
        sock.setsockopt(socket.IPPROTO_IP, 15, 0)
        return sock

    with again(prepare).socket(3) as sock:
        assert sock.getsockname()[0] == "2001:db8::ff00:42:8329"
        assert sock.getsockopt(socket.IPPROTO_IP, 15) == 0


def test_an_address_that_somebody_else_has_is_a_conflict(tmp_path):
    def prepare():
        tcp = socket.socket()
        tcp.bind(("127.0.0.1", 0))
        tcp.listen()
        unix = socket.socket(socket.AF_UNIX)
        unix.bind(str(tmp_path / "sock"))
        unix.listen()
        return tcp, unix

    with child(prepare) as pid:
        ctx = dump(pid)
        with open(f"/proc/{pid}/net/tcp", encoding="ascii") as file:
            assert file.read()
        (tcp,) = [d.inet for d in ctx.images["files"].descriptions if d.HasField("inet")]
        with pytest.raises(RestoreConflictError, match=f"process {pid}.*; .*process {pid}"):
            Restored(ctx, pid)
    port = int(tcp.source.split()[1])
    r = Restored(ctx, pid)
    with r.socket(3) as again:
        assert again.getsockname() == ("127.0.0.1", port)
    r.opening.close()


def server_at(address, folder="/"):
    def prepare():
        os.chdir(folder)
        server = socket.socket(socket.AF_UNIX)
        server.bind(address)
        server.listen()
        return server

    return prepare


def test_an_abstract_address_that_somebody_else_has_is_a_conflict():
    prepare = server_at(f"\0snap-tests-{os.getpid()}")
    with child(prepare) as pid:
        ctx = dump(pid)
    with child(prepare) as other, pytest.raises(RestoreConflictError, match=f"process {other} .* serves"):
        Restored(ctx, pid)


def test_the_same_relative_address_elsewhere_is_no_conflict(again, tmp_path):
    """Two jobs of one program, each in its own directory."""
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    with child(server_at("sock", tmp_path / "there")):
        r = again(server_at("sock", tmp_path / "here"))
        with r.socket(3) as server, socket.socket(socket.AF_UNIX) as caller:
            assert server.getsockname() == "sock"
            caller.connect(str(tmp_path / "here" / "sock"))
            server.accept()[0].close()


def test_an_address_that_leads_to_somebody_no_more_is_no_conflict(again, tmp_path):
    """He bound it, it was unlinked, and the job bound it anew."""
    path = str(tmp_path / "sock")
    with child(server_at(path)):
        os.unlink(path)
        r = again(server_at(path))
        with r.socket(3) as server, socket.socket(socket.AF_UNIX) as caller:
            caller.connect(path)
            server.accept()[0].close()


def test_somebody_who_has_the_address_of_an_unlinked_socket_is_no_conflict(again, tmp_path):
    """The job's is bound where nobody sees it."""
    path = str(tmp_path / "sock")

    def prepare():
        server = server_at(path)()
        os.unlink(path)
        return server

    with child(server_at(path)):
        os.rename(path, path + ".other")
        r = again(prepare)
        os.rename(path + ".other", path)
        with r.socket(3) as server:
            assert server.getsockname() == path


@pytest.fixture
def public():
    """A directory where everybody may write; those of pytest are its own."""
    with tempfile.TemporaryDirectory(prefix="snap-test-") as folder:
        os.chmod(folder, 0o777)
        yield pathlib.Path(folder)


def bound_by(path, uid, gid, mode=0o640):
    """prepare() for a listening socket that another user has bound."""

    def prepare():
        server = socket.socket(socket.AF_UNIX)
        os.umask(0)
        os.setegid(gid)
        os.seteuid(uid)
        server.bind(str(path))
        os.chmod(path, mode)
        os.seteuid(0)
        os.setegid(0)
        server.listen(1)
        return server

    return prepare


@pytest.mark.requires("root")
def test_a_bound_socket_keeps_owner_and_mode(again, public):
    path = public / "sock"
    r = again(bound_by(path, 1234, 2345))
    node = path.stat()
    assert (node.st_uid, node.st_gid, stat.S_IMODE(node.st_mode)) == (1234, 2345, 0o640)
    with r.socket(3) as server, socket.socket(socket.AF_UNIX) as client:
        assert server.getsockname() == str(path)
        client.connect(str(path))


@pytest.mark.requires("root")
def test_a_socket_that_root_bound_and_gave_away(again, public):
    public.chmod(0o755)
    path = public / "sock"

    def prepare():
        server = bound_by(path, 0, 0)()
        os.chown(path, 1234, 2345)
        return server

    again(prepare)
    node = path.stat()
    assert (node.st_uid, node.st_gid, stat.S_IMODE(node.st_mode)) == (1234, 2345, 0o640)


@pytest.mark.requires("root")
def test_a_users_socket_reaches_no_further_than_he_does(public):
    own, roots = public / "own", public / "roots"
    own.mkdir()
    os.chown(own, 1234, 1234)
    roots.mkdir()
    roots.chmod(0o755)
    with child(bound_by(own / "sock", 1234, 1234)) as pid:
        ctx = dump(pid)
    own.rename(public / "aside")
    own.symlink_to(roots)
    with pytest.raises(RestoreConflictError, match="directory of the job's socket"):
        Restored(ctx, pid)
    assert not list(roots.iterdir())
    # An address that held a link all along is followed by nobody but its owner.
    own.unlink()
    (public / "aside").rename(own)
    link = public / "link"
    link.symlink_to(own)
    with child(bound_by(link / "other", 1234, 1234)) as pid:
        ctx = dump(pid)
    Restored(ctx, pid).opening.close()
    link.unlink()
    link.symlink_to(roots)
    with pytest.raises(RestoreConflictError, match="another directory"):
        Restored(ctx, pid)
    assert not list(roots.iterdir())


@pytest.mark.requires("root")
def test_the_node_is_made_with_its_owners_rights(public, monkeypatch):
    """The links of its address change after they were looked at."""
    own, roots, link = public / "own", public / "roots", public / "link"
    own.mkdir()
    os.chown(own, 1234, 1234)
    roots.mkdir()
    roots.chmod(0o755)
    link.symlink_to(own)
    with child(bound_by(link / "sock", 1234, 1234)) as pid:
        ctx = dump(pid)
    real = unixnode._make

    def swap(*args):
        link.unlink()
        link.symlink_to(roots)
        return real(*args)

    monkeypatch.setattr(unixnode, "_make", swap)
    with pytest.raises((RestoreConflictError, PermissionDeniedError)):
        Restored(ctx, pid)
    assert not list(roots.iterdir())


def test_a_queued_datagram_keeps_its_senders_address(again):
    def prepare():
        receiver = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        receiver.bind(b"\0snap-test-receiver")
        there = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        there.bind(b"\0snap-test-there")
        there.sendto(b"still here", receiver.getsockname())
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as gone:
            gone.bind(b"\0snap-test-gone")
            gone.sendto(b"gone", receiver.getsockname())
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as nameless:
            nameless.sendto(b"nameless", receiver.getsockname())
        return receiver, there

    r = again(prepare)
    with r.socket(3) as receiver, r.socket(4) as there:
        assert receiver.recvfrom(100) == (b"still here", b"\0snap-test-there")
        assert receiver.recvfrom(100) == (b"gone", b"\0snap-test-gone")
        assert receiver.recvfrom(100)[0] == b"nameless"
        there.sendto(b"more", receiver.getsockname())
        assert receiver.recvfrom(100) == (b"more", b"\0snap-test-there")


def test_empty_datagrams_survive_a_second_take():
    def prepare():
        one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        one.send(b"")
        one.send(b"then this")
        other.send(b"first")
        other.send(b"")
        return one, other

    with child(prepare) as pid:
        warnings = dump(pid).warnings
        assert len([text for text in warnings if "empty datagram" in text]) == 1
        ctx = dump(pid)
    queues = [[m.data for m in d.unix.queue] for d in ctx.images["files"].descriptions if d.HasField("unix")]
    assert sorted(queues) == [[b"", b"then this"], [b"first"]]


@pytest.mark.parametrize("flags", [0, socket.MSG_MORE])
def test_an_unfinished_datagram_is_refused(flags):
    def prepare():
        udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        udp.connect(("127.0.0.1", 9))
        if not flags:
            udp.setsockopt(socket.IPPROTO_UDP, 1, 1)
        udp.send(b"half", flags)
        return udp

    with child(prepare) as pid, pytest.raises(UnsupportedError, match="unfinished datagram"):
        dump(pid)
