"""The engine without the store: jobs dumped into memory, killed, restored under their pids, seen to go on."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import os
import pathlib
import pickle
import signal
import subprocess
import sys

import pytest

from checkpoint import assembly, environment
from checkpoint.kernel import features
from checkpoint.restore import plan, restore
from checkpoint.restore_context import RestoreOptions
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
from tests.jobs import is_running, reap, reap_all, state, tree, wait_until

pytestmark = pytest.mark.requires("root")

ROOT = pathlib.Path(__file__).resolve().parents[2]

COUNTER = """
import os, sys, time
n = 0
while True:
    n += 1
    with open("n.tmp", "w") as f:
        f.write(str(n))
    os.replace("n.tmp", "n")
    time.sleep(0.01)
"""


@pytest.fixture
def start(tmp_path):
    """Start a job in a session of its own; kills its tree at the end."""
    roots = []

    def run(*command, **options):
        options.setdefault("start_new_session", True)
        with open(tmp_path / "out", "ab") as out:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, cwd=tmp_path, **options
            )
        process.returncode = 0
        roots.append(process.pid)
        return process.pid

    yield run
    for root in roots:
        for pid in tree(root):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    wait_until(lambda: reap_all() or not any(map(state, roots)), "jobs gone")


def number(path: pathlib.Path) -> int:
    try:
        return int(path.read_text())
    except (FileNotFoundError, ValueError):
        return 0


def cmdline(pid: int) -> bytes:
    try:
        return pathlib.Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def in_session(sid: int) -> list[int]:
    """What is left of a session, zombies included."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            fields = pathlib.Path(f"/proc/{name}/stat").read_text(errors="replace").rsplit(")", 1)[1].split()
            if int(fields[3]) == sid:
                found.append(int(name))
    return found


def kill(pid: int) -> None:
    for one in reversed(tree(pid)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(one, signal.SIGKILL)
    reap(pid)
    # A child forked meanwhile, a short sleep mostly, has become ours and holds the job's session until it is reaped.
    wait_until(lambda: reap_all() or not in_session(pid), "the job gone")


def test_counter_goes_on_from_the_point(start, tmp_path):
    pid = start(sys.executable, "-c", COUNTER)
    wait_until(lambda: number(tmp_path / "n") > 5, "counting")
    low = number(tmp_path / "n")
    point = memory_store.take(pid)
    at = number(tmp_path / "n")
    wait_until(lambda: number(tmp_path / "n") > at + 50, "counting on after the take")
    kill(pid)
    (tmp_path / "n").unlink()
    result = memory_store.rollback(point)
    assert result.root_pid == pid
    first = wait_until(lambda: number(tmp_path / "n"), "counting again")
    assert low <= first < at + 50
    wait_until(lambda: number(tmp_path / "n") > at + 60, "counting on")


def test_any_number_of_times_and_in_any_order(start, tmp_path):
    pid = start(sys.executable, "-c", COUNTER)
    wait_until(lambda: number(tmp_path / "n") > 5, "counting")
    low = number(tmp_path / "n")
    first = memory_store.take(pid)
    middle = number(tmp_path / "n")
    wait_until(lambda: number(tmp_path / "n") > middle + 100, "counting on")
    second = memory_store.take(pid, first)
    known = []
    for point in (first, second, first, second):
        known.append(memory_store.rollback(point, known_tasks=known).tasks)
        if point is first:
            wait_until(
                lambda: low <= number(tmp_path / "n") < middle + 100, "counting again from the first point"
            )
        else:
            wait_until(lambda: number(tmp_path / "n") > middle + 100, "counting again from the second point")
        assert is_running(pid)


def test_sleep_is_not_interrupted(start):
    pid = start("sleep", "1000")
    wait_until(lambda: state(pid) == "S", "sleeping")
    point = memory_store.take(pid)
    point = memory_store.take(pid, point, after="kill")
    reap(pid)
    memory_store.rollback(point)
    wait_until(lambda: state(pid) == "S", "sleeping again")
    with open(f"/proc/{pid}/syscall") as file:
        assert file.read().split()[0] in {"230", "35"}
    assert os.getsid(pid) == pid


def test_pipeline(start, tmp_path):
    script = "i=0; while :; do i=$((i+1)); echo $i; sleep 0.02; done | while read x; do echo $x > n; done"
    pid = start("bash", "-c", script)
    wait_until(lambda: number(tmp_path / "n") > 3, "counting")
    point = memory_store.take(pid)
    at = number(tmp_path / "n")
    kill(pid)
    memory_store.rollback(point)
    wait_until(lambda: number(tmp_path / "n") > at + 5, "counting again")
    assert len(tree(pid)) >= 3


def test_threads(start, tmp_path):
    code = """
import threading, time, os
counts = [0] * 8
def work(k):
    while True:
        counts[k] += 1
        time.sleep(0.005)
threads = [threading.Thread(target=work, args=(k,)) for k in range(8)]
for t in threads: t.start()
while True:
    time.sleep(0.02)
    with open("n.tmp", "w") as f: f.write(str(min(counts)))
    os.replace("n.tmp", "n")
"""
    pid = start(sys.executable, "-c", code)
    wait_until(lambda: number(tmp_path / "n") > 5, "counting")
    tids = sorted(os.listdir(f"/proc/{pid}/task"))
    point = memory_store.take(pid)
    at = number(tmp_path / "n")
    kill(pid)
    memory_store.rollback(point)
    assert sorted(os.listdir(f"/proc/{pid}/task")) == tids
    wait_until(lambda: number(tmp_path / "n") > at + 20, "every thread counting again")


def test_stopped_stays_stopped(start, tmp_path):
    pid = start(sys.executable, "-c", COUNTER)
    wait_until(lambda: number(tmp_path / "n") > 5, "counting")
    os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: state(pid) == "T", "stopped")
    point = memory_store.take(pid)
    assert state(pid) == "T"
    kill(pid)
    memory_store.rollback(point)
    wait_until(lambda: state(pid) == "T", "stopped again")
    at = number(tmp_path / "n")
    os.kill(pid, signal.SIGCONT)
    wait_until(lambda: number(tmp_path / "n") > at + 5, "going on")


def test_zombies_keep_their_status(start, tmp_path):
    code = """
import os, time, signal
a = os.fork()
if a == 0: os._exit(7)
b = os.fork()
if b == 0:
    signal.pause()
os.kill(b, signal.SIGTERM)
open("ready", "w").close()
while not os.path.exists("go"): time.sleep(0.01)
sa, sb = os.waitpid(a, 0)[1], os.waitpid(b, 0)[1]
with open("n", "w") as f: f.write(str((os.WEXITSTATUS(sa)) * 100 + os.WTERMSIG(sb)))
time.sleep(100)
"""
    pid = start(sys.executable, "-c", code)
    wait_until((tmp_path / "ready").exists, "ready")
    wait_until(lambda: [state(p) for p in tree(pid)[1:]] == ["Z", "Z"], "zombies")
    point = memory_store.take(pid)
    kill(pid)
    memory_store.rollback(point)
    assert [state(p) for p in tree(pid)[1:]] == ["Z", "Z"]
    (tmp_path / "go").touch()
    assert wait_until(lambda: number(tmp_path / "n"), "reaped") == 700 + signal.SIGTERM


def test_pid_held_by_something_else(start):
    pid = start("sleep", "1000")
    wait_until(lambda: state(pid) == "S", "sleeping")
    point = memory_store.take(pid)
    for process in (point,):
        image = memory_store.take(pid)
        assert process.image_names() == image.image_names()
    # The same pid, another start time: what a reused pid looks like.
    message = codec.parse(f"process/{pid}", point.images[f"process/{pid}"])
    message.start_time_ticks -= 1
    point.images[f"process/{pid}"] = codec.serialise(f"process/{pid}", message)
    with pytest.raises(RestoreConflictError, match=rf"pid {pid} is needed but held by task {pid} \(sleep\)"):
        memory_store.rollback(point)
    assert is_running(pid)


def test_plan_touches_nothing(start):
    pid = start("sleep", "1000")
    wait_until(lambda: state(pid) == "S", "sleeping")
    point = memory_store.take(pid)
    text = str(plan(point.image, point.image_names(), point, RestoreOptions(dry_run=True)))
    assert f"kill task {pid} (sleep)" in text
    assert f"spawn {pid}\n{pid} setsid" in text
    assert is_running(pid)


def test_a_failure_half_way_leaves_no_trace(start, monkeypatch):
    pid = start("sh", "-c", "sleep 1000 & sleep 1000")
    sleeps = b"sleep\x001000\x00"
    wait_until(lambda: [cmdline(one) for one in tree(pid)[1:]] == [sleeps, sleeps], "both sleeps")
    pids = tree(pid)
    point = memory_store.take(pid)
    kill(pid)
    from checkpoint import restore as module

    for name in ("restore.tree", "restore.files", "restore.memory", "restore.threads", "restore.state"):

        def fail(at, name=name):
            if at == name:
                raise OSError(5, "told to fail")

        monkeypatch.setattr(module.faults, "point", fail)
        with pytest.raises(Exception, match="told to fail"):
            memory_store.rollback(point)
        wait_until(lambda: reap_all() or not any(map(state, pids)), f"no stub left after {name}")
    monkeypatch.undo()
    memory_store.rollback(point)
    assert sorted(tree(pid)) == sorted(pids)


def test_zombie_that_nobody_reaps_is_named(start):
    pid = start("sleep", "1000")
    wait_until(lambda: state(pid) == "S", "sleeping")
    point = memory_store.take(pid)
    os.kill(pid, signal.SIGKILL)
    # Another process restores: it cannot reap what is our child.
    code = (
        "import sys, pickle; sys.path.insert(0, '.')\n"
        "from tests import memory_store\n"
        "point = pickle.load(sys.stdin.buffer)\n"
        "try: memory_store.rollback(point, reap_timeout_s=0.3)\n"
        "except Exception as e: print(e)\n"
    )
    point.result = None
    done = subprocess.run(
        [sys.executable, "-c", code], input=pickle.dumps(point), capture_output=True, cwd=ROOT, check=False
    )
    assert f"pid {pid} is still held by a zombie".encode() in done.stdout, done.stderr
    assert f"task {os.getpid()}".encode() in done.stdout
    reap(pid)


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


@pytest.mark.parametrize("at", ["restore.unguarded", "restore.detached", "restore.detached@3"])
def test_killed_while_letting_go_the_whole_job_runs(start, tmp_path, at):
    pid, pids, point = family(start, tmp_path)
    kill(pid)
    snap = os.fork()
    if snap == 0:
        try:
            faults.configure(f"{at}:kill")
            memory_store.rollback(point)
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(snap, 0)[1]) == signal.SIGKILL
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
    snap = os.fork()
    if snap == 0:
        try:
            faults.configure("restore.held:kill")
            memory_store.rollback(point)
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(snap, 0)[1]) == signal.SIGKILL
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
