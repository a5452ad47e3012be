"""One compressing thread's state: its buffer of new pages, and how they are cut into frames.

Chunks are read behind the new pages that wait in the buffer; staging moves the new ones of them up to the
rest, in place, so that a fresh page is copied at most once. Locations are provisional (worker and serial number
of the page) until the frame is written; `final_locations` translates.
"""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING

import numpy as np

from snapshotter.base.pages import PAGE_SIZE, PageReader
from snapshotter.base.runs import RunTable
from store.compress import FAST_LEVEL, SMALL_LEVEL, FrameCompressor
from store.native import KEY_BYTES
from store.pack import KIND_PAGES, location

if TYPE_CHECKING:
    from store.native import Stager
    from store.packset import PackSet
    from store.pagemap import U64

CHUNK_PAGES = 512
"""What is read, hashed and looked up in one go: beside 2 MiB of that Python's steps are little."""
BIG_FRAME, SMALL_FRAME = 256, 128
"""1 MiB for first dumps and long fresh runs; scattered pages go by 128, compressed one by one."""
_BUFFER_PAGES = BIG_FRAME + CHUNK_PAGES
APART_FROM = 24
"""Fewer pages than this compress better together, and are not worth it."""
_SMALL_TAKE = 128
PROVISIONAL = 1 << 63
"""Marks a location as PROVISIONAL | worker << 48 | serial."""


class Worker:
    """Used by one thread, except for the counters."""

    def __init__(self, number: int, stager: Stager, packs: PackSet, *, big_frames: bool) -> None:
        self.number = number
        self.pages_put = self.pages_new = self.pages_zero = 0
        self._stager = stager
        self._packs = packs
        self._unit = BIG_FRAME if big_frames else SMALL_FRAME
        self._compressor = FrameCompressor()
        self._buffer = memoryview(mmap.mmap(-1, _BUFFER_PAGES * PAGE_SIZE, flags=mmap.MAP_PRIVATE))
        self._keys = memoryview(bytearray(_BUFFER_PAGES * KEY_BYTES))
        self._fill = 0  # new pages waiting at the front of the buffer, always < BIG_FRAME between chunks
        self._frames: list[tuple[int, int]] = []  # (location of slot 0, pages), in order of serial numbers

    def _tail(self, nr_pages: int) -> memoryview:
        return self._buffer[self._fill * PAGE_SIZE : (self._fill + nr_pages) * PAGE_SIZE]

    def read(self, runs: RunTable, nr_pages: int, reader: PageReader) -> None:
        """A chunk straight into the buffer; `stage` comes next."""
        reader.read_into(runs, self._tail(nr_pages))

    def copy_in(self, data: bytearray, nr_pages: int) -> None:
        """The same for a chunk that was read ahead."""
        self._tail(nr_pages)[:] = memoryview(data)[: nr_pages * PAGE_SIZE]

    def stage(self, locs: U64, *, contiguous: bool) -> None:
        """Fills in where the chunk's pages are, and writes frames when there is enough for them."""
        nr_pages = len(locs)
        first = PROVISIONAL | self.number << 48 | self.pages_new
        nr_new, nr_zero = self._stager.stage(
            self._tail(nr_pages), first, locs, self._keys[self._fill * KEY_BYTES :]
        )
        self.pages_put += nr_pages
        self.pages_new += nr_new
        self.pages_zero += nr_zero
        self._fill += nr_new
        if self._unit == BIG_FRAME or (contiguous and nr_new == CHUNK_PAGES):
            self._flush(BIG_FRAME)
        elif self._fill >= SMALL_FRAME:
            self._flush(SMALL_FRAME)

    def finish(self) -> None:
        """The last frames."""
        if self._fill:
            self._flush(self._fill, rest=True)

    def _flush(self, unit: int, *, rest: bool = False) -> None:
        """Frames of `unit` pages; what is left over stays at the front, or goes into the last one with `rest`.

        Big ones may have three quarters of that, or three quarters more, so that less is left over to be moved.
        """
        done = 0
        least = unit * 3 // 4 if unit == BIG_FRAME else unit
        while self._fill - done >= least or (rest and done < self._fill):
            left = self._fill - done
            count = left if unit == BIG_FRAME and left < unit + least else min(unit, left)
            self._write(done, count)
            done += count
        left = self._fill - done
        if left and done:
            self._buffer[: left * PAGE_SIZE] = bytes(self._buffer[done * PAGE_SIZE : self._fill * PAGE_SIZE])
            self._keys[: left * KEY_BYTES] = bytes(self._keys[done * KEY_BYTES : self._fill * KEY_BYTES])
        self._fill = left

    def _write(self, start: int, count: int) -> None:
        pages = self._buffer[start * PAGE_SIZE : (start + count) * PAGE_SIZE]
        level = SMALL_LEVEL if self.pages_new <= _SMALL_TAKE and self._unit == SMALL_FRAME else FAST_LEVEL
        apart = self._unit == SMALL_FRAME and APART_FROM <= count <= SMALL_FRAME
        compress = self._compressor.pages_apart if apart else self._compressor.pages
        codec, data = compress(pages, level)
        pack, frame = self._packs.append(
            data,
            raw=len(pages),
            codec=codec,
            kind=KIND_PAGES,
            page_keys=bytes(self._keys[start * KEY_BYTES : (start + count) * KEY_BYTES]),
        )
        self._frames.append((location(pack, frame), count))

    def final_locations(self) -> U64:
        """Serial number -> location, once finished."""
        if not self._frames:
            return np.zeros(0, dtype="<u8")
        bases = np.array([base for base, _ in self._frames], dtype="<u8")
        counts = np.array([count for _, count in self._frames], dtype=np.int64)
        slots = np.arange(int(counts.sum()), dtype=np.int64) - np.repeat(np.cumsum(counts) - counts, counts)
        final: U64 = np.repeat(bases, counts) + slots.astype("<u8")
        return final
