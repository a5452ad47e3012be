"""Calls that a freeze has cut short: an attendant has the rest done, and whatever happens to it or to snap no byte comes twice or is lost."""

from __future__ import annotations

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from checkpoint import transfers
from checkpoint.freeze import FrozenTree
from checkpoint.parasite import attending, parked
from snapshotter.base import faults
from tests.jobs import reap, state, wait_until

pytestmark = pytest.mark.requires("root")

SIZE, PERIOD = 1_000_000, 251
WRITER = f"""
import os, signal, sys
signal.signal(signal.SIGUSR1, lambda *_: os.write(2, b"handled\\n"))
pattern, at = memoryview(bytes(range({PERIOD})) * {SIZE // PERIOD + 2}), 0
while True:
    done = os.write(1, pattern[at % {PERIOD} : at % {PERIOD} + {SIZE}])
    at += done
    os.write(2, b"%d\\n" % done)
"""


class Writer:
    """A process that writes a pattern to a pipe, SIZE bytes at a time, and says what each write has returned."""

    def __init__(self, directory: pathlib.Path) -> None:
        self.log = directory / "log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", WRITER], stdout=subprocess.PIPE, stderr=log, stdin=subprocess.DEVNULL,
                start_new_session=True,
            )  # fmt: skip
        self.pid = self.process.pid
        self.read = 0
        self.expect()

    def tracer(self) -> int:
        text = pathlib.Path(f"/proc/{self.pid}/status").read_text()
        return int(text.split("TracerPid:")[1].split()[0])

    def expect(self, nr_bytes: int = 300_000) -> None:
        """Read so many bytes and wait until the writer is blocked again; they are the right ones."""
        assert self.process.stdout is not None
        end = self.read + nr_bytes
        while self.read < end:
            got = os.read(self.process.stdout.fileno(), end - self.read)
            assert got == bytes((self.read + at) % PERIOD for at in range(len(got)))
            self.read += len(got)
        wait_until(lambda: state(self.pid) in "St", "blocked in write")

    def attended(self, other_than: int = 0) -> int:
        def by() -> int:
            tracer = self.tracer()
            if state(self.pid) != "S" or not pathlib.Path(f"/proc/{self.pid}/syscall").read_text().startswith(
                "1 "
            ):
                return 0  # not in write again: it may still be parked
            return tracer if tracer != other_than and attending.is_attendant(tracer) else 0

        return int(wait_until(by, "attended"))

    def said(self) -> list[str]:
        return self.log.read_text().split()


@pytest.fixture
def writer(tmp_path):
    made = Writer(tmp_path)
    yield made
    made.process.kill()
    made.process.communicate()
    wait_until(lambda: not attendants(), "the attendants have ended")


def attendants() -> list[int]:
    ours = [int(path.name) for path in pathlib.Path("/proc").glob("[0-9]*")]
    return [pid for pid in ours if attending.is_attendant(pid) and _parent(pid) == os.getpid()]


def _parent(pid: int) -> int:
    text = pathlib.Path(f"/proc/{pid}/stat").read_text(errors="replace")
    return int(text.rsplit(")", 1)[1].split()[1])


def freeze(pid: int) -> None:
    with FrozenTree(pid):
        pass


def test_every_write_is_whole(writer):
    for _ in range(12):
        freeze(writer.pid)
        writer.attended()
        freeze(writer.pid)  # takes it from its attendant
        writer.expect()
    assert len(writer.said()) > 2
    assert set(writer.said()) == {str(SIZE)}


def test_the_guard_takes_over(writer):
    freeze(writer.pid)
    first = writer.attended()
    os.kill(first, signal.SIGKILL)
    writer.attended(other_than=first)
    writer.expect(1_500_000)
    assert set(writer.said()) == {str(SIZE)}


def test_an_attendant_that_comes_late(writer, tmp_path, monkeypatch):
    """On a machine under load it may take seconds to start."""
    late = tmp_path / attending.BINARY.name
    late.write_text(f"#!/bin/sh\nsleep 3\nexec {attending.BINARY}\n")
    late.chmod(0o700)
    monkeypatch.setattr(attending, "BINARY", late)
    freeze(writer.pid)
    writer.attended()
    writer.expect(1_500_000)
    assert set(writer.said()) == {str(SIZE)}


def test_a_handler_ends_the_write(writer):
    """As without snap: the handler runs, the write returns what it has done."""
    freeze(writer.pid)
    writer.attended()
    os.kill(writer.pid, signal.SIGUSR1)
    wait_until(lambda: "handled" in writer.said(), "the handler ran")
    wait_until(lambda: len(writer.said()) > 1, "the write has returned")
    assert 0 < int(next(word for word in writer.said() if word != "handled")) < SIZE
    writer.expect(2_000_000)


def test_a_signal_that_is_ignored_does_not(writer):
    freeze(writer.pid)
    writer.attended()
    for _ in range(5):
        os.kill(writer.pid, signal.SIGWINCH)
        writer.expect(50_000)
    writer.expect(1_000_000)
    assert set(writer.said()) == {str(SIZE)}


def test_stopped_and_continued(writer):
    freeze(writer.pid)
    writer.attended()
    os.kill(writer.pid, signal.SIGSTOP)
    wait_until(lambda: state(writer.pid) == "T", "stopped")
    freeze(writer.pid)
    assert state(writer.pid) == "T"
    os.kill(writer.pid, signal.SIGCONT)
    writer.expect(2_000_000)


def test_killed_while_attended(writer):
    freeze(writer.pid)
    writer.attended()
    writer.process.kill()
    assert writer.process.wait(10) == -signal.SIGKILL


@pytest.mark.parametrize("again", [False, True], ids=["at once", "taken again"])
@pytest.mark.parametrize(
    "name",
    ["thaw.begin", "parked.frames", "parked.redirected", "parked.blocked", "attend.parked", "attend.started"],
)
def test_snap_killed(writer, name, again, monkeypatch):
    """The write may return less: as much as it has done."""
    monkeypatch.setattr(parked, "PATIENCE_MS", 1000)
    child = os.fork()
    if child == 0:
        faults.configure(f"{name}:kill")
        freeze(writer.pid)
        os._exit(0)
    assert os.WTERMSIG(reap(child)) == signal.SIGKILL
    if again:
        freeze(writer.pid)
    writer.expect(2_500_000)


MOVING = f"""
import os, socket, sys
how = sys.argv[1]
if how == "pipe":
    r, w = os.pipe()
    receive = lambda: os.read(r, 4096)
else:
    a, b = socket.socketpair()
    r, w = a.fileno(), b.fileno()
    receive = (lambda: a.recv({SIZE}, socket.MSG_WAITALL)) if how == "waitall" else (lambda: os.read(r, 4096))
data, log = bytes({SIZE}), os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
if os.fork() == 0:
    while True:
        if (done := os.write(w, data)) != {SIZE}:
            os.write(log, b"write %d\\n" % done)
total = 0
while True:
    got = receive()
    if how == "waitall" and len(got) != {SIZE}:
        os.write(log, b"recv %d\\n" % len(got))
    total += len(got)
    os.pwrite(1, b"%20d" % total, 0)
"""


@pytest.mark.parametrize("how", ["pipe", "unix", "waitall"])
@pytest.mark.parametrize("stop", ["settle", "freeze"])
def test_both_sides_at_full_speed(tmp_path, how, stop):
    """Then a task is mostly in the middle of copying, not asleep, and every kind of stop must leave its call whole."""
    log, count = tmp_path / "log", tmp_path / "count"
    with count.open("wb") as out:
        running = subprocess.Popen(
            [sys.executable, "-c", MOVING, how], stdout=out, stdin=subprocess.DEVNULL, cwd=tmp_path, start_new_session=True
        )  # fmt: skip

    def moved() -> int:
        return int(count.read_text() or "0")

    try:
        for _ in range(40):
            before = moved()
            wait_until(lambda before=before: moved() > before + 3 * SIZE, "bytes flow")
            if stop == "settle":
                assert transfers.settle(running.pid, 5.0, pytest.fail)
            else:
                freeze(running.pid)
        before = moved()
        wait_until(lambda: moved() > before + 10 * SIZE, "bytes still flow")
        assert log.read_text() == ""
    finally:
        os.killpg(running.pid, signal.SIGKILL)
        running.wait()
    wait_until(lambda: not attendants(), "the attendants have ended")


MESSAGES = """
import ctypes, os, socket, struct
a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
if os.fork() == 0:
    import time
    while True:
        b.send(b"x")
        time.sleep(0.01)
libc = ctypes.CDLL(None, use_errno=True)
buffer = ctypes.create_string_buffer(4)
part = ctypes.create_string_buffer(struct.pack("QQ", ctypes.addressof(buffer), 4))
header = struct.pack("QIIQQQQiiii", 0, 0, 0, ctypes.addressof(part), 1, 0, 0, 0, 0, 0, 0)
while True:
    headers = ctypes.create_string_buffer(header * 100)
    ctypes.set_errno(0)
    got = libc.recvmmsg(a.fileno(), headers, 100, 0, None)
    os.write(1, b"%d %d\\n" % (got, ctypes.get_errno()))
"""


def test_no_error_stays_on_a_socket_that_several_messages_are_received_from(tmp_path):
    """The batch may be short, but the next call must not fail with 512."""
    out = tmp_path / "out"
    with out.open("wb") as file:
        running = subprocess.Popen(
            [sys.executable, "-c", MESSAGES], stdout=file, stdin=subprocess.DEVNULL, start_new_session=True
        )
    try:
        for number in range(1, 6):
            wait_until(lambda number=number: out.read_text().count("\n") >= 2 * number, "batches come")
            time.sleep(0.2)  # in the middle of one
            freeze(running.pid)
        lines = out.read_text().count("\n")
        wait_until(lambda: out.read_text().count("\n") > lines + 1, "and still come")
    finally:
        os.killpg(running.pid, signal.SIGKILL)
        running.wait()
    found = out.read_text().splitlines()
    assert any(line != "100 0" for line in found)
    assert all(int(line.split()[0]) > 0 and line.endswith(" 0") for line in found)
