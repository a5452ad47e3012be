"""Namespaces that are not snap's: refused at the look, after it and for single threads; and what the hints say is true."""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import shlex
import signal
import subprocess

import pytest

from checkpoint import dump
from checkpoint.check import check
from checkpoint.resources import namespaces
from snapshotter.base import faults
from snapshotter.base.errors import UnsupportedError
from tests import memory_store
from tests.jobs import ROOT, SNAP, is_running, reap_all, reaping, signal_tree, state, tree, wait_until

pytestmark = pytest.mark.requires("root", "program:unshare", "program:nsenter")

OPTIONS = {"cgroup": "-C", "ipc": "-i", "mnt": "-m", "net": "-n", "time": "-T", "uts": "-u"}

LEAVES = """
import ctypes, os, signal, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
def leave(*_):
    assert libc.unshare(int(sys.argv[1], 0)) == 0, ctypes.get_errno()
    open("left", "w").close()
def thread():
    leave()
    while True: time.sleep(0.01)
if sys.argv[2] == "thread":
    threading.Thread(target=thread).start()
signal.signal(signal.SIGUSR1, leave)
open("ready", "w").close()
while True: time.sleep(0.01)
"""
NEWUTS, NEWUSER, NEWNET = "0x04000000", "0x10000000", "0x40000000"


@pytest.fixture
def after_the_look(monkeypatch):
    """Something happens between the look and the freeze."""

    def do(what) -> None:
        real = faults.point

        def point(name: str) -> None:
            real(name)
            if name == "dump.looked":
                what()

        monkeypatch.setattr(dump.faults, "point", point)

    return do


def test_a_thread_with_a_namespace_of_its_own(start, tmp_path):
    pid = start("/usr/bin/python3", "-c", LEAVES, NEWNET, "thread")
    wait_until((tmp_path / "left").exists, "the thread has left")
    found = [str(finding) for finding in check(pid).findings]
    assert len(found) == 1
    assert re.search(r"thread \d+: is in another net namespace than snap", found[0])
    with pytest.raises(UnsupportedError, match="another net namespace"):
        memory_store.take(pid)


@pytest.mark.parametrize("flag", [NEWUSER, NEWUTS], ids=["user", "uts"])
def test_a_namespace_left_between_look_and_freeze(start, tmp_path, after_the_look, flag):
    """Capabilities in a user namespace of one's own would be given back as real ones."""
    tmp_path.chmod(0o777)
    ids = {"user": 65534, "group": 65534, "extra_groups": []} if flag == NEWUSER else {}
    pid = start("/usr/bin/python3", "-c", LEAVES, flag, "process", **ids)
    wait_until((tmp_path / "ready").exists, "ready")

    def leave() -> None:
        os.kill(pid, signal.SIGUSR1)
        wait_until((tmp_path / "left").exists, "it has left")

    after_the_look(leave)
    with pytest.raises(UnsupportedError, match=r"is in another (user|uts) namespace than snap"):
        memory_store.take(pid)
    assert is_running(pid)


def test_a_user_namespace_is_found_by_itself_too(start, tmp_path, after_the_look, monkeypatch):
    """Capabilities change with it, which has the process looked at anew. The frozen window asks all the same."""
    monkeypatch.setattr(dump, "program_of", lambda *_: ("always the same",))
    monkeypatch.setattr("checkpoint.check.program_of", lambda *_: ("always the same",))
    test_a_namespace_left_between_look_and_freeze(start, tmp_path, after_the_look, NEWUSER)


def in_namespaces(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        stdin=subprocess.DEVNULL,
        env=dict(os.environ, PYTHONPATH=str(ROOT)),
    )


def said_command(pid: int, name: str) -> list[str]:
    """What the hint for this namespace says to run, with our own way to start snap."""
    hint = next(one.hint for one in check(pid).findings if f"another {name} namespace" in one.what)
    told = re.search(r"(nsenter .*?) snap take", hint)
    assert told, hint
    return [*shlex.split(told[1]), *SNAP]


@pytest.mark.parametrize("name", OPTIONS)
def test_the_way_that_the_hint_shows(start, tmp_path, name):
    pid = start("unshare", OPTIONS[name], "--", "sleep", "1000")
    wait_until(lambda: pathlib.Path(f"/proc/{pid}/comm").read_text() == "sleep\n", "in its namespace")
    way = [*said_command(pid, name), "--store", str(tmp_path / "store")]
    holder = os.open(f"/proc/{pid}/ns/{name}", os.O_RDONLY)  # the namespace lives on, as the hint wants it
    try:
        done = in_namespaces(*way, "take", str(pid))
        assert done.returncode == 0, done.stderr
        with reaping():
            done = in_namespaces(*way, "rollback", "latest")
        assert done.returncode == 0, done.stderr
        assert os.stat(f"/proc/{pid}/ns/{name}").st_ino == os.fstat(holder).st_ino
    finally:
        os.close(holder)


FIRST = """
import os, time
if os.fork() == 0: os.execvp("sleep", ["sleep", "1000"])
open("ready", "w").close()
while True:
    try: os.waitpid(-1, os.WNOHANG)
    except ChildProcessError: pass
    time.sleep(0.01)
"""


@pytest.fixture
def container(tmp_path):
    """The pid of `unshare` around a pid namespace, whose first process waits for its children and has one; both seen from outside."""
    process = subprocess.Popen(
        ["unshare", "-p", "-f", "--mount-proc", "--", "/usr/bin/python3", "-c", FIRST],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=tmp_path,
    )
    wait_until((tmp_path / "ready").exists, "the container is up")
    yield tree(process.pid)
    with contextlib.suppress(ProcessLookupError):
        signal_tree(process.pid)
    process.wait()
    wait_until(lambda: reap_all() or not state(process.pid), "the container gone")


def test_the_first_process_of_a_pid_namespace_is_refused_before_it_is_touched(container, tmp_path):
    _, init, child = container
    way = [*said_command(init, "pid"), "--store", str(tmp_path / "store")]
    for command in ("check", "take"):
        done = in_namespaces(*way, command, "1")
        assert done.returncode == 5, done.stdout + done.stderr
        assert "is the first process of this pid namespace" in done.stdout + done.stderr
    assert tree(init) == [init, child]


def test_a_job_below_it_is_taken_from_inside_as_the_hint_says(container, tmp_path):
    _, init, child = container
    way = [*said_command(child, "pid"), "--store", str(tmp_path / "store")]
    inner = pathlib.Path(f"/proc/{child}/status").read_text().partition("NSpid:")[2].split()[1]
    for _ in range(2):  # the keeper of the first one is a child of the first process by then
        done = in_namespaces(*way, "take", inner)
        assert done.returncode == 0, done.stderr
    done = in_namespaces(
        *way[: way.index("-p") - 1], str(init), *way[way.index("-p") :], "rollback", "latest"
    )
    assert done.returncode == 0, done.stderr
    assert state(init) == "S"


def test_a_job_in_a_pid_namespace_seen_from_outside(container):
    """check and take say the same of it."""
    _, init, _ = container
    findings = [str(one) for one in check(init).findings]
    assert any("another pid namespace" in one for one in findings)
    with pytest.raises(UnsupportedError) as error:
        memory_store.take(init)
    assert [str(one) for one in error.value.findings] == findings


def test_all_kinds_have_a_hint():
    assert {*OPTIONS, "pid"} == set(namespaces._OPTIONS)
