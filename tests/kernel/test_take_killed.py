"""`snap take` killed, at every named instant and at random ones, against a job that checks itself (programs/self_check.c).

After each kill the job goes on: not stopped, not traced, every activity of both processes counts on, with the
mappings and descriptors that it had. In one instant (two threads of a process change places in the parasite) a kill
leaves the parasite's area behind; the next take removes it, so there is never more than one in a process. At the end
the job itself says whether it was harmed. SNAP_TEST_TAKE_KILLS sets the number of random kills (default 200).
"""

from __future__ import annotations

import collections
import os
import random
import signal
import time

import pytest

from snapshotter.base import faults
from snapshotter.manager.stores import open_store
from tests.jobs import reap
from tests.kernel.watched import import_what_a_child_needs, said, snap_take, take_whole

pytestmark = pytest.mark.requires("root", "wp_async", "rseq_configuration")

NR_KILLS = int(os.environ.get("SNAP_TEST_TAKE_KILLS", "200"))

OF_OTHER_COMMANDS = {
    "restore.": "snap rollback",
    "stub.": "snap rollback",
    "store.prune": "snap prune",
    "parked.": "jobs whose calls are cut short (test_attending.py)",
    "attend.": "jobs whose calls are cut short (test_attending.py)",
    "finish.": "snap take --kill (test_finisher.py)",
    "transfers.": "jobs that are just in a transfer (test_freeze.py)",
    "freeze.signal": "jobs that get a signal just then (test_freeze.py)",
}
POINTS = [name for name in faults.POINTS if not name.startswith(tuple(OF_OTHER_COMMANDS))]
FIRST_TAKE_ONLY = {"track.created", "track.keeper", "track.described", "track.kept"}
"""A later take of the same processes finds the userfaultfd and the keeper that are there already."""


@pytest.fixture(scope="module", autouse=True)
def _imported(tmp_path_factory):
    def work(job, loaded):
        assert reap(snap_take(job, loaded=loaded)) == 0, said(job).read_text()

    import_what_a_child_needs(tmp_path_factory.mktemp("imported"), work)


@pytest.mark.parametrize("name", POINTS)
def test_killed_at(name, start, job):
    watched = start()
    assert os.WTERMSIG(reap(snap_take(job, f"{name}:kill"))) == signal.SIGKILL, (
        "the first take did not pass it"
    )
    watched.unharmed("after the first take was killed")
    take_whole(job)
    watched.unharmed("after a whole take", areas=0)
    status = reap(snap_take(job, f"{name}:kill"))
    if name in FIRST_TAKE_ONLY:
        assert status == 0, "a later take passes it: it is no longer one of FIRST_TAKE_ONLY"
    else:
        assert status == signal.SIGKILL, "a later take did not pass it"
    watched.unharmed("after a later take was killed")
    take_whole(job)
    watched.unharmed("after the last take", areas=0)
    assert job.finish() == "PASS", job.said()


def test_killed_at_random_instants(start, job):
    watched = start()
    take_whole(job)
    began = time.monotonic()
    take_whole(job)
    usual_s = time.monotonic() - began
    seed = random.randrange(1 << 30)
    chance = random.Random(seed)
    ends = collections.Counter()
    for nr in range(NR_KILLS):
        child = snap_take(job)
        pause = chance.random() * usual_s
        time.sleep(pause)
        os.kill(child, signal.SIGKILL)
        ended = reap(child)
        ends[ended] += 1
        if ended == 0:  # the machine has become quicker
            usual_s *= 0.9
        watched.unharmed(f"after random kill {nr} (seed {seed}, {pause:.4f} s of {usual_s:.4f} s)")
    assert set(ends) <= {signal.SIGKILL, 0}, said(job).read_text()
    assert ends[signal.SIGKILL] > NR_KILLS // 2, ends
    take_whole(job)
    watched.unharmed("after the last take", areas=0)
    store = open_store(job.store, create=False)
    try:
        assert not store.verify().damage
        assert len(store.points("test")) >= 3
    finally:
        store.close()
    assert job.finish() == "PASS", job.said()
