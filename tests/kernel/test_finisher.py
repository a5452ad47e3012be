"""`snap take --kill` and `--stop` killed in the middle: all processes of the job or none; and the finisher by itself."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys

import pytest

from checkpoint.finisher import Finisher
from snapshotter.base.errors import SnapshotterError
from tests.jobs import Job, is_running, reap, reap_all, snap, state, tree, wait_until
from tests.kernel.watched import finished, snap_child

pytestmark = pytest.mark.requires("root")

FAMILY = """
import os, pathlib, signal, sys
for _ in range(10):
    if os.fork() == 0:
        signal.pause()
pathlib.Path(sys.argv[1], "ready").touch()
# One that sees its children end makes new ones: nobody may be left to do that.
while True:
    os.waitpid(-1, 0)
    if os.fork() == 0:
        signal.pause()
"""


@pytest.fixture
def family(tmp_path):
    job = Job(directory=tmp_path / "job", store=tmp_path / "store")
    job.start([sys.executable, "-S", "-c", FAMILY]).wait_ready()
    yield job
    with contextlib.suppress(ProcessLookupError):
        os.kill(job.pid, signal.SIGSTOP)  # it would make new ones
    job.destroy()


@contextlib.contextmanager
def sleepers(count):
    made = [subprocess.Popen(["sleep", "1000"], start_new_session=True) for _ in range(count)]
    try:
        yield [process.pid for process in made]
    finally:
        for process in made:
            process.kill()
            process.wait()


def take_that_dies(job, option, number):
    child = snap_child(
        job, "take", str(job.pid), "--job", "test", option, fault=f"finish.signalled@{number}:kill"
    )
    assert os.WTERMSIG(reap(child)) == signal.SIGKILL
    finished()


# Eleven are told to stop, then eleven to end.
@pytest.mark.parametrize("number", [1, 11, 12, 17, 22])
def test_take_and_kill_is_finished(family, number):
    members = tree(family.pid)
    assert len(members) == 11
    take_that_dies(family, "--kill", number)
    wait_until(lambda: reap_all() or not any(map(is_running, members)), "all of the job have ended")
    family.rollback()
    assert tree(family.pid) == members


@pytest.mark.parametrize("number", [1, 5, 11])
def test_take_and_stop_is_finished(family, number):
    members = tree(family.pid)
    take_that_dies(family, "--stop", number)
    wait_until(lambda: all(state(pid) == "T" for pid in members), "all of the job are stopped")
    for pid in members:
        os.kill(pid, signal.SIGCONT)
    assert not snap("verify", store=family.store)["damage"]


def test_nothing_is_sent_once_the_step_is_done():
    with sleepers(3) as pids, Finisher() as one:
        with one.sure(pids):
            pass
        one.close()
        assert all(map(is_running, pids))


def test_a_step_that_fails_is_finished():
    with sleepers(3) as pids:
        with pytest.raises(RuntimeError), Finisher() as one, one.sure(pids):
            raise RuntimeError
        wait_until(lambda: not any(map(is_running, pids)), "they have ended")


def test_steps_one_after_another():
    with sleepers(4) as pids:
        with pytest.raises(RuntimeError), Finisher() as one:
            with one.sure(pids[:2]):
                pass
            with one.sure(pids[2:]):
                raise RuntimeError
        wait_until(lambda: not any(map(is_running, pids[2:])), "the second two have ended")
        assert all(map(is_running, pids[:2]))


def test_a_finisher_that_was_killed_is_found_before_anything_begins():
    with sleepers(1) as pids, Finisher() as one:
        one._process.kill()
        one._process.wait()
        with pytest.raises(SnapshotterError, match="finisher has ended"), one.sure(pids):
            raise AssertionError("it must not begin")
        assert is_running(pids[0])


def test_it_has_none_of_the_numbers_that_are_needed():
    first = Finisher()
    first.close()
    avoid = range(first._process.pid + 1, first._process.pid + 4)
    with Finisher(avoid) as second:
        assert second._process.pid not in avoid
