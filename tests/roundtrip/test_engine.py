"""The engine without the store: jobs dumped into memory, killed, restored under their pids, seen to go on."""

from __future__ import annotations

import os
import pathlib
import pickle
import signal
import subprocess
import sys

import pytest

from checkpoint.restore import plan
from checkpoint.restore_context import RestoreOptions
from images import codec
from snapshotter.base.errors import RestoreConflictError, SnapshotterError
from tests import memory_store
from tests.jobs import is_running, reap, reap_all, state, tree, wait_until
from tests.roundtrip.engine_jobs import COUNTER, cmdline, kill, number

pytestmark = pytest.mark.requires("root")

ROOT = pathlib.Path(__file__).resolve().parents[2]


def test_counter_goes_on_from_the_point(start, tmp_path):
    pid = start(sys.executable, "-c", COUNTER)
    wait_until(lambda: number(tmp_path / "n") > 5, "counting")
    low = number(tmp_path / "n")
    point = memory_store.take(pid)
    at = number(tmp_path / "n")
    wait_until(lambda: number(tmp_path / "n") > at + 50, "counting on after the take")
    kill(pid)
    (tmp_path / "n").write_text("")
    result = memory_store.rollback(point)
    assert result.root_pid == pid
    first = wait_until(lambda: number(tmp_path / "n"), "counting again")
    assert low <= first < at + 50
    wait_until(lambda: number(tmp_path / "n") > at + 60, "counting on")


def test_a_program_that_ignores_its_children_is_told_so(start, tmp_path):
    """The engine as a library: nothing has happened, and the job goes on."""
    pid = start(sys.executable, "-c", COUNTER)
    wait_until(lambda: number(tmp_path / "n") > 5, "counting")
    point = memory_store.take(pid)
    old = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        for work in (lambda: memory_store.take(pid), lambda: memory_store.rollback(point)):
            with pytest.raises(SnapshotterError, match="SIGCHLD is ignored"):
                work()
    finally:
        signal.signal(signal.SIGCHLD, old)
    at = number(tmp_path / "n")
    wait_until(lambda: number(tmp_path / "n") > at + 20, "counting on")


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
