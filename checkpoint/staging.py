"""Pages copied in the frozen window, and handed to the real sink after the thaw.

A Staging is a PageSink: put() copies at once, at memory speed, into a buffer whose pages were touched before the
freeze (fresh memory costs its page faults: 0.5-1.4 GB/s instead of 6). What exceeds its limit goes to the real sink
directly, and then the frozen window lasts until the sink has read it.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass, field

import numpy as np

from snapshotter.base.pages import PAGE_SIZE, PageReader, PageSink
from snapshotter.base.runs import PageRuns, RunTable, as_table

_PIECE_BYTES = 4 << 20


@dataclass(slots=True)
class _Piece:
    """One put: runs and where their bytes are."""

    space: str
    runs: RunTable
    data: memoryview
    firsts: np.ndarray[tuple[int], np.dtype[np.int64]] = field(init=False)
    offsets: np.ndarray[tuple[int], np.dtype[np.int64]] = field(init=False)

    def __post_init__(self) -> None:
        table = self.runs
        order = np.argsort(table[:, 0], kind="stable")
        starts = np.concatenate(([0], np.cumsum(table[:, 1])[:-1]))
        self.firsts, self.offsets = table[order, 0], starts[order] * PAGE_SIZE

    def read_into(self, runs: PageRuns, buffer: memoryview) -> None:
        """PageReader: any pages of those that were put, in any order and split anyhow (not across runs)."""
        at = 0
        for first, nr_pages in as_table(runs).tolist():
            index = int(np.searchsorted(self.firsts, first, side="right")) - 1
            offset = int(self.offsets[index]) + (first - int(self.firsts[index])) * PAGE_SIZE
            size = nr_pages * PAGE_SIZE
            buffer[at : at + size] = self.data[offset : offset + size]
            at += size


class Staging:
    """A sink for the frozen window.

    Args:
        sink: the real one.
        expected_bytes: touched beforehand.
        limit_bytes: no more than this is staged.
    """

    def __init__(self, sink: PageSink, expected_bytes: int, limit_bytes: int) -> None:
        self.sink = sink
        self.nr_pages = 0
        """Pages put so far, staged or not."""
        self._limit = limit_bytes
        self._staged = 0
        self._pieces: list[_Piece] = []
        self._buffers: list[mmap.mmap] = []
        self._free = memoryview(b"")
        self._direct = False
        self._closed: list[tuple[str, PageRuns]] = []
        if expected_bytes > 0:
            self._free = self._allocate(min(expected_bytes, limit_bytes))

    def _allocate(self, size: int) -> memoryview:
        size = max(size + (-size % PAGE_SIZE), PAGE_SIZE)
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE
        buffer = mmap.mmap(-1, size, flags=flags)
        self._buffers.append(buffer)
        return memoryview(buffer)

    def expect(self, nr_pages: int) -> None:
        """Nothing to prepare here."""

    def put(self, space: str, runs: PageRuns, reader: PageReader) -> None:
        """Copy the pages now."""
        runs = as_table(runs)
        size = int(runs[:, 1].sum()) * PAGE_SIZE
        if not size:
            return
        self.nr_pages += size // PAGE_SIZE
        if self._staged + size > self._limit:
            self._direct = True
            self.sink.put(space, runs, reader)
            return
        if len(self._free) < size:
            self._free = self._allocate(max(size, _PIECE_BYTES))
        data, self._free = self._free[:size], self._free[size:]
        reader.read_into(runs, data)
        self._staged += size
        self._pieces.append(_Piece(space, runs, data))

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
        for piece in self._pieces:
            self.sink.put(piece.space, piece.runs, piece)
        self.sink.drain(hurry=False)
        for space, present in self._closed:
            self.sink.close_space(space, present)
        self._pieces.clear()
        self._closed.clear()
        self._free = memoryview(b"")
        self._buffers.clear()
