"""The limit of a job's standing still: a file server that stalls, a snap that is stopped, a snap that dawdles."""

from __future__ import annotations

import contextlib
import ctypes
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from tests.jobs import (
    DEADLINE_S,
    ROOT,
    SNAP,
    SnapFailedError,
    is_running,
    reap,
    reaping,
    snap,
    state,
    wait_until,
)

pytestmark = pytest.mark.requires("root")

LIMIT_S = 1.0
SLACK_S = 1.0
"""The half second until snap is killed, and a busy machine."""

HEARTBEAT = """
import ctypes, mmap, os, sys, time
place, beat, *has = sys.argv[1:]
keep = []
if "data" in has:
    keep.append(os.open(f"{place}/data", os.O_RDONLY))
if "map" in has:
    fd = os.open(f"{place}/data", os.O_RDONLY)
    memory = mmap.mmap(fd, 3 * 4096, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    memory[0] = 1  # the first page is the job's own; the second is the file's; nobody has read the third
    memory[4096]
    keep.append(memory)
    os.close(fd)
if "deleted" in has:
    keep.append(os.open(f"{place}/gone", os.O_RDONLY))
    os.unlink(f"{place}/gone")
if "place" in has:
    keep.append(os.open(f"{place}/data", os.O_PATH))
if "dir" in has:
    keep.append(os.open(f"{place}/dir", os.O_RDONLY | os.O_DIRECTORY))
if "cwd" in has:
    os.chdir(f"{place}/dir")
if "flight" in has:
    import array, socket
    one, two = socket.socketpair()
    fd = os.open(f"{place}/data", os.O_RDONLY)
    one.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))])
    os.close(fd)
    keep += [one, two]
out = os.open(beat, os.O_RDWR | os.O_CREAT, 0o600)
last, longest = time.monotonic(), 0.0
while True:
    now = time.monotonic()
    longest, last = max(longest, now - last), now
    os.pwrite(out, b"%10.4f" % longest, 0)
    time.sleep(0.002)
"""


def longest_gap(beat: pathlib.Path) -> float:
    return float(beat.read_text() or 0)


class Stalling:
    """The file system, and the job that uses it."""

    def __init__(self, tmp_path: pathlib.Path) -> None:
        self.place, self.control, self.beat = tmp_path / "mnt", tmp_path / "control", tmp_path / "beat"
        self.store = tmp_path / "store"
        self.place.mkdir()
        self.server = subprocess.Popen(
            [sys.executable, "-m", "tests.stalling", str(self.place), str(self.control)],
            cwd=ROOT,
            start_new_session=True,
        )
        self.libc = ctypes.CDLL(None)
        wait_until(lambda: os.path.ismount(self.place), "mounted")
        self.pid = 0

    def start(self, *has: str) -> None:
        process = subprocess.Popen(
            [sys.executable, "-c", HEARTBEAT, str(self.place), str(self.beat), *has],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            cwd="/",
        )
        self.pid = process.pid
        process.returncode = 0  # reaped below
        wait_until(lambda: self.beat.exists() and self.beat.stat().st_size, "the job beats")

    def stall(self, operation: str) -> None:
        self.control.write_text(f"{self.pid} {operation}")

    def go_on(self) -> None:
        self.control.unlink(missing_ok=True)

    @property
    def stalled(self) -> list[int]:
        """Operations that were not answered."""
        log = pathlib.Path(f"{self.control}.log")
        return [int(line) for line in log.read_text().split()] if log.exists() else []

    def take(self, *options: str) -> dict:
        return snap("take", self.pid, "--job", "test", *options, store=self.store)

    def close(self) -> None:
        self.go_on()
        if self.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            reap(self.pid)
        wait_until(lambda: self.libc.umount2(str(self.place).encode(), 2) == 0, "unmounted")
        self.server.kill()
        self.server.wait()


@pytest.fixture
def stalling(tmp_path):
    made = Stalling(tmp_path)
    yield made
    made.close()


EVERYTHING = ("data", "map", "place", "dir", "cwd", "flight")
STALLS = [
    *(("LOOKUP", has) for has in (("data",), ("map",), ("place",), ("dir",), ("flight",))),
    *(
        ("GETATTR", has)
        for has in (("data",), ("map",), ("place",), ("dir",), ("cwd",), ("flight",), ("deleted",))
    ),
    *(("OPEN", ("deleted",)), ("READ", ("deleted",))),
]
"""What a take asks in the frozen window, and of what."""
HARMLESS = [(operation, EVERYTHING) for operation in ("OPEN", "READ", "STATFS", "FLUSH", "OPENDIR", "ACCESS")]
"""What it must not wait for, or not before the job runs again. FLUSH is sent for any close(2), of a duplicate too."""


def named(case: object) -> str | None:
    return "+".join(case) if isinstance(case, tuple) else None


@pytest.mark.parametrize(("operation", "has"), HARMLESS, ids=named)
def test_what_a_take_does_not_ask_a_file_server_while_the_job_stands_still(stalling, operation, has):
    stalling.start(*has)
    stalling.take()
    stalling.stall(operation)
    stalling.take("--max-frozen", str(LIMIT_S))
    assert not stalling.stalled


@pytest.mark.parametrize(("operation", "has"), [*STALLS, ("all", EVERYTHING)], ids=named)
def test_a_file_server_that_stalls_while_the_job_stands_still(stalling, operation, has):
    stalling.start(*has)
    stalling.take()
    before = longest_gap(stalling.beat)
    stalling.stall(operation)
    with pytest.raises(SnapFailedError) as failed:
        stalling.take("--max-frozen", str(LIMIT_S))
    assert stalling.stalled
    assert is_running(stalling.pid)
    assert longest_gap(stalling.beat) < max(before, LIMIT_S + SLACK_S)
    assert failed.value.status == 1, failed.value
    assert failed.value.error["code"] in {"stalled", "frozen_too_long"}
    assert str(stalling.place) in str(failed.value.error)  # which file, where it is known
    stalling.go_on()
    stalling.take()


def test_sigterm_ends_a_take_that_waits_for_a_file_server(stalling):
    stalling.start("data")
    stalling.take()
    stalling.stall("all")
    process = subprocess.Popen(
        [*SNAP, "--store", stalling.store, "take", str(stalling.pid), "--job", "test", "--max-frozen", "60"],
        stderr=subprocess.PIPE,
    )
    try:
        wait_until(lambda: stalling.stalled, "the server was asked")
        process.terminate()
        assert process.wait(timeout=DEADLINE_S) == 130
    finally:
        process.kill()
        process.communicate()
    wait_until(lambda: state(stalling.pid) == "S", "the job goes on")
    # The lock went with it, although the server still does not answer.
    stalling.control.write_text("0 all")
    assert snap("list", store=stalling.store)["points"]


@pytest.fixture
def sleeper():
    process = subprocess.Popen(
        ["sleep", "600"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    yield process.pid
    process.kill()
    process.wait()


def fails(
    tmp_path: pathlib.Path, sleeper: int, fault: str, *command: str
) -> subprocess.CompletedProcess[str]:
    """Run a command that stops itself (SIGSTOP) while the job stands still."""
    return subprocess.run(
        [*SNAP, "--store", tmp_path / "store", *command],
        env=dict(os.environ, SNAP_FAULT=fault),
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )


@pytest.mark.parametrize(
    "fault", ["freeze.interrupted", "dump.frozen", "dump.infected", "dump.state", "thaw.begin"]
)
def test_a_snap_that_is_stopped_is_killed_and_the_job_goes_on(tmp_path, sleeper, fault):
    done = fails(tmp_path, sleeper, f"{fault}:stop", "take", str(sleeper), "--max-frozen", "0.5")
    assert done.returncode == -signal.SIGKILL
    assert "the job goes on" in done.stderr
    wait_until(lambda: state(sleeper) == "S", "the job goes on")
    snap("take", sleeper, store=tmp_path / "store")


def test_a_rollback_that_is_stopped_before_the_kill_lets_the_old_job_go(tmp_path, sleeper):
    snap("take", sleeper, store=tmp_path / "store")
    done = fails(tmp_path, sleeper, "restore.held:stop", "rollback", "latest", "--max-frozen", "0.5")
    assert done.returncode == -signal.SIGKILL
    assert "the job goes on" in done.stderr
    wait_until(lambda: state(sleeper) == "S", "the old job goes on")


def test_the_limit_is_over_when_the_old_job_is_killed(job, compile_program):
    job.start([compile_program("nothing.c")]).wait_ready()
    job.take()
    with reaping():
        process = subprocess.Popen(
            [*SNAP, "--store", job.store, "rollback", "latest", "--max-frozen", "0.3"],
            env=dict(os.environ, SNAP_FAULT="restore.tree:stop"),
        )
        wait_until(lambda: state(process.pid) == "T", "half a job is built")
        stopped_at = time.monotonic()
        wait_until(
            lambda: time.monotonic() > stopped_at + 1.2, "the limit has passed"
        )  # and the half second after it
        process.send_signal(signal.SIGCONT)
        assert process.wait(timeout=DEADLINE_S) == 0
    assert job.finish() == "PASS"


def test_no_limit_is_no_watchdog(tmp_path, sleeper):
    assert snap("take", sleeper, "--max-frozen", "0", store=tmp_path / "store")["frozen_us"]


def test_a_limit_that_is_too_small_for_any_take_says_so(tmp_path, sleeper):
    with pytest.raises(SnapFailedError) as failed:
        snap("take", sleeper, "--max-frozen", "0.0001", store=tmp_path / "store")
    assert failed.value.status == 1
    assert failed.value.error["code"] == "frozen_too_long"
    assert "--max-frozen" in failed.value.error["hint"]
    wait_until(lambda: state(sleeper) == "S", "the job goes on")
    snap("take", sleeper, store=tmp_path / "store")
