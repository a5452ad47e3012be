"""FrozenTree against living jobs: everything stands, everything goes on, whatever happens to the one who froze it."""

from __future__ import annotations

import os
import pathlib
import signal
import sys

import pytest

from checkpoint.freeze import FrozenTree, stopped_process
from snapshotter.base import faults
from snapshotter.base.errors import TargetGoneError, UnsupportedError
from tests.jobs import reap, state, wait_until

pytestmark = pytest.mark.requires("root")

BUSY = """
import os, subprocess, sys, threading, time
for _ in range(5):
    threading.Thread(target=lambda: [time.sleep(0.001) for _ in iter(int, 1)], daemon=True).start()
subprocess.Popen(["sleep", "1000"])
subprocess.Popen(["sh", "-c", "while :; do /bin/true; done"])
if os.fork() == 0:
    os._exit(3)
open(os.path.join(sys.argv[1], "ready"), "w").close()
time.sleep(1000)
"""


def tracer(pid: int) -> int:
    return int(pathlib.Path(f"/proc/{pid}/status").read_text().split("TracerPid:")[1].split()[0])


@pytest.fixture
def busy(job):
    """Threads, a sleeper, a shell that forks all the time (by vfork), a zombie."""
    return job.start([sys.executable, "-c", BUSY]).wait_ready()


def test_everything_stands_still_and_goes_on(busy):
    for _ in range(10):
        with FrozenTree(busy.pid) as tree:
            root = tree.processes[busy.pid]
            assert len(root.threads) == 6
            assert root.threads[0] is root.leader
            assert next(iter(tree.processes)) == busy.pid
            assert any(process.is_zombie for process in tree.processes.values())
            for process in tree.processes.values():
                assert all(state(task.tid) == "t" for task in process.threads)
                assert process.pid == busy.pid or process.stat.ppid in tree.processes
        assert tracer(busy.pid) == 0
        assert 0 < tree.frozen_us < 10_000_000


def test_group_stop_stays(busy):
    os.kill(busy.pid, signal.SIGSTOP)
    wait_until(lambda: state(busy.pid) == "T", "stopped")
    with FrozenTree(busy.pid) as tree:
        assert tree.processes[busy.pid].state == "stopped"
        assert tree.processes[busy.pid].stop_signal == signal.SIGSTOP
    wait_until(lambda: state(busy.pid) == "T", "stopped again")
    os.kill(busy.pid, signal.SIGCONT)
    wait_until(lambda: state(busy.pid) in {"S", "R"}, "continued")


@pytest.mark.parametrize("name", ["freeze.seized", "freeze.interrupted", "thaw.begin", "thaw.detached"])
def test_killed_snap_leaves_the_job_running(busy, name):
    child = os.fork()
    if child == 0:
        faults.configure(f"{name}:kill")
        with FrozenTree(busy.pid):
            pass
        os._exit(0)
    assert os.WTERMSIG(reap(child)) == signal.SIGKILL
    wait_until(lambda: tracer(busy.pid) == 0 and state(busy.pid) in {"S", "R"}, "the job goes on")


def test_error_inside_thaws(busy):
    with pytest.raises(ZeroDivisionError), FrozenTree(busy.pid):
        raise ZeroDivisionError
    assert tracer(busy.pid) == 0


def test_leave_stopped_and_killed(busy):
    with FrozenTree(busy.pid) as tree:
        tree.leave("stop")
    wait_until(lambda: state(busy.pid) == "T", "left stopped")
    with FrozenTree(busy.pid) as tree:
        tree.leave("kill")
    wait_until(lambda: state(busy.pid) in {"", "Z"}, "killed")


def test_signal_that_arrives_meanwhile_is_delivered(job, compile_program):
    job.start([compile_program("sleeps.c")]).wait_ready()
    with FrozenTree(job.pid):
        os.kill(job.pid, signal.SIGTERM)
    wait_until((job.directory / "out").exists, "SIGTERM arrived after the thaw")


def test_too_many_tasks(busy):
    with pytest.raises(UnsupportedError, match="more than 3 tasks"), FrozenTree(busy.pid, max_tasks=3):
        pass
    assert tracer(busy.pid) == 0


def test_no_such_process():
    child = os.fork()
    if child == 0:
        os._exit(0)
    reap(child)
    with pytest.raises(TargetGoneError), FrozenTree(child):
        pass


def test_one_process_alone(busy):
    with stopped_process(busy.pid) as process:
        assert len(process.threads) == 6
        sleeper = next(pid for pid in map(int, os.listdir("/proc/self/task")) if pid)
        assert tracer(sleeper) == 0
    assert tracer(busy.pid) == 0
