"""A random program of system calls with and without takes: each seed a run (tests/differential.py)."""

from __future__ import annotations

from tests.differential import compare
from tests.soak.frame import Run

_STEPS = 4000


def run(it: Run) -> None:
    """One seed a round."""
    chance = it.chance()
    while it.more():
        seed = chance.randrange(1 << 30)
        nr_points, difference = compare(seed, _STEPS, it.folder / str(seed))
        it.counts["points"] += nr_points
        it.counts["steps"] += _STEPS
        assert not difference, f"seed {seed}, {_STEPS} steps: {difference}"
