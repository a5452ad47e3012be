"""`snap rollback` of a living job killed, at every named instant and at random ones (programs/self_check.c).

After each kill either the old job runs on, the very same processes and unharmed, or it was replaced and nothing half made is
left: no process of it, or all of the restored one. Then the same point is rolled back to, whole. In the end the job
itself says whether it was harmed. SNAP_TEST_ROLLBACK_KILLS sets the number of random kills (default 20).
"""

from __future__ import annotations

import collections
import os
import random
import signal
import time

import pytest

from checkpoint.kernel import proc
from snapshotter.base import faults
from snapshotter.manager.stores import open_store
from tests.jobs import is_running, reap, reap_all, reaping, state, wait_until
from tests.kernel.watched import finished, import_what_a_child_needs, said, snap_child, take_whole

pytestmark = pytest.mark.requires("root", "rseq_configuration")

NR_KILLS = int(os.environ.get("SNAP_TEST_ROLLBACK_KILLS", "20"))
POINTS = [name for name in faults.POINTS if name.startswith(("restore.", "stub.", "finish."))]
OLD_JOB = {"restore.planned", "restore.watched", "restore.held"}
NEW_JOB = {"restore.unguarded", "restore.detached"}


@pytest.fixture(scope="module", autouse=True)
def _imported(tmp_path_factory):
    import_what_a_child_needs(tmp_path_factory.mktemp("imported"), take_and_bring_back)


def take_and_bring_back(job, loaded):
    """What needs all modules that the commands of these tests need; see import_what_a_child_needs."""
    take_whole(job)
    with reaping():
        assert reap(snap_child(job, "rollback", "latest", loaded=loaded)) == 0, said(job).read_text()


def roll_back(watched, fault="", kill_after_s=None):
    """The wait status of a rollback that dies at a fault point or after a while."""
    with reaping():
        child = snap_child(watched.job, "rollback", "latest", fault=fault)
        if kill_after_s is not None:
            time.sleep(kill_after_s)
            os.kill(child, signal.SIGKILL)
        status = reap(child)
        finished()
        return status


def start_times(watched):
    """pid -> start time, of the processes of the job that run."""
    return {pid: proc.read_stat(pid).start_time_ticks for pid in watched.pids if is_running(pid)}


def outcome(watched, before, when):
    """ "old", "new" or "none": which job runs after a rollback was killed; fails for anything in between."""
    if start_times(watched) == before:
        watched.unharmed(when, areas=0)
        return "old"
    # What dies with snap (EXITKILL) may still be on its way out, a restored job on its way in.
    wait_until(
        lambda: reap_all() or not any(map(state, watched.pids)) or runs(watched), f"whole or gone {when}"
    )
    if not any(map(state, watched.pids)):
        return "none"
    watched.runs_as_before(when)
    return "new"


def expected(name):
    """What `outcome` is after a kill at that fault point."""
    return "old" if name in OLD_JOB else "new" if name in NEW_JOB else "none"


def runs(watched):
    return all(
        state(pid) in {"S", "R", "D"}
        and proc.threads(pid) == watched.tids[pid]
        and proc.read_status(pid).tracer_pid == 0
        for pid in watched.pids
    )


def bring_back(watched, when):
    assert roll_back(watched) == 0, f"{when}: {said(watched.job).read_text()}"
    watched.runs_as_before(f"after a whole rollback {when}")


@pytest.mark.parametrize("name", POINTS)
def test_killed_at(name, start, job):
    watched = start()
    take_whole(job)
    before = start_times(watched)
    assert roll_back(watched, f"{name}:kill") == signal.SIGKILL, said(job).read_text()
    found = outcome(watched, before, f"killed at {name}")
    assert found == expected(name)
    bring_back(watched, f"after {name}")
    assert job.finish() == "PASS", job.said()


def test_killed_at_random_instants(start, job):
    watched = start()
    take_whole(job)
    began = time.monotonic()
    bring_back(watched, "at first")
    usual_s = time.monotonic() - began
    seed = random.randrange(1 << 30)
    chance = random.Random(seed)
    found = collections.Counter()
    for nr in range(NR_KILLS):
        before = start_times(watched)
        pause = chance.random() * usual_s
        when = f"after random kill {nr} (seed {seed}, {pause:.4f} s of {usual_s:.4f} s)"
        status = roll_back(watched, kill_after_s=pause)
        assert status in {signal.SIGKILL, 0}, said(job).read_text()
        if status == 0:
            usual_s *= 0.8  # the first one was slow, or the machine has less to do by now
        found[outcome(watched, before, when)] += 1
        if not is_running(job.pid):
            bring_back(watched, when)
    assert len(found) > 1, found
    bring_back(watched, "in the end")
    store = open_store(job.store, create=False)
    try:
        assert not store.verify().damage
    finally:
        store.close()
    assert job.finish() == "PASS", job.said()
