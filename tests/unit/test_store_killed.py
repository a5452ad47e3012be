"""Takes, forgets and prunes of one store, two or three at once, killed at random instants: no committed point is ever lost or wrong.

Each point carries the digest of its memory in an image, so whatever survives can be judged by itself. SNAP_TEST_STORE_KILLS sets the
number of rounds (default 12).
"""

from __future__ import annotations

import hashlib
import os
import random
import signal
import time
import traceback

from snapshotter.base.errors import LockedError, MissingPagesError, NoSuchPointError
from store import Store
from tests.unit.store_helpers import PAGE, restored, take

NR_ROUNDS = int(os.environ.get("SNAP_TEST_STORE_KILLS", "12"))
NR_PAGES = 240
JOBS = ("a", "b", "c")
_EARLIEST_S, _LATEST_S = 0.001, 0.4
USUAL = (LockedError, NoSuchPointError, MissingPagesError)
"""What one may meet because of another that is at work; nothing else."""


def digest(data):
    return hashlib.sha256(data).digest()


def take_one(path, dice, say):
    """A point of some job: its newest point's memory with some pages changed, like an increment."""
    job = dice.choice(JOBS)
    with Store.open(path) as store, store.lock_job(job):
        points = store.points(job)
        parent = points[-1] if points and dice.random() < 0.9 else None
        data = bytearray(restored(store, parent)) if parent else bytearray(dice.randbytes(NR_PAGES * PAGE))
        runs = []
        for first in range(0, NR_PAGES, 40):
            if dice.random() < 0.4:
                count = dice.randrange(1, 40)
                data[first * PAGE : (first + count) * PAGE] = dice.randbytes(count * PAGE)
                runs.append((first, count))
        images = {"manifest": b"manifest", "mm/42": digest(data)}
        point = take(store, data, parent, runs=runs if parent else None, job=job, images=images)
        say(f"took {point.id}")


def forget_some(path, dice, say):
    """Most of the points of one job."""
    with Store.open(path) as store:
        points = store.points(dice.choice(JOBS))
        gone = dice.sample(points, len(points) // 2)
        for point in gone:
            say(f"forgets {point.id}")
        store.forget(gone, wait_s=5)


def prune(path, dice, say):
    with Store.open(path) as store:
        store.prune(wait_s=5)
        say("pruned")


def look(path, dice, say):
    """Every point restores to what its digest says."""
    with Store.open(path) as store:
        report = store.verify()
        assert report.ok, report.damage
        for point in store.points():
            with store.reader(point) as reader:
                assert digest(restored(store, point)) == reader.image("mm/42"), point.id
            say(f"has {point.id}")


class Actor:
    """One of those in a process of its own, and what it said."""

    def __init__(self, work, path, seed):
        self._said, said = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                os.close(self._said)
                work(path, random.Random(seed), lambda text: os.write(said, text.encode() + b"\n"))
                status = 0
            except USUAL:
                status = 0
            except BaseException:
                os.write(said, traceback.format_exc().encode())
            finally:
                os._exit(status)
        os.close(said)

    def end(self):
        """Its wait status and its lines."""
        with os.fdopen(self._said, "rb") as pipe:
            lines = pipe.read().decode().splitlines()
        return os.waitpid(self.pid, 0)[1], lines


def test_killed_at_random_instants(tmp_path):
    path = tmp_path / "store"
    Store.open(path, create=True).close()
    seed = random.randrange(1 << 30)
    dice = random.Random(seed)
    wanted = set()
    nr_killed = 0
    for nr in range(NR_ROUNDS):
        works = [
            dice.choice([take_one, take_one, forget_some, prune]) for _ in range(dice.choice([1, 2, 2, 3]))
        ]
        began = time.monotonic()
        actors = [Actor(work, path, dice.random()) for work in works]
        for actor in actors:
            if dice.random() < 0.7:
                # As often within 20 ms as later: how long they take is the machine's affair.
                after = _EARLIEST_S * (_LATEST_S / _EARLIEST_S) ** dice.random()
                time.sleep(max(0.0, began + after - time.monotonic()))
                os.kill(actor.pid, signal.SIGKILL)
        took, forgets = set(), set()
        for work, actor in zip(works, actors, strict=True):
            status, lines = actor.end()
            names = [w.__name__ for w in works]
            assert status in {0, signal.SIGKILL}, (seed, nr, names, work.__name__, lines)
            nr_killed += status == signal.SIGKILL
            for line in lines:
                verb, _, point = line.partition(" ")
                if verb == "took":
                    took.add(point)
                elif verb == "forgets":
                    forgets.add(point)
        wanted = (wanted | took) - forgets
        status, lines = Actor(look, path, 0).end()
        assert status == 0, (seed, nr, lines)
        there = {line.removeprefix("has ") for line in lines}
        assert wanted <= there, (seed, nr, wanted - there)
        wanted &= there
    assert nr_killed, "nobody was ever killed"
    with Store.open(path) as store:
        store.prune(wait_s=5)
        assert len(os.listdir(store.packs_dir)) == len(store.catalog.packs())
    assert Actor(look, path, 0).end()[0] == 0
