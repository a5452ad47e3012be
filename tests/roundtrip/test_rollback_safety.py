"""Rollbacks that are killed, interrupted, refused or fed damage: the job is whole before or after, never half."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import pathlib
import signal
import subprocess
import sys

import pytest

from checkpoint import assembly, environment
from checkpoint.kernel import features
from checkpoint.restore import restore
from images import codec
from snapshotter.base import faults
from snapshotter.base.errors import (
    PermissionDeniedError,
    RestoreConflictError,
    SnapshotterError,
    UnsupportedError,
    VerificationError,
)
from tests import memory_store
from tests.jobs import is_running, reap_all, state, tree, wait_until
from tests.roundtrip.engine_jobs import kill, number

pytestmark = pytest.mark.requires("root")

ROOT = pathlib.Path(__file__).resolve().parents[2]

FAMILY = """
import os, time
for _ in range(4):
    if os.fork() == 0:
        break
open(f"here.{os.getpid()}", "w").close()
while True: time.sleep(0.01)
"""


def family(start, tmp_path):
    """A job of five processes and its point."""
    pid = start(sys.executable, "-c", FAMILY)
    wait_until(lambda: len(list(tmp_path.glob("here.*"))) == 5, "all five")
    return pid, sorted(tree(pid)), memory_store.take(pid)


def roll_back_killed_at(at: str, point) -> None:
    """A rollback in a process of its own, which ends by SIGKILL at that fault point."""
    snap = os.fork()
    if snap == 0:
        try:
            faults.configure(f"{at}:kill")
            memory_store.rollback(point)
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(snap, 0)[1]) == signal.SIGKILL


@pytest.mark.parametrize("at", ["restore.unguarded", "restore.detached", "restore.detached@3"])
def test_killed_while_letting_go_the_whole_job_runs(start, tmp_path, at):
    pid, pids, point = family(start, tmp_path)
    kill(pid)
    roll_back_killed_at(at, point)
    wait_until(lambda: all(state(one) in {"S", "R"} for one in pids), "all five run")
    assert sorted(tree(pid)) == pids


@pytest.mark.parametrize("at", ["restore.unguarded", "restore.detached"])
def test_interrupted_while_letting_go_the_whole_job_runs(start, tmp_path, monkeypatch, at):
    pid, pids, point = family(start, tmp_path)
    kill(pid)
    monkeypatch.setattr(
        assembly.faults, "point", lambda name: signal.raise_signal(signal.SIGINT) if name == at else None
    )
    with pytest.raises(KeyboardInterrupt):
        memory_store.rollback(point)
    monkeypatch.undo()
    wait_until(lambda: all(state(one) in {"S", "R"} for one in pids), "all five run")
    assert sorted(tree(pid)) == pids
    for one in pids:
        assert "TracerPid:\t0" in pathlib.Path(f"/proc/{one}/status").read_text()


def test_killed_before_the_old_job_is_it_runs_on(start, tmp_path):
    pid, pids, point = family(start, tmp_path)
    roll_back_killed_at("restore.held", point)
    wait_until(lambda: all(state(one) in {"S", "R"} for one in pids), "all five run")
    assert sorted(tree(pid)) == pids


FORKING = """
import os, signal, time
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
open("ready", "w").close()
while True:
    if os.path.exists("go") and os.fork() == 0:
        os.setsid()
        end = time.monotonic() + 0.03
        while time.monotonic() < end: pass
        if os.fork() == 0:
            os.setsid()
        time.sleep(0.05)
        os._exit(0)
    time.sleep(0.001)
"""


def test_children_made_while_the_old_job_is_killed_do_not_escape(start, tmp_path):
    pid = start(sys.executable, "-c", FORKING)
    wait_until((tmp_path / "ready").exists, "ready")
    point = memory_store.take(pid)
    known = []
    for _ in range(5):
        (tmp_path / "go").touch()
        wait_until(lambda: len(tree(pid)) > 3, "forking")
        seen = set(tree(pid))
        (tmp_path / "go").rename(tmp_path / "gone")
        known.append(memory_store.rollback(point, known_tasks=known).tasks)
        assert tree(pid) == [pid]
        wait_until(
            lambda seen=seen: reap_all() or not any(map(state, seen - {pid})), "no child of the old job left"
        )


def test_a_job_that_a_debugger_has_is_left_alone(start):
    pid = start("sleep", "1000")
    wait_until(lambda: state(pid) == "S", "sleeping")
    point = memory_store.take(pid)
    debugger = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys; from checkpoint.kernel import ptrace; ptrace.seize(int(sys.argv[1])); print(flush=True); input()",
            str(pid),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT,
    )
    with debugger:
        debugger.stdout.readline()
        with pytest.raises(UnsupportedError, match=f"traced by task {debugger.pid}"):
            memory_store.rollback(point)
        assert is_running(pid)
        debugger.stdin.close()
    memory_store.rollback(point)


def test_without_the_rights_the_job_is_left_alone(start):
    pid = start("sleep", "1000", user=65534, group=65534, extra_groups=[])
    wait_until(lambda: state(pid) == "S", "sleeping")
    point = memory_store.take(pid)
    read_end, write_end = os.pipe()
    snap = os.fork()
    if snap == 0:
        try:
            os.setgroups([])
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
            restore(point.image, point.image_names(), point)
        except SnapshotterError as error:
            os.write(write_end, f"{type(error).__name__} {error}".encode())
        finally:
            os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as pipe:
        said = pipe.read()
    os.waitpid(snap, 0)
    assert said.startswith(b"PermissionDeniedError") and b"CAP_CHECKPOINT_RESTORE" in said
    assert is_running(pid)


def test_rights_for_other_ids_are_asked_for_before_anything_is_touched(start, monkeypatch):
    pid = start("sleep", "1000", user=65534, group=65534, extra_groups=[])
    wait_until(lambda: state(pid) == "S", "sleeping")
    point = memory_store.take(pid)
    real = environment.proc.read_status
    few = lambda pid: dataclasses.replace(real(pid), cap_effective=1 << 40 | 1 << 7)  # noqa: E731
    monkeypatch.setattr(environment.proc, "read_status", few)
    with pytest.raises(PermissionDeniedError, match=r"user 65534.*CAP_SETGID, CAP_SETPCAP"):
        memory_store.rollback(point)
    assert is_running(pid)


def _unknown_description(pid, point):
    table = codec.parse(f"fdtable/{pid}", point.images[f"fdtable/{pid}"])
    table.entries[-1].description = 999
    point.images[f"fdtable/{pid}"] = table.SerializeToString()


def _unknown_epoll_target(pid, point):
    files = codec.parse("files", point.images["files"])
    files.descriptions[0].epoll.entries.add(fd=3, target_description=999)
    point.images["files"] = files.SerializeToString()


def _no_registers(pid, point):
    process = codec.parse(f"process/{pid}", point.images[f"process/{pid}"])
    process.threads[0].regs = b""
    point.images[f"process/{pid}"] = process.SerializeToString()


def _cut_table(pid, point):
    point.images[f"fdtable/{pid}"] = point.images[f"fdtable/{pid}"][:-1]


def _no_files(pid, point):
    del point.images["files"]


def _no_shmem(pid, point):
    files = codec.parse("files", point.images["files"])
    files.descriptions[0].regular.shmem = "shmem/77"
    point.images["files"] = files.SerializeToString()


@pytest.mark.parametrize(
    "damage",
    [_unknown_description, _unknown_epoll_target, _no_registers, _cut_table, _no_files, _no_shmem],
)
def test_a_damaged_point_is_found_before_the_job_is_killed(start, damage):
    pid = start("sleep", "1000")
    wait_until(lambda: state(pid) == "S", "sleeping")
    point = memory_store.take(pid)
    damage(pid, point)
    with pytest.raises(VerificationError):
        memory_store.rollback(point)
    assert is_running(pid)


def test_timer_ids_that_cannot_be_counted_up_to(start, monkeypatch):
    pid = start("sleep", "1000")
    wait_until(lambda: state(pid) == "S", "sleeping")
    point = memory_store.take(pid)
    process = codec.parse(f"process/{pid}", point.images[f"process/{pid}"])
    process.posix_timers.add(id=1 << 16, clock_id=1, notify=1)
    point.images[f"process/{pid}"] = codec.serialise(f"process/{pid}", process)
    monkeypatch.setitem(
        features._answers, "timer_restore_ids", features.Feature("timer_restore_ids", False, 22, "")
    )
    with pytest.raises(UnsupportedError, match="POSIX timer id 65536"):
        memory_store.rollback(point)
    assert is_running(pid)


KEYRING = """
import ctypes, os, time
libc = ctypes.CDLL(None, use_errno=True)
while True:
    n = libc.syscall(250, 0, -3, 0)  # keyctl(KEYCTL_GET_KEYRING_ID, KEY_SPEC_SESSION_KEYRING, 0)
    with open("n.tmp", "w") as f: f.write(str(n))
    os.replace("n.tmp", "n")
    time.sleep(0.01)
"""


def test_the_session_keyring_is_not_the_rollbacks(start, tmp_path):
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(250, 1, b"snap-test") < 0:  # KEYCTL_JOIN_SESSION_KEYRING
        pytest.skip("this kernel (or container) has no keyrings")
    mine = libc.syscall(250, 0, -3, 0)
    pid = start(sys.executable, "-c", KEYRING)
    wait_until(lambda: number(tmp_path / "n") == mine, "started in our keyring")
    point = memory_store.take(pid)
    kill(pid)
    (tmp_path / "n").unlink()
    memory_store.rollback(point)
    assert wait_until(lambda: number(tmp_path / "n"), "looked again") != mine


MAKER = """
import os, signal, time
def make(*_):
    if os.fork() == 0:
        if LEAVES and os.fork(): os._exit(0)
        while True: time.sleep(1)
signal.signal(signal.SIGUSR1, make)
open("ready", "w").close()
while True: time.sleep(0.01)
"""


@pytest.fixture
def born_late(monkeypatch):
    """The job makes another process when the survey for its replacement is done, just before it is held."""

    def at(pid: int, seen) -> None:
        real = environment.survey

        def survey(ctx):
            found = real(ctx)
            os.kill(pid, signal.SIGUSR1)
            wait_until(seen, "one more process")
            return found

        monkeypatch.setattr(environment, "survey", survey)

    return at


def test_what_is_born_after_the_survey_is_waited_for_too(start, tmp_path, born_late):
    """Its zombie keeps the number of the job's session for as long as nobody reaps it."""
    pid = start(sys.executable, "-c", f"LEAVES = False\n{MAKER}")
    wait_until((tmp_path / "ready").exists, "the job is ready")
    point = memory_store.take(pid)
    born_late(pid, lambda: len(tree(pid)) == 2)
    memory_store.rollback(point)
    assert tree(pid) == [pid]
    assert is_running(pid)


def test_what_is_born_during_the_survey_is_the_jobs(start, tmp_path, monkeypatch):
    """A job that always has children younger than the list of its processes, as `make -j` has, could not be replaced."""
    pid = start(sys.executable, "-c", f"LEAVES = False\n{MAKER}")
    wait_until((tmp_path / "ready").exists, "the job is ready")
    point = memory_store.take(pid)
    real = environment._check_ids

    def check_ids(ctx, found):
        os.kill(pid, signal.SIGUSR1)
        wait_until(lambda: len(tree(pid)) == 2, "one more process")
        assert len(found.old) == 1
        real(ctx, found)

    monkeypatch.setattr(environment, "_check_ids", check_ids)
    memory_store.rollback(point, reap_timeout_s=0.5)
    assert tree(pid) == [pid]
    assert is_running(pid)


def test_what_left_the_tree_after_the_survey_keeps_the_job_from_being_killed(start, tmp_path, born_late):
    pid = start(sys.executable, "-c", f"LEAVES = True\n{MAKER}")
    wait_until((tmp_path / "ready").exists, "the job is ready")
    point = memory_store.take(pid)
    strays = lambda: [one for one in tree(os.getpid()) if one != pid and os.getsid(one) == pid]  # noqa: E731
    born_late(pid, lambda: len(tree(pid)) == 2 and len(strays()) == 2 and state(tree(pid)[1]) == "Z")
    try:
        with pytest.raises(RestoreConflictError, match="session"):
            memory_store.rollback(point)
        assert is_running(pid)
    finally:
        for one in strays():
            os.kill(one, signal.SIGKILL)
        reap_all()
