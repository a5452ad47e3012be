"""One compressing thread's state: its buffer of new pages, and how they are cut into frames.

Chunks are read behind the new pages that wait in the buffer; staging moves the new ones of them up to the
rest, in place, so that a fresh page is copied at most once. Pages that will not compress go to frames of their own, as they
are. Locations are provisional (stream and serial number of the page) until the frame is written; `final` translates.
"""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING

import numpy as np

from snapshotter.base.pages import PAGE_SIZE, PageReader
from snapshotter.base.runs import RunTable
from store.compress import FAST_LEVEL, SMALL_LEVEL, FrameCompressor
from store.native import KEY_BYTES, Kind, Pages, compact
from store.pack import CODEC_RAW, KIND_PAGES, location

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
"""Marks a location as PROVISIONAL | stream << 48 | serial."""
STREAMS = 2
"""Of each worker: pages that are compressed, and those that do not compress."""


class Worker:
    """Used by one thread, except for the counters."""

    def __init__(self, number: int, stager: Stager, packs: PackSet, *, big_frames: bool) -> None:
        self.pages_put = self.pages_new = self.pages_zero = 0
        self._stager = stager
        self._packs = packs
        self._unit = BIG_FRAME if big_frames else SMALL_FRAME
        self._compressor = FrameCompressor()
        self._buffer = memoryview(mmap.mmap(-1, _BUFFER_PAGES * PAGE_SIZE, flags=mmap.MAP_PRIVATE))
        self._keys = memoryview(bytearray(_BUFFER_PAGES * KEY_BYTES))
        self._fill = 0  # new pages waiting at the front of the buffer, always < BIG_FRAME between chunks
        self._plain, self._random = (
            Kind(PROVISIONAL | (STREAMS * number + stream) << 48, CHUNK_PAGES) for stream in range(STREAMS)
        )
        # What will not compress goes around the compressor. Beside single pages, which tell that by themselves, it need not.
        self._apart = self._random if big_frames else None
        self._nr_beside = 0  # such pages since the last frame of others
        # (location of slot 0, pages) of each stream, in order of serial numbers
        self._frames: tuple[list[tuple[int, int]], ...] = tuple([] for _ in range(STREAMS))
        self.final: list[U64] = []
        """Serial number -> location of each stream, once finished."""

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
        pages = self._tail(nr_pages)
        plain, random = self._plain, self._random
        self.pages_zero += self._stager.stage(pages, locs, plain, self._apart)
        self._keys[self._fill * KEY_BYTES : self._fill * KEY_BYTES + len(plain.keys)] = plain.keys
        if self._apart is not None and random.nr:
            self._append(1, CODEC_RAW, Pages(pages, random.slots), random.keys)
            self._nr_beside += random.nr
            self.pages_new += random.nr
            compact(pages, plain.slots)
            random.go_on()
        nr_new = plain.nr
        plain.go_on()
        self.pages_put += nr_pages
        self.pages_new += nr_new
        self._fill += nr_new
        if self._unit == BIG_FRAME or (contiguous and nr_new == CHUNK_PAGES):
            self._flush(BIG_FRAME)
        elif self._fill >= SMALL_FRAME:
            self._flush(SMALL_FRAME)

    def finish(self) -> None:
        """The last frames, and what has become of the provisional locations."""
        if self._fill:
            self._flush(self._fill, rest=True)
        self.final = [_final_locations(frames) for frames in self._frames]

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
        if self._unit == SMALL_FRAME and APART_FROM <= count <= SMALL_FRAME:
            codec, data = self._compressor.pages_apart(pages, level)
        else:
            codec, data = self._compressor.pages(pages, level, beside=self._nr_beside * PAGE_SIZE)
            self._nr_beside = 0
        self._append(0, codec, data, self._keys[start * KEY_BYTES : (start + count) * KEY_BYTES])

    def _append(self, stream: int, codec: int, data: bytes | memoryview | Pages, keys: memoryview) -> None:
        """One frame of pages of a stream."""
        count = len(keys) // KEY_BYTES
        pack, frame = self._packs.append(
            data, raw=count * PAGE_SIZE, codec=codec, kind=KIND_PAGES, page_keys=bytes(keys)
        )
        self._frames[stream].append((location(pack, frame), count))


def _final_locations(frames: list[tuple[int, int]]) -> U64:
    if not frames:
        return np.zeros(0, dtype="<u8")
    bases = np.array([base for base, _ in frames], dtype="<u8")
    counts = np.array([count for _, count in frames], dtype=np.int64)
    slots = np.arange(int(counts.sum()), dtype=np.int64) - np.repeat(np.cumsum(counts) - counts, counts)
    final: U64 = np.repeat(bases, counts) + slots.astype("<u8")
    return final
