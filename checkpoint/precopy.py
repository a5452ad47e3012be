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
