"""Takes and rollbacks killed (SIGKILL) at random instants: the job is unharmed, or whole as it was at the point, or gone and brought back."""

from __future__ import annotations

import os
import pathlib
import random
import signal
import time
from collections.abc import Callable

from snapshotter.manager.stores import open_store
from tests.jobs import Job, compile_c, is_running, reap
from tests.kernel import test_rollback_killed as rollbacks
from tests.kernel.watched import PROGRAM, Watched, finished, said, snap_take, take_whole
from tests.soak.frame import Run, environment

_TAKES_EACH = 4
"""So many kills of takes for one of a rollback, which takes longer."""


def run(it: Run) -> None:
    """programs/self_check.c of the kernel tests, watched."""
    os.environ.update(environment(it.folder))
    program = compile_c(pathlib.Path(PROGRAM), it.folder / "self_check")
    chance = it.chance()
    job = Job(it.folder / "job", it.folder / "store")
    watched = Watched(job.start([program]).wait_ready())
    try:
        take_whole(job)
        usual = _Usual(
            _timed(lambda: take_whole(job)), _timed(lambda: rollbacks.bring_back(watched, "at first"))
        )
        number = 0
        while it.more():
            number += 1
            if number % (_TAKES_EACH + 1):
                _kill_a_take(it, watched, chance, usual)
            else:
                _kill_a_rollback(it, watched, chance, usual)
        take_whole(job)
        watched.unharmed("after the last take", areas=0)
        rollbacks.bring_back(watched, "in the end")
        store = open_store(job.store, create=False)
        try:
            assert not store.verify().damage
        finally:
            store.close()
        verdict = job.finish()
        assert verdict == "PASS", f"{verdict}; {job.said()}"
        it.counts["jobs that passed"] += 1
    finally:
        watched.close()
        job.destroy()


class _Usual:
    """How long each takes; shorter when it ended before its kill."""

    def __init__(self, take_s: float, rollback_s: float) -> None:
        self.take_s = take_s
        self.rollback_s = rollback_s


def _timed(work: Callable[[], None]) -> float:
    began = time.monotonic()
    work()
    return time.monotonic() - began


def _kill_a_take(it: Run, watched: Watched, chance: random.Random, usual: _Usual) -> None:
    child = snap_take(watched.job)
    pause = chance.random() * usual.take_s
    time.sleep(pause)
    os.kill(child, signal.SIGKILL)
    status = reap(child)
    assert status in {signal.SIGKILL, 0}, said(watched.job).read_text()
    if status == 0:
        usual.take_s *= 0.9
    it.counts["takes killed" if status else "takes that ended first"] += 1
    watched.unharmed(f"after a take was killed after {pause:.4f} s (seed {it.seed})")


def _kill_a_rollback(it: Run, watched: Watched, chance: random.Random, usual: _Usual) -> None:
    take_whole(watched.job)
    watched.unharmed("before a rollback", areas=0)
    before = rollbacks.start_times(watched)
    pause = chance.random() * 1.5 * usual.rollback_s
    when = f"after a rollback was killed after {pause:.4f} s (seed {it.seed})"
    status = rollbacks.roll_back(watched, kill_after_s=pause)
    finished()
    assert status in {signal.SIGKILL, 0}, said(watched.job).read_text()
    if status == 0:
        usual.rollback_s *= 0.9
    found = rollbacks.outcome(watched, before, when)
    names = {"old": "the old job ran on", "new": "the restored one ran", "none": "none was left"}
    it.counts[f"rollbacks killed: {names[found]}" if status else "rollbacks that ended first"] += 1
    if not is_running(watched.job.pid):
        rollbacks.bring_back(watched, when)
        it.counts["brought back"] += 1
