"""Who a unix socket says is at its other end: a server grants by it, so a client must never look like root after a rollback."""

from __future__ import annotations

import json
import os
import signal
import socket
import struct

import pytest

from checkpoint.kernel.sys import pidfd_getfd
from tests import memory_store
from tests.jobs import is_running, wait_until
from tests.roundtrip.engine_jobs import kill

pytestmark = pytest.mark.requires("root")

NOBODY = 65534
JOB = """
import json, os, signal, socket, struct, sys, time
def peer(sock):
    pid, uid, gid = struct.unpack("=iII", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    try: raw = sock.getsockopt(socket.SOL_SOCKET, 59, 1024)
    except OSError: raw = b""
    return [pid, uid, gid, sorted(struct.unpack(f"={len(raw) // 4}I", raw))]
def drop():
    os.setgroups([7, 65533]); os.setgid(65534); os.setuid(65534)
def tell(kept, name, and_messages=()):
    found = {key: peer(sock) for key, sock in kept.items()}
    for key, sock in and_messages:
        text, ancillary, _, _ = sock.recvmsg(9, 100)
        found[key] = [text.decode(), *[struct.unpack("=iII", value) for _, kind, value in ancillary if kind == 2]]
    with open(name + ".new", "w") as file: json.dump(found, file)
    os.rename(name + ".new", name)
def wait(kept, name, messages=()):
    signal.signal(signal.SIGUSR1, lambda *_: tell(kept, name + "-after", messages))
    tell(kept, name)
    while True: time.sleep(0.01)
kinds = {"stream": socket.SOCK_STREAM, "packets": socket.SOCK_SEQPACKET}
listeners = {}
for kind, number in kinds.items():
    for how, address in (("node", kind), ("gone", kind + "-gone"), ("abstract", "\\0snap-test-%d-%s" % (os.getpid(), kind))):
        listeners[kind, how] = listener = socket.socket(socket.AF_UNIX, number)
        path = address if how == "abstract" else os.path.abspath(address)
        listener.bind(path); listener.listen(5)
        if how != "abstract": os.chmod(path, 0o777)
many = {}
os.seteuid(1234)
many["by another user"], other = socket.socketpair()
os.seteuid(0)
many["roots"], another = socket.socketpair()
told = [socket.socketpair() for _ in range(4)]
for ends in told[:3]: ends[1].setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
child = os.fork()
if child == 0:
    drop()
    mine = {}
    for (kind, how), listener in listeners.items():
        mine[f"{kind} {how} client"] = sock = socket.socket(socket.AF_UNIX, kinds[kind])
        sock.connect(listener.getsockname())
    mine["pair"], end = socket.socketpair()
    mine["datagrams"], end2 = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    told[0][0].send(b"living")
    wait(mine, "nobody")
sender = os.fork()
if sender == 0:
    os.setgroups([]); os.setgid(1235); os.setuid(1234)
    told[1][0].send(b"dead")
    os._exit(0)
os.waitpid(sender, 0)
told[3][0].send(b"without")
told[3][1].setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
while not os.path.exists("nobody"): time.sleep(0.01)
for (kind, how), listener in listeners.items():
    if how == "gone" : os.unlink(listener.getsockname())
    many[f"{kind} {how} listener"] = listener
    many[f"{kind} {how} server"] = listener.accept()[0]
made = os.fork()
if made == 0: wait({"inherited": many["roots"]}, "third")
wait(many, "root", [("living", told[0][1]), ("dead", told[1][1]), ("without", told[3][1])])
"""


@pytest.mark.parametrize("killed", [True, False])
def test_who_is_at_the_other_end_is_who_it_was(start, tmp_path, killed):
    for folder in tmp_path.parents[:-2]:
        folder.chmod(folder.stat().st_mode | 0o005)
    tmp_path.chmod(0o777)
    pid = start("/usr/bin/python3", "-c", JOB)
    wait_until(
        lambda: all((tmp_path / name).exists() for name in ("root", "third")) or not is_running(pid),
        "the job is ready",
    )
    assert is_running(pid), (tmp_path / "out").read_text()
    before = {name: json.loads((tmp_path / name).read_text()) for name in ("root", "nobody")}
    client = before["root"]["stream node server"][0]
    assert before["root"]["stream node server"][1:] == [NOBODY, NOBODY, [7, 65533]], (
        "the test tests something"
    )
    point = memory_store.take(pid)
    if killed:
        kill(pid)
    result = memory_store.rollback(point)
    for one in (pid, client):
        os.kill(one, signal.SIGUSR1)
    wait_until(lambda: all((tmp_path / f"{name}-after").exists() for name in before), "both have looked")
    after = {name: json.loads((tmp_path / f"{name}-after").read_text()) for name in before}
    messages = {key: after["root"].pop(key) for key in ("living", "dead", "without")}
    assert after == before
    assert messages["living"] == ["living", [client, NOBODY, NOBODY]]
    assert messages["dead"][0] == "dead"
    assert messages["dead"][1][1:] == [1234, 1235]
    assert messages["without"] == ["without", [0, NOBODY, NOBODY]]
    assert not [text for text in result.warnings if "SO_PEERCRED" in text]


def test_a_maker_that_is_gone_is_told_and_keeps_its_user(start, tmp_path):
    tmp_path.chmod(0o777)
    job = """
import os, socket, sys, time
a, b = socket.socketpair()
here, there = socket.socketpair()
maker = os.fork()
if maker == 0:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
    ends = socket.socketpair()
    socket.send_fds(there, [b"x"], [one.fileno() for one in ends])
    os._exit(0)
fds = socket.recv_fds(here, 1, 2)[1]
os.waitpid(maker, 0)
os.dup2(fds[0], 100)
open("ready", "w").close()
while True: time.sleep(0.01)
"""
    pid = start("/usr/bin/python3", "-c", job)
    wait_until((tmp_path / "ready").exists, "the job is ready")
    point = memory_store.take(pid)
    kill(pid)
    result = memory_store.rollback(point)
    pidfd = os.pidfd_open(pid)
    with socket.socket(fileno=pidfd_getfd(pidfd, 100)) as sock:
        os.close(pidfd)
        raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    assert struct.unpack("=iII", raw)[1:] == (NOBODY, NOBODY)
    assert [text for text in result.warnings if "SO_PEERCRED" in text]
