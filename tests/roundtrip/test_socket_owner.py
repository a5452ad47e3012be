"""Whose a socket is after a rollback, and sockets of other network namespaces: a job of nobody's gains no port by them."""

from __future__ import annotations

import json
import os
import signal
import socket

import pytest

from snapshotter.base.errors import RestoreConflictError, UnsupportedError
from tests import memory_store
from tests.jobs import is_running, wait_until
from tests.roundtrip.engine_jobs import kill

pytestmark = pytest.mark.requires("root")

NOBODY = 65534
JOB = """
import json, os, signal, socket, struct, sys, time
roots = socket.socket()
os.setgroups([]); os.setgid(65534); os.setuid(65534)
port = int(sys.argv[1])
kinds = [(family, kind) for family in (socket.AF_INET, socket.AF_INET6) for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM)]
fresh = [socket.socket(family, kind) for family, kind in kinds]
listener = socket.socket(); listener.bind(("127.0.0.1", 0)); listener.listen()
datagrams = socket.socket(type=socket.SOCK_DGRAM); datagrams.bind(("127.0.0.1", 0))
named = socket.socket(socket.AF_UNIX); named.bind(os.path.abspath("named")); named.listen()
client = socket.socket(socket.AF_UNIX); client.connect(os.path.abspath("named")); served = named.accept()[0]
abstract = socket.socket(socket.AF_UNIX); abstract.bind("\\0snap-owner-%d" % os.getpid()); abstract.listen()
lone = socket.socket(socket.AF_UNIX)
pairs = [end for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM) for end in socket.socketpair(type=kind)]
every = [roots, *fresh, listener, datagrams, named, client, served, abstract, lone, *pairs]
def tell(name):
    found = {"owners": [[os.fstat(sock.fileno()).st_uid, os.fstat(sock.fileno()).st_gid] for sock in every], "bound": []}
    for sock in fresh[:2]:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        try:
            sock.bind(("127.0.0.1", port))
            if sock.type == socket.SOCK_STREAM: sock.listen()
            found["bound"].append(True)
        except OSError: found["bound"].append(False)
    with open(name + ".new", "w") as file: json.dump(found, file)
    os.rename(name + ".new", name)
signal.signal(signal.SIGUSR1, lambda *_: tell("after"))
tell("before")
while True: time.sleep(0.01)
"""

FOREIGN = """
import ctypes, os, socket, sys, time
os.setgroups([]); os.setgid(65534); os.setuid(65534)
here, there = socket.socketpair()
child = os.fork()
if child == 0:
    assert ctypes.CDLL(None).unshare(0x10000000 | 0x40000000) == 0
    sock = socket.socket(*eval(sys.argv[1]))
    if sock.family != socket.AF_UNIX: sock.bind(("", 53))
    socket.send_fds(there, [b"x"], [sock.fileno()])
    os._exit(0)
os.waitpid(child, 0)
if sys.argv[2] == "open": fds = socket.recv_fds(here, 1, 1)[1]
open("before", "w").close()
while True: time.sleep(0.01)
"""


def shared_port():
    """Root's services at one port of TCP and UDP, which let others of root's share it."""
    stream, datagrams = socket.socket(), socket.socket(type=socket.SOCK_DGRAM)
    for sock in (stream, datagrams):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    stream.bind(("127.0.0.1", 0))
    datagrams.bind(stream.getsockname())
    stream.listen()
    return stream, datagrams


@pytest.fixture
def run(start, tmp_path):
    for folder in tmp_path.parents[:-2]:
        folder.chmod(folder.stat().st_mode | 0o005)
    tmp_path.chmod(0o777)

    def start_job(*arguments):
        pid = start("/usr/bin/python3", "-c", *arguments)
        wait_until(lambda: (tmp_path / "before").exists() or not is_running(pid), "the job is ready")
        assert is_running(pid), (tmp_path / "out").read_text()
        return pid

    return start_job


def test_a_socket_belongs_to_whom_it_belonged(run, tmp_path):
    stream, datagrams = shared_port()
    with stream, datagrams:
        pid = run(JOB, str(stream.getsockname()[1]))
        before = json.loads((tmp_path / "before").read_text())
        assert before["bound"] == [False, False], "the test tests something"
        assert before["owners"][:2] == [[0, 0], [NOBODY, NOBODY]]
        point = memory_store.take(pid)
        kill(pid)
        memory_store.rollback(point)
        os.kill(pid, signal.SIGUSR1)
        wait_until((tmp_path / "after").exists, "the job has looked")
        assert json.loads((tmp_path / "after").read_text()) == before


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
def test_a_shared_port_that_another_user_has_now_is_a_conflict(run, kind):
    job = """
import os, socket, sys, time
os.setgroups([]); os.setgid(65534); os.setuid(65534)
sock = socket.socket(type=int(sys.argv[1]))
sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
sock.bind(("127.0.0.1", int(sys.argv[2])))
if sock.type == socket.SOCK_STREAM: sock.listen()
open("before", "w").close()
while True: time.sleep(0.01)
"""
    stream, datagrams = shared_port()
    port = stream.getsockname()[1]
    stream.close()
    datagrams.close()
    pid = run(job, str(int(kind)), str(port))
    point = memory_store.take(pid)
    kill(pid)
    memory_store.rollback(point)
    kill(pid)
    holder = os.fork()
    if holder == 0:
        with socket.socket(type=kind) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            sock.bind(("127.0.0.1", port))
            if kind == socket.SOCK_STREAM:
                sock.listen()
            signal.pause()
    try:
        name = "tcp" if kind == socket.SOCK_STREAM else "udp"
        with open(f"/proc/net/{name}") as file:
            wait_until(lambda: file.seek(0) == 0 and f":{port:04X} " in file.read(), "root has the port")
        with pytest.raises(RestoreConflictError, match=f"process {holder} .*uses the address"):
            memory_store.rollback(point)
    finally:
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)


@pytest.mark.parametrize("where", ["open", "queued"])
@pytest.mark.parametrize("arguments", ["2, 1", "2, 2", "10, 1", "10, 2", "1, 1"])
def test_a_socket_of_another_network_namespace_is_refused(run, arguments, where):
    pid = run(FOREIGN, arguments, where)
    with pytest.raises(UnsupportedError, match="socket of another network namespace") as refused:
        memory_store.take(pid)
    assert len(refused.value.findings) == 1
    assert is_running(pid)
