"""Takes and rollbacks killed (SIGKILL) at random instants: the job is unharmed, or whole as it was at the point, or gone and brought back.

Most of a rollback's time is spent before it touches the old job. So its kills are spread over what comes afterwards: every second one
hits a fault point, each in its turn; the others hit at random between the first fault point and the end.
"""

from __future__ import annotations

import os
import pathlib
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

from snapshotter.manager.stores import open_store
from tests.jobs import Job, compile_c, is_running, reap, reaping, state, wait_until
from tests.kernel import test_rollback_killed as rollbacks
from tests.kernel.watched import (
    PROGRAM,
    Watched,
    finished,
    import_what_a_child_needs,
    said,
    snap_child,
    snap_take,
    take_whole,
)
from tests.soak.frame import Run, environment

_TAKES_EACH = 2
"""So many kills of takes for one of a rollback, which takes longer."""
_FIRST = "restore.planned"
"""The last fault point of a rollback before anything is touched."""


def run(it: Run) -> None:
    """programs/self_check.c of the kernel tests, watched."""
    os.environ.update(environment(it.folder))
    import_what_a_child_needs(it.folder / "imported", rollbacks.take_and_bring_back)
    program = compile_c(pathlib.Path(PROGRAM), it.folder / "self_check")
    chance = it.chance()
    job = Job(it.folder / "job", it.folder / "store")
    watched = Watched(job.start([program]).wait_ready())
    try:
        take_whole(job)
        usual = _Usual(_timed(lambda: take_whole(job)), _touching_s(watched))
        deck: list[str] = []
        number = 0
        while it.more():
            number += 1
            if number % (_TAKES_EACH + 1):
                _kill_a_take(it, watched, chance, usual)
            else:
                take_whole(job)
                watched.unharmed("before a rollback", areas=0)
                if number // (_TAKES_EACH + 1) % 2:
                    deck = deck or chance.sample(rollbacks.POINTS, len(rollbacks.POINTS))
                    _kill_at_a_point(it, watched, deck.pop())
                else:
                    _kill_in_between(it, watched, chance, usual)
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


@dataclass
class _Usual:
    """How long each takes, a rollback from its first fault point on; shorter when it ended before its kill."""

    take_s: float
    touching_s: float


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


def _touching_s(watched: Watched) -> float:
    """How long a rollback takes from its first fault point to its end."""
    with reaping():
        child = _stopped_at_first(watched)
        seconds = _timed(lambda: _go_on(child, None))
        finished()
    watched.runs_as_before("after a whole rollback")
    return seconds


def _stopped_at_first(watched: Watched) -> int:
    """The pid of a rollback that stands at its first fault point (SIGSTOP)."""
    child = snap_child(watched.job, "rollback", "latest", fault=f"{_FIRST}:stop")
    wait_until(lambda: state(child) in {"T", "Z"}, f"a rollback at {_FIRST}")
    assert state(child) == "T", said(watched.job).read_text()
    return int(child)


def _go_on(child: int, kill_after_s: float | None) -> int | None:
    """The wait status of a stopped rollback that goes on, and is killed after so long."""
    os.kill(child, signal.SIGCONT)
    if kill_after_s is not None:
        time.sleep(kill_after_s)
        os.kill(child, signal.SIGKILL)
    return reap(child)


def _kill_at_a_point(it: Run, watched: Watched, name: str) -> None:
    before = rollbacks.start_times(watched)
    status = rollbacks.roll_back(watched, f"{name}:kill")
    assert status == signal.SIGKILL, said(watched.job).read_text()
    found = _afterwards(it, watched, before, f"after a rollback was killed at {name} (seed {it.seed})")
    assert found == rollbacks.expected(name), (name, found)
    it.counts[f"rollbacks killed at {name}"] += 1


def _kill_in_between(it: Run, watched: Watched, chance: random.Random, usual: _Usual) -> None:
    before = rollbacks.start_times(watched)
    pause = chance.random() * usual.touching_s
    with reaping():
        status = _go_on(_stopped_at_first(watched), pause)
        finished()
    assert status in {signal.SIGKILL, 0}, said(watched.job).read_text()
    if status == 0:
        usual.touching_s *= 0.9
        it.counts["rollbacks that ended first"] += 1
    _afterwards(
        it, watched, before, f"after a rollback was killed {pause:.4f} s after {_FIRST} (seed {it.seed})",
        killed=bool(status),
    )  # fmt: skip


def _afterwards(it: Run, watched: Watched, before: dict[int, int], when: str, *, killed: bool = True) -> str:
    """ "old", "new" or "none": which job runs, which is whole; brought back if none does."""
    found = str(rollbacks.outcome(watched, before, when))
    names = {"old": "the old job ran on", "new": "the restored one ran", "none": "none was left"}
    if killed:
        it.counts[f"rollbacks killed: {names[found]}"] += 1
    if not is_running(watched.job.pid):
        rollbacks.bring_back(watched, when)
        it.counts["brought back"] += 1
    return found
