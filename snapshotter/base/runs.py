"""Tables of page runs: what snapshotter.base.pages calls runs, as the one array that both engine and store work on.

A table has a row (first page number, nr_pages) for each run. A point in full of a job whose memory has many holes is tens of thousands of
runs; as tuples each of them would be touched by the interpreter half a dozen times.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from snapshotter.base.pages import Run

RunTable = NDArray[np.int64]
"""(n, 2): rows (first page number, nr_pages)."""
PageRuns = Iterable[Run] | RunTable


def as_table(runs: PageRuns) -> RunTable:
    """The runs as a table that C can read, in their order."""
    if isinstance(runs, np.ndarray):
        return np.ascontiguousarray(runs, dtype=np.int64)
    # Half the time of an array made of a list of pairs.
    return np.fromiter(itertools.chain.from_iterable(runs), dtype=np.int64).reshape(-1, 2)


def cut(table: RunTable, nr_pages: int) -> list[RunTable]:
    """Cut and joined into pieces of that many pages, the last one of fewer."""
    firsts, counts = table[:, 0], table[:, 1]
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    # Where a row of the result begins, counted in pages: at every run and at every piece.
    pieces = np.arange(0, total, nr_pages)
    begins = np.sort(np.concatenate((ends - counts, pieces)))
    begins = begins[np.append(begins[1:] != begins[:-1], True)] if total else begins[:0]
    row = np.searchsorted(ends, begins, side="right")
    rows = np.stack((firsts[row] + begins - (ends - counts)[row], np.diff(np.append(begins, total))), axis=1)
    bounds = [*np.searchsorted(begins, pieces).tolist(), len(rows)]
    return [rows[start:end] for start, end in itertools.pairwise(bounds)]
