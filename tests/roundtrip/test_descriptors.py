"""Descriptors of real jobs through the engine: terminals, shells, processes that share what they have open."""

from __future__ import annotations

import contextlib
import os
import pathlib
import pty
import select
import signal
import socket
import subprocess
import sys
import termios
import textwrap

import pytest

from checkpoint.check import check
from checkpoint.resources import files
from snapshotter.base.errors import RestoreConflictError, UnsupportedError
from tests import memory_store
from tests.jobs import is_running, reap, reap_all, signal_tree, state, tree, wait_until

pytestmark = pytest.mark.requires("root")

ECHO = textwrap.dedent("""
    import os, sys
    print("ready", os.getpid(), flush=True)
    n = 0
    for line in sys.stdin:
        n += 1
        print("line", n, line.strip(), os.tcgetpgrp(0) == os.getpgrp(), os.getsid(0) == os.getpid(), flush=True)
""")


def read_until(fd: int, text: bytes, seconds: float = 20) -> bytes:
    got = b""
    while text not in got:
        ready, _, _ = select.select([fd], [], [], seconds)
        assert ready, f"no {text!r} within {seconds} s, only {got!r}"
        got += os.read(fd, 4096)
    return got


@pytest.fixture
def on_terminal():
    """A job on a terminal of its own: (pid, master)."""
    made = []

    def run(*command: str) -> tuple[int, int]:
        pid, master = pty.fork()
        if pid == 0:
            os.execv(command[0], command)
        made.append((pid, master))
        return pid, master

    yield run
    for pid, master in made:
        signal_tree(pid)
        with contextlib.suppress(OSError):
            os.close(master)
    wait_until(lambda: reap_all() or not any(state(pid) for pid, _ in made), "jobs gone")


def test_a_job_on_a_terminal_goes_on_there(on_terminal):
    pid, master = on_terminal(sys.executable, "-c", ECHO)
    read_until(master, b"ready")
    os.write(master, b"one\n")
    assert b"line 1 one True True" in read_until(master, b"True True")
    settings = termios.tcgetattr(master)
    settings[3] &= ~termios.ECHO
    termios.tcsetattr(master, termios.TCSANOW, settings)
    point = memory_store.take(pid, after="kill")
    reap(pid)
    result = memory_store.rollback(point)
    os.write(master, b"two\n")
    assert b"line 2 two True True" in read_until(master, b"True True"), result.warnings
    assert termios.tcgetattr(master)[3] == settings[3], "the terminal's settings"
    assert is_running(pid)


def test_a_terminal_that_a_shell_outside_the_job_reads_too_is_named(on_terminal):
    shell, master = on_terminal("/bin/sh", "-c", f'{sys.executable} -c "$0"; read x', ECHO)
    read_until(master, b"ready")
    (job,) = tree(shell)[1:]
    point = memory_store.take(job, after="kill")
    wait_until(lambda: not state(job), "the shell has reaped the job")
    result = memory_store.rollback(point)
    try:
        (warning,) = [text for text in result.warnings if "what is typed" in text]
        assert f"process {shell} (sh)" in warning
        assert "roll back from a shell on that terminal" in warning
    finally:
        os.kill(job, signal.SIGKILL)
        reap(job)


def test_a_terminal_that_is_gone_is_a_choice(on_terminal):
    pid, master = on_terminal(sys.executable, "-c", ECHO)
    read_until(master, b"ready")
    point = memory_store.take(pid, after="kill")
    reap(pid)
    os.close(master)
    with pytest.raises(RestoreConflictError, match="terminal"):
        memory_store.rollback(point)
    assert not is_running(pid)
    result = memory_store.rollback(point, terminal="null")
    assert any("/dev/null" in warning for warning in result.warnings)


def test_a_shell_pipeline(tmp_path, on_terminal):
    out = tmp_path / "out"
    script = f"trap '' HUP; i=0; while :; do i=$((i+1)); echo $i; sleep 0.01; done | (while read x; do echo $x > {out}; done)"
    pid = os.posix_spawn(
        "/bin/sh",
        ["sh", "-c", script],
        os.environ,
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, str(tmp_path / "log"), os.O_WRONLY | os.O_CREAT, 0o600),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ],
        setsid=True,
    )
    try:
        count = lambda: int(out.read_text().strip() or 0) if out.exists() else 0  # noqa: E731
        wait_until(lambda: count() > 5, "the pipeline runs")
        point = memory_store.take(pid, after="kill")
        reap(pid)
        reap_all()
        before = count()
        memory_store.rollback(point)
        wait_until(lambda: count() > before + 5, "the pipeline goes on")
        assert count() < before + 5000
    finally:
        signal_tree(pid)
        wait_until(lambda: reap_all() or not state(pid), "job gone")


def piped(first: list[str], second: list[str], log: pathlib.Path) -> tuple[int, int]:
    """Two processes in sessions of their own with a pipe between them; the second writes to `log`."""
    read_end, write_end = os.pipe()
    job = os.posix_spawn(
        first[0],
        first,
        {},
        file_actions=[(os.POSIX_SPAWN_DUP2, write_end, 1)],
        setsid=True,
        setsigdef=[signal.SIGPIPE],
    )
    actions = [
        (os.POSIX_SPAWN_DUP2, read_end, 0),
        (os.POSIX_SPAWN_OPEN, 1, str(log), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600),
    ]
    reader = os.posix_spawn(second[0], second, {}, file_actions=actions, setsid=True)
    os.close(read_end)
    os.close(write_end)
    return job, reader


COUNT = ["/bin/sh", "-c", "i=0; while i=$((i+1)); do echo $i; /bin/sleep 0.01; done"]


@pytest.mark.parametrize("alive", [True, False])
def test_a_pipe_to_a_process_outside(tmp_path, alive):
    """A living job is replaced without its reader noticing; a reader that has ended leaves a closed pipe."""
    log = tmp_path / "log"
    lines = lambda: log.read_text().splitlines() if log.exists() else []  # noqa: E731
    job, reader = piped(COUNT, ["/bin/cat"], log)
    try:
        wait_until(lambda: len(lines()) > 5, "the job writes")
        point = memory_store.take(job)
        assert any(f"process {reader} (cat)" in warning for warning in point.result.warnings)
        if alive:
            mark = len(lines())
            memory_store.rollback(point)
            wait_until(lambda: len(lines()) > mark + 10, "the job writes to the same reader")
            assert is_running(reader)
        else:
            signal_tree(job)
            reap(job)
            reap(reader)
            reap_all()
            result = memory_store.rollback(point)
            assert any("has ended" in warning for warning in result.warnings)
            wait_until(lambda: not is_running(job), "the job ends of SIGPIPE")
    finally:
        for one in (job, reader):
            signal_tree(one)
        wait_until(lambda: reap_all() or not any(map(state, (job, reader))), "all gone")


def test_a_socket_to_the_outside_is_refused_by_name():
    ours, theirs = socket.socketpair()
    pid = os.posix_spawn(
        "/bin/sleep",
        ["sleep", "1000"],
        {},
        file_actions=[(os.POSIX_SPAWN_DUP2, theirs.fileno(), 5)],
        setsid=True,
    )
    theirs.close()
    try:
        report = check(pid)
        assert any("outside the job" in f.what and "descriptor 5" in f.where for f in report.findings)
        with pytest.raises(UnsupportedError, match="outside the job"):
            memory_store.take(pid)
        assert is_running(pid)
    finally:
        ours.close()
        os.kill(pid, signal.SIGKILL)
        reap(pid)


BEARING = """
import os, signal, socket, sys, time
def bear():
    ours, theirs = socket.socketpair()
    if os.fork() == 0:
        os.close(ours.fileno())
        while True: time.sleep(1000)
    kept.append(ours)
    theirs.close()
    os.write(1, b"b")
kept = []
# Waited for, not handled: a handler of Python's would wait for the end of a sleep that begins just then.
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
os.write(1, b"r")
while True:
    signal.sigwait([signal.SIGUSR1])
    bear()
"""


def test_a_child_born_while_it_is_looked_at_is_not_the_outside(monkeypatch):
    job = subprocess.Popen(
        [sys.executable, "-c", BEARING], stdin=-3, stdout=subprocess.PIPE, start_new_session=True
    )
    look, left = files.look_job, [1]

    def look_job(pids, report):
        if left.pop():
            left[:] = [0] * 10
            os.kill(job.pid, signal.SIGUSR1)
            assert job.stdout.read(1) == b"b"
        look(pids, report)

    try:
        assert job.stdout.read(1) == b"r"
        monkeypatch.setattr(files, "look_job", look_job)
        report = check(job.pid)
        assert report.findings == []
        assert report.pids == tree(job.pid) != [job.pid]
    finally:
        signal_tree(job.pid)
        job.wait()
        job.stdout.close()
        reap_all()
