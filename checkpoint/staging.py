"""Pages copied into memory just before the freeze and in the frozen window, and handed to the real sink after the thaw.

A Staging is a PageSink: put() copies at once, at memory speed, into memory that was touched beforehand (fresh memory
costs its page faults: 0.5-1.4 GB/s instead of 6). A later put of the same page wins, and only that one is handed on: a
page that the job rewrites all the time is copied often and stored once. What exceeds the limit goes to the real
sink directly. In the frozen window the job then stands still until the sink has read it.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from checkpoint.model import pageplan
from checkpoint.model.pageplan import Runs
from snapshotter.base.pages import PAGE_SIZE, PageReader, PageSink
from snapshotter.base.runs import PageRuns, RunTable, as_table

_PIECE_PAGES = 2048
"""What is replaced is given up, and its memory used again, in pieces of at most so many pages."""
_LEAST_BYTES = 4 << 20
_HUGE_FROM_BYTES = 16 << 20
"""Huge pages are touched in half the time, but small ones are always to be had at once."""
_MADV_POPULATE_WRITE = 23  # include/uapi/asm-generic/mman-common.h; the mmap module does not have it


@dataclass(frozen=True, slots=True)
class Piece:
    """Pages of one put, in ascending order, and their bytes. A PageReader of them."""

    pages: Runs
    nr_pages: int
    data: memoryview | None
    """None: they went to the sink directly."""
    starts: np.ndarray[tuple[int], np.dtype[np.int64]]
    """Where in the data each run begins, in pages."""

    def read_into(self, runs: PageRuns, buffer: memoryview) -> None:
        """PageReader: any of the pages, in any order and split anyhow."""
        assert self.data is not None
        firsts, at = self.pages[:, 0], 0
        for first, nr_pages in as_table(runs).tolist():
            index = int(np.searchsorted(firsts, first, side="right")) - 1
            offset = (int(self.starts[index]) + first - int(firsts[index])) * PAGE_SIZE
            size = nr_pages * PAGE_SIZE
            buffer[at : at + size] = self.data[offset : offset + size]
            at += size


def _piece(table: RunTable, data: memoryview | None) -> Piece:
    ends = np.cumsum(table[:, 1])
    pages = np.stack((table[:, 0], table[:, 0] + table[:, 1]), axis=1)
    return Piece(pages, int(ends[-1]), data, ends - table[:, 1])


class Staging:
    """A sink for pages that the job is about to rewrite, and for the frozen window.

    Args:
        sink: the real one.
        limit_bytes: no more than this is staged, and no more than half of it before `freezing`.
    """

    def __init__(self, sink: PageSink, limit_bytes: int) -> None:
        self.sink = sink
        self.nr_put_frozen = 0
        """Pages put since `freezing`, staged or not."""
        self.nr_handed = 0
        """Pages given to the real sink so far."""
        self._whole_limit = limit_bytes
        self._limit = limit_bytes // 2
        self._staged = 0
        self._puts: dict[str, list[list[Piece]]] = {}
        """By space, the pieces of each put; those of one put are ascending and disjoint."""
        self._free: list[memoryview] = []
        self._direct = False
        self._closed: list[tuple[str, PageRuns]] = []

    def prepare(self, size_bytes: int) -> None:
        """Touch memory for so much more, unless there is enough or the limit is reached."""
        wanted = min(size_bytes, self._whole_limit - self._staged) - sum(map(len, self._free))
        if wanted > 0:
            self._free.append(_touched(wanted))

    def freezing(self) -> None:
        """From here on all of the limit may be used."""
        self._limit = self._whole_limit
        self.nr_put_frozen = 0

    def expect(self, nr_pages: int) -> None:
        """Nothing to prepare here."""

    def put(self, space: str, runs: PageRuns, reader: PageReader) -> None:
        """Copy the pages now."""
        table = as_table(runs)
        if not len(table):
            return
        if len(table) > 1 and bool((table[1:, 0] < table[:-1, 0] + table[:-1, 1]).any()):
            table = pageplan.to_table(pageplan.from_list(table))
        ends = np.cumsum(table[:, 1])
        total = int(ends[-1])
        self.nr_put_frozen += total
        self._give_up(space, table, ends)
        pieces: list[Piece] = []
        at = 0
        while at < total:
            nr_pages = min(_PIECE_PAGES, total - at, max(self._limit - self._staged, 0) // PAGE_SIZE)
            if not nr_pages:
                break
            data = self._take(nr_pages, total - at)
            nr_pages = len(data) // PAGE_SIZE
            part = _part(table, ends, at, at + nr_pages)
            reader.read_into(part, data)
            self._staged += len(data)
            pieces.append(_piece(part, data))
            at += nr_pages
        if at < total:
            part = _part(table, ends, at, total)
            self._direct = True
            self.nr_handed += total - at
            self.sink.put(space, part, reader)
            pieces.append(_piece(part, None))
        self._puts.setdefault(space, []).append(pieces)

    def _take(self, nr_pages: int, nr_due: int) -> memoryview:
        """Free memory for at most so many pages of those that are still to come in this put."""
        if not self._free:
            self._free.append(
                _touched(max(min(nr_due * PAGE_SIZE, self._limit - self._staged), _LEAST_BYTES))
            )
        block = self._free.pop()
        size = min(nr_pages * PAGE_SIZE, len(block))
        if size < len(block):
            self._free.append(block[size:])
        return block[:size]

    def _give_up(self, space: str, table: RunTable, ends: Runs) -> None:
        """Have the memory of those pieces again that are about to be replaced as a whole."""
        for pieces in self._puts.get(space, []):
            bounds = np.asarray([(piece.pages[0, 0], piece.pages[-1, 1]) for piece in pieces]).reshape(-1, 2)
            # With no more pages in a piece's range than this, it is not replaced as a whole.
            most = _before(table, ends, bounds[:, 1]) - _before(table, ends, bounds[:, 0])
            for index in np.flatnonzero(most >= np.asarray([piece.nr_pages for piece in pieces]))[
                ::-1
            ].tolist():
                piece = pieces[index]
                if piece.data is None or len(pageplan.subtract(piece.pages, _rows(table, piece.pages))):
                    continue
                del pieces[index]
                self._staged -= len(piece.data)
                self._free.append(piece.data)

    def latest(self, space: str) -> Iterator[tuple[RunTable, Piece]]:
        """What is going to be handed on: of each staged page the last copy, unless it has gone to the sink since."""
        replaced = pageplan.EMPTY
        found: list[tuple[RunTable, Piece]] = []
        for pieces in reversed(self._puts.get(space, [])):
            for piece in pieces:
                pages = pageplan.subtract(piece.pages, _around(replaced, piece.pages))
                if piece.data is not None and len(pages):
                    found.append((pageplan.to_table(pages), piece))
            if pieces:
                replaced = pageplan.union(replaced, np.concatenate([piece.pages for piece in pieces]))
        return reversed(found)

    def drain(self, *, hurry: bool = True, leave: int = 0) -> None:
        """Before the thaw: wait for what was too much to stage."""
        if self._direct:
            self.sink.drain()
            self._direct = False

    def pause(self) -> None:
        """Nothing works here."""

    def resume(self) -> None:
        """Nothing works here."""

    def close_space(self, space: str, present: PageRuns) -> None:
        """Remembered until the flush."""
        self._closed.append((space, present))

    def flush(self) -> None:
        """After the thaw: hand over everything, wait until it was taken, close the spaces, free the memory."""
        closed = {space: pageplan.from_list(as_table(runs)) for space, runs in self._closed}
        for space in self._puts:
            for runs, piece in self.latest(space):
                pages = pageplan.from_list(runs)
                if space in closed:  # what has gone meanwhile need not be stored
                    pages = pageplan.intersect(pages, _around(closed[space], pages))
                if len(pages):
                    self.nr_handed += pageplan.count(pages)
                    self.sink.put(space, pageplan.to_table(pages), piece)
        self.sink.drain(hurry=False)
        for space, present in self._closed:
            self.sink.close_space(space, present)
        self._puts.clear()
        self._closed.clear()
        self._free.clear()


def _touched(size_bytes: int) -> memoryview:
    """Memory that costs no page faults any more. Freed when the last view of it goes."""
    size = max(size_bytes + (-size_bytes % PAGE_SIZE), PAGE_SIZE)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    if size >= _HUGE_FROM_BYTES:
        buffer = mmap.mmap(-1, size, flags=flags)
        with contextlib.suppress(OSError):  # no transparent huge pages here, or Linux before 5.14
            buffer.madvise(mmap.MADV_HUGEPAGE)
            buffer.madvise(_MADV_POPULATE_WRITE)
            return memoryview(buffer)
        buffer.close()
    return memoryview(mmap.mmap(-1, size, flags=flags | mmap.MAP_POPULATE))


def _part(table: RunTable, ends: Runs, at: int, until: int) -> RunTable:
    """The pages number `at` to `until` of a table; `ends`: how many it has up to the end of each row."""
    first, last = np.searchsorted(ends, (at, until - 1), side="right").tolist()
    part: RunTable = table[first : last + 1].copy()
    skipped = at - int(ends[first] - table[first, 1])
    part[0] += (skipped, -skipped)
    part[-1, 1] -= int(ends[last]) - until
    return part


def _before(table: RunTable, ends: Runs, pages: Runs) -> Runs:
    """How many pages of an ascending table lie before each of these page numbers."""
    row = np.searchsorted(table[:, 0], pages, side="left") - 1
    inside = np.minimum(pages - table[row, 0], table[row, 1]) + ends[row] - table[row, 1]
    return np.where(row < 0, 0, inside)


def _rows(table: RunTable, pages: Runs) -> Runs:
    """Those rows of an ascending table that may have pages of these, as [first, end)."""
    first = int(np.searchsorted(table[:, 0] + table[:, 1], pages[0, 0], side="right"))
    part = table[first : int(np.searchsorted(table[:, 0], pages[-1, 1], side="left"))]
    return pageplan.from_list(part)


def _around(runs: Runs, pages: Runs) -> Runs:
    """Those of the runs that may have pages of these."""
    if not len(pages):
        return pageplan.EMPTY
    first = int(np.searchsorted(runs[:, 1], pages[0, 0], side="right"))
    return runs[first : int(np.searchsorted(runs[:, 0], pages[-1, 1], side="left"))]
