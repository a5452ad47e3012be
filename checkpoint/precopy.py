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


class Watch:
    """For how long to see what a job rewrites, and whether the rest of what is due will stay as it is.

    A page that is rewritten after it was stored has been stored for nothing. How many will be is foretold from how many
    came to be rewritten while it was watched, and from how long storing takes.
    """

    STEP_S = 0.02
    _WORTH_WATCHING = 512
    """Pages: with fewer, storing some twice is cheaper than waiting."""
    _MANY, _LOOKS = 32768, 4
    """With so many pages to store it is looked so often. Jobs write in bursts, and pages that are rewritten all the time
    show at the first look: so all others count together."""
    _WASTE = 1 / 32
    """Of what is due, so much may be stored for nothing."""
    _S_PER_PAGE = 16e-6
    """What it takes to read, compress and store a page of a job that keeps a core busy, on two cores."""

    def __init__(self, nr_due: int) -> None:
        self.stores_in_vain = False
        """Whether too much of what was not rewritten so far would be stored for nothing."""
        self._nr_due = self._nr_left = nr_due
        self._looks: list[tuple[float, int]] = []
        self._looks_left = 0
        if nr_due > self._WORTH_WATCHING:
            self._looks_left = self._LOOKS if nr_due >= self._MANY else 1

    @property
    def next_s(self) -> float:
        """How long to wait until the next look; 0: begin to read."""
        return self.STEP_S if self._looks_left else 0.0

    def looked(self, elapsed_s: float, nr_left: int) -> None:
        """A look: `nr_left` of the due pages were not rewritten so far."""
        self._looks_left -= 1
        self._looks.append((elapsed_s, self._nr_left - nr_left))
        self._nr_left = nr_left
        counted = self._looks[1:] or self._looks
        a_second = sum(fresh for _, fresh in counted) / max(sum(seconds for seconds, _ in counted), 1e-3)
        foretold = min(a_second * nr_left * self._S_PER_PAGE, nr_left)
        self.stores_in_vain = foretold > self._nr_due * self._WASTE


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
