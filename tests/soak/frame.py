"""What a piece of the soak is: it goes on as long as it is told to, counts what it did, and raises where a promise is broken."""

from __future__ import annotations

import json
import os
import pathlib
import random
import subprocess
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from checkpoint import oracle
from tests.jobs import ROOT, SNAP

More = Callable[[], bool]
COMMAND_S = 180.0


@dataclass
class Run:
    """One run of one piece: where, how long, by which random numbers, and what it has counted so far."""

    folder: pathlib.Path
    more: More
    seed: int = field(default_factory=lambda: random.SystemRandom().randrange(1 << 30))
    counts: Counter[str] = field(default_factory=Counter)
    history: deque[str] = field(default_factory=lambda: deque(maxlen=60))
    """What was done last, for the report of a failure."""

    def chance(self) -> random.Random:
        """Random numbers that the seed gives again."""
        return random.Random(self.seed)


@dataclass(frozen=True)
class Piece:
    """A name for the command line and the function that does it."""

    name: str
    run: Callable[[Run], None]


def rounds(number: int) -> More:
    """Go on that many times."""
    left = iter(range(number))
    return lambda: next(left, None) is not None


def minutes(number: float) -> More:
    """Go on for so long."""
    end = time.monotonic() + number * 60
    return lambda: time.monotonic() < end


def environment(folder: pathlib.Path) -> dict[str, str]:
    """Of every command: under the oracle, with keepers of its own."""
    return {
        "PYTHONPATH": str(ROOT),
        oracle.VARIABLE: "1",
        "SNAP_RUNTIME_DIR": str(folder / "run"),
        "SNAP_LOCK_WAIT_S": "60",
    }


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    status: int
    answer: dict[str, object]
    said: str


def command(folder: pathlib.Path, store: pathlib.Path, *line: str) -> Done:
    """`snap LINE --json`. AssertionError: it was killed, hung, or ended with a traceback."""
    done = subprocess.run(
        [*SNAP, "--store", str(store), *line, "--json"],
        env=dict(os.environ, **environment(folder)),
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=COMMAND_S,
        check=False,
    )
    said = done.stderr + done.stdout
    assert done.returncode >= 0, f"snap {' '.join(line)}: killed by signal {-done.returncode}"
    assert "Traceback" not in said, f"snap {' '.join(line)}: {said}"
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        answer = {}
    return Done(done.returncode, answer if isinstance(answer, dict) else {}, said)
