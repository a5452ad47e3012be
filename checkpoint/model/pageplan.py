"""Which pages an address space must store, and which of them must be read again.

Pure interval arithmetic on page numbers, in numpy: a table of runs is an int64 array of shape (n, 2) with
half-open rows [first, end), sorted, disjoint and merged. Invariants, tested with Hypothesis against sets:
`present` is exactly what the kernel showed inside private VMAs; a present page is left out of `to_read` only
when the parent point dumped the same page of the same VMA and the tracker watched it and did not see it
written.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from checkpoint.model.vma import PAGE_SIZE, private_vmas, same_pages
from images import mm_pb2
from snapshotter.base.pages import Run
from snapshotter.base.runs import RunTable

Runs = NDArray[np.int64]
"""(n, 2): rows [first page, end page)."""

_FEW = 16
"""One table counts as short beside one that is so many times as long."""
EMPTY: Runs = np.zeros((0, 2), dtype=np.int64)


@dataclass(frozen=True, slots=True)
class PagePlan:
    """The final set of pages, and those of them whose content is not the parent's."""

    present: Runs
    to_read: Runs
    doubtful: Runs = field(default_factory=lambda: EMPTY)
    """Those of `present` that changed in a way that no tracker shows, perhaps: part of to_read."""

    @property
    def nr_present(self) -> int:
        """Pages in all."""
        return count(self.present)

    @property
    def nr_to_read(self) -> int:
        """Pages to read."""
        return count(self.to_read)


def count(runs: Runs) -> int:
    """Number of pages."""
    return int((runs[:, 1] - runs[:, 0]).sum())


def to_table(runs: Runs) -> RunTable:
    """As the page protocols want them: rows (first page, nr_pages)."""
    return np.stack((runs[:, 0], runs[:, 1] - runs[:, 0]), axis=1)


def to_list(runs: Runs) -> list[Run]:
    """The same as pairs."""
    return list(zip(runs[:, 0].tolist(), (runs[:, 1] - runs[:, 0]).tolist(), strict=True))


def from_list(runs: Iterable[Sequence[int]] | Runs) -> Runs:
    """From (first page, nr_pages) in any order, overlapping or not."""
    table: NDArray[Any] = np.asarray(runs if isinstance(runs, np.ndarray) else list(runs), dtype=np.int64)
    if table.size == 0:
        return EMPTY
    return normalise(np.stack((table[:, 0], table[:, 0] + table[:, 1]), axis=1))


def normalise(runs: Runs) -> Runs:
    """Sort, drop empty rows, merge what overlaps or touches."""
    runs = runs[runs[:, 1] > runs[:, 0]]
    if len(runs) < 2 or bool((runs[1:, 0] > runs[:-1, 1]).all()):
        return runs
    runs = runs[np.argsort(runs[:, 0], kind="stable")]
    reach = np.maximum.accumulate(runs[:, 1])
    breaks = np.flatnonzero(runs[1:, 0] > reach[:-1])
    firsts = np.concatenate(([0], breaks + 1))
    lasts = np.concatenate((breaks, [len(runs) - 1]))
    return np.stack((runs[firsts, 0], reach[lasts]), axis=1)


def _sweep(one: Runs, two: Runs, wanted: Sequence[bool]) -> Runs:
    """Ranges where `wanted[in_one + 2 * in_two]`; both inputs normalised."""
    edges = np.concatenate((one.ravel(), two.ravel()))
    if not len(edges):
        return EMPTY
    edges.sort(kind="stable")  # two ascending parts: no more than a merge
    points = edges[np.concatenate(([True], edges[1:] != edges[:-1]))]
    starts = points[:-1]
    state = _inside(one, starts) + 2 * _inside(two, starts)
    chosen = np.asarray(wanted, dtype=bool)[state]
    return normalise(np.stack((starts[chosen], points[1:][chosen]), axis=1))


def _inside(runs: Runs, points: NDArray[np.int64]) -> NDArray[np.int64]:
    """1 where the point is in a run."""
    return np.searchsorted(runs.ravel(), points, side="right") & 1


def _clip(many: Runs, few: Runs) -> Runs:
    """What is in both, for a few rows and many."""
    firsts = np.searchsorted(many[:, 1], few[:, 0], side="right").tolist()
    lasts = np.searchsorted(many[:, 0], few[:, 1], side="left").tolist()
    parts = []
    for (start, end), first, last in zip(few.tolist(), firsts, lasts, strict=True):
        if first < last:
            part = many[first:last].copy()
            part[0, 0], part[-1, 1] = max(part[0, 0], start), min(part[-1, 1], end)
            parts.append(part)
    return normalise(np.concatenate(parts)) if parts else EMPTY


def union(one: Runs, two: Runs) -> Runs:
    """What is in either."""
    if not len(one) or not len(two):
        return normalise(one if len(one) else two)
    return normalise(np.concatenate((one, two)))


def intersect(one: Runs, two: Runs) -> Runs:
    """What is in both."""
    if not len(one) or not len(two):
        return EMPTY
    few, many = (one, two) if len(one) < len(two) else (two, one)
    if len(few) * _FEW < len(many):
        return _clip(many, few)
    return _sweep(one, two, (False, False, False, True))


def subtract(one: Runs, two: Runs) -> Runs:
    """What is in `one` and not in `two`."""
    if not len(two):
        return one
    if np.array_equal(one, two):  # what was there at the last look, mostly
        return EMPTY
    return _sweep(one, two, (False, True, False, False))


def first_pages(runs: Runs, nr_pages: int) -> Runs:
    """The first so many pages."""
    sizes = runs[:, 1] - runs[:, 0]
    left = np.minimum(nr_pages - (np.cumsum(sizes) - sizes), sizes)
    first: Runs = np.stack((runs[:, 0], runs[:, 0] + left), axis=1)[left > 0]
    return first


def of_vmas(vmas: Iterable[mm_pb2.Vma]) -> Runs:
    """The pages that the VMAs span."""
    return of_ranges([(vma.start, vma.end) for vma in vmas])


def of_ranges(ranges: Sequence[tuple[int, int]]) -> Runs:
    """The pages of [start, end) addresses, which are multiples of the page size."""
    return normalise(np.asarray(ranges, dtype=np.int64) // PAGE_SIZE) if ranges else EMPTY


def trusted(vmas: Sequence[mm_pb2.Vma], parent: Sequence[mm_pb2.Vma]) -> Runs:
    """Pages that lie in the same VMA as when the parent was dumped: not new, moved, grown or of another
    file.
    """
    old = list(private_vmas(parent))
    rows: list[tuple[int, int]] = []
    index = 0
    for new in private_vmas(vmas):
        while index < len(old) and old[index].end <= new.start:
            index += 1
        probe = index
        while probe < len(old) and old[probe].start < new.end:
            if same_pages(old[probe], new):
                rows.append((max(old[probe].start, new.start), min(old[probe].end, new.end)))
            probe += 1
    return normalise(np.asarray(rows, dtype=np.int64) // PAGE_SIZE) if rows else EMPTY


def plan(
    vmas: Sequence[mm_pb2.Vma],
    present: Runs,
    written: Runs | None = None,
    parent: Sequence[mm_pb2.Vma] | None = None,
    *,
    doubtful: Runs = EMPTY,
    private: Runs | None = None,
) -> PagePlan:
    """Decide what to store and what to read.

    Args:
        vmas: of the address space now, sorted.
        present: pages that the kernel says have content of their own.
        written: pages that a tracker saw written since the parent's dump; None: it does not know.
        parent: the VMAs of the parent point's image; None: there is no usable parent.
        doubtful: pages whose state the tracker cannot tell.
        private: the pages of the private VMAs, if they are known.
    """
    present = intersect(normalise(present), of_vmas(private_vmas(vmas)) if private is None else private)
    if written is None or parent is None:
        return PagePlan(present, present, doubtful)
    clean = subtract(subtract(trusted(vmas, parent), normalise(written)), doubtful)
    return PagePlan(present, subtract(present, clean), doubtful)
