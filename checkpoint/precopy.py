"""What was read of a process while it ran, and what must be read again for it.

Pure bookkeeping of one take: which pages the sink has, which the readers failed at, whether all of it still counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from checkpoint.kernel import proc
from checkpoint.model import pageplan
from checkpoint.model.pageplan import Runs
from checkpoint.resources import memory

_WORTH_WATCHING = 512
"""Pages: with fewer, reading some twice is cheaper than waiting."""
_LEAST_WATCH_S, _MOST_WATCH_S = 0.02, 0.1
_WATCH_S_PER_PAGE = 8e-6
"""About what a page costs to read, compress and store."""


@dataclass(slots=True)
class Precopied:
    """What was read of one process while it ran."""

    start_time_ticks: int
    complete: bool
    """Every page of then is with the sink; False: all must be read in the frozen window."""
    covered: Runs = field(default_factory=lambda: np.zeros((0, 2), dtype=np.int64))
    """The pages that were there at the last look: each is with the sink, or the parent point's."""
    readers: list[memory.MmReader] = field(default_factory=list)
    """Who read them, and what each could not read; settled once the sink is drained."""

    def is_whole(self, start_time_ticks: int) -> bool:
        """Whether what was read is of this very process, and all of it."""
        same = self.start_time_ticks == start_time_ticks
        return same and self.complete and not any(reader.gone for reader in self.readers)

    def unread(self) -> Runs:
        """Pages that a reader failed to read."""
        failed = sorted(set().union(*(reader.failed for reader in self.readers)))
        return pageplan.from_list([(page, 1) for page in failed])


@dataclass(frozen=True, slots=True)
class Round:
    """One round of pre-copy of one process."""

    pid: int
    start: int
    space: memory.AddressSpace
    present: Runs
    due: Runs
    """What the sink lacks of the present pages, as far as is known at the beginning."""
    known: Precopied | None
    """What the rounds before have read."""
    ahead: Sequence[memory.MmReader] = ()
    """Who reads the part that was not watched, which is not in `due` any more."""


def watching_s(nr_due: int, nr_present: int) -> float:
    """How long to wait for what the job writes all the time: it has written it again after that. 0: it is not worth it.

    A point in full is not kept waiting.
    """
    if nr_due <= _WORTH_WATCHING:
        return 0
    most = _LEAST_WATCH_S if nr_due >= nr_present else _MOST_WATCH_S
    return min(max(nr_due * _WATCH_S_PER_PAGE, _LEAST_WATCH_S), most)


def _rate(looks: Sequence[tuple[float, int]]) -> float:
    """Pages a second."""
    return sum(nr for _, nr in looks) / max(sum(seconds for seconds, _ in looks), 1e-3)


class Watch:
    """When to stop watching a job rewrite its pages, and begin to read.

    A page that is rewritten after it was read has been stored for nothing. How many will be is foretold from how many
    pages that had not been rewritten before came with the last looks, and from how long reading takes.
    """

    _WASTE = 1 / 32
    """Of what is due, so much may be stored for nothing."""
    _LONGEST_S = 2.0
    _S_PER_PAGE = 16e-6
    """What a page of a job that keeps a core busy costs, on two cores."""
    _LOOKS = 3
    """Jobs write in bursts: so many looks count together."""
    _MANY = 32768
    """Pages. With fewer, one look without a write is enough."""

    def __init__(self, nr_due: int, first_s: float) -> None:
        self._nr_due = nr_due
        self._step_s = first_s
        self._left_s = min(max(nr_due * self._S_PER_PAGE, first_s), self._LONGEST_S) if first_s else 0.0
        self._doomed = False
        self._looks: list[tuple[float, int]] = []

    @property
    def next_s(self) -> float:
        """How long to watch until the next look; 0: begin to read."""
        return min(self._step_s, self._left_s)

    @property
    def hopeless(self) -> bool:
        """Whether too much of what is left to read would be stored for nothing: better read while the job stands still."""
        return self._doomed

    def looked(self, elapsed_s: float, nr_fresh: int, nr_left: int) -> None:
        """A look: `nr_fresh` of the due pages were rewritten for the first time, `nr_left` not at all so far."""
        self._left_s -= elapsed_s
        self._looks.append((elapsed_s, nr_fresh))
        last = self._looks[-self._LOOKS :]
        # Half of the average: a pause between two bursts is no end, and a hot set that is complete fades in time.
        a_second = max(_rate(last), _rate(self._looks) / 2)
        foretold = min(a_second * nr_left * self._S_PER_PAGE, nr_left)
        tolerable = foretold <= self._nr_due * self._WASTE
        self._doomed = foretold > nr_left / 4 and not tolerable
        seen_enough = len(last) == self._LOOKS or self._nr_due < self._MANY
        if (tolerable and seen_enough) or self._left_s < self._step_s / 2:
            self._left_s = 0.0


def due(plan: pageplan.PagePlan, written: Runs | None, known: Precopied) -> Runs:
    """What the sink lacks: pages that were written, and those that were not there at the last look."""
    present = plan.present
    if written is None:
        return present
    changed = pageplan.union(pageplan.normalise(np.asarray(written, dtype=np.int64)), plan.doubtful)
    covered = pageplan.subtract(known.covered, known.unread())
    return pageplan.union(pageplan.intersect(present, changed), pageplan.subtract(present, covered))


def plausible_pages(pid: int) -> int:
    """More pages than a process can have to be read."""
    swap = proc.read_status(pid).fields.get("VmSwap", "0 kB").split()[0]
    return 2 * (proc.read_stat(pid).rss_pages + int(swap) // 4) + 4096
