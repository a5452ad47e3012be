"""The point reader: a point's images, and its pages straight out of the packs. It is a PageSource.

Frames are read, checked and decompressed by several threads; the pages of small frames are gathered into
pieces of about a megabyte. What a restore reads is the size of what it restores, whatever the length of the chain.
While a reader is open no prune can remove what it reads.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Self

import numpy as np

from snapshotter.base.errors import StoreError, VerificationError
from snapshotter.base.pages import PAGE_SIZE, Run
from snapshotter.base.runs import PageRuns, RunTable, as_table
from store import native, pagemap, parallel

if TYPE_CHECKING:
    from store.pagemap import U64
    from store.repository import Store
    from store.types import Point

PIECE_PAGES = 256
_DIRECT = 32
"""Pages of one frame from which handing out the frame itself beats gathering."""
_FRAME_SHIFT = np.uint64(12)
_SLOT_MASK = np.uint64(0xFFF)

Write = Callable[[RunTable, memoryview], None]


class PointReader:
    """See the module. Any thread; use as a context manager, or close it."""

    def __init__(self, store: Store, point: Point) -> None:
        self._store = store
        self.point = point
        self._lock = store.lock_shared()
        self._guard = threading.Lock()
        self._maps: pagemap.Maps | None = None
        self._images: dict[str, bytes] | None = None
        try:
            self._refs = store.blob_refs(point.id)
        except BaseException:
            self._lock.release()
            raise

    def close(self) -> None:
        """Lets a prune go on. Idempotent."""
        self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    # -- images ---------------------------------------------------------------------------------------

    def _image_set(self) -> dict[str, bytes]:
        with self._guard:
            if self._images is None:
                with self._store.naming_points((self._refs.images,)):
                    self._images = self._store.readers.images(self._refs.images)
            return self._images

    def image(self, name: str) -> bytes:
        """One image's bytes."""
        try:
            return self._image_set()[name]
        except KeyError:
            raise VerificationError(
                f"the point has no image {name!r}",
                where=f"point {self.point.id[:12]}",
                hint="run `snap verify`",
            ) from None

    def image_names(self) -> list[str]:
        """Sorted names of all images."""
        return sorted(self._image_set())

    # -- pages ----------------------------------------------------------------------------------------

    def _spaces(self) -> pagemap.Maps:
        with self._guard:
            if self._maps is None:
                with self._store.naming_points((self._refs.maps,)):
                    self._maps = self._store.readers.maps(self._refs.maps)
            return self._maps

    def spaces(self) -> list[str]:
        """Sorted names of all spaces that have pages."""
        return sorted(self._spaces())

    def has_space(self, space: str) -> bool:
        """Whether the point has pages of this space."""
        return space in self._spaces()

    def runs(self, space: str) -> Sequence[Run]:
        """Every page of the space, sorted, merged. Unknown space: empty."""
        return pagemap.to_runs(self._spaces().get(space, pagemap.EMPTY).pages)

    def fill(self, space: str, write: Write, only: PageRuns | None = None) -> int:
        """Read, verify and decompress pages of the space; see PageSource."""
        pages, locs = self._stored(space)
        if only is not None:
            inside = pagemap.within(pages, as_table(only))
            pages, locs = pages[inside], locs[inside]
        self._for_frames(pages, locs, write)
        return len(pages)

    def changes(self, space: str, base: str) -> tuple[Sequence[Run], Sequence[Run]]:
        """See PageSource. Pages that are in the same place are equal."""
        (pages, locs), (old_pages, old_locs) = self._stored(space), self._stored(base)
        index, have = pagemap.find(old_pages, pages)
        same = have.copy()
        if len(old_pages):
            same &= old_locs[index] == locs
        _, still = pagemap.find(pages, old_pages)
        return pagemap.to_runs(pages[~same]), pagemap.to_runs(old_pages[~still])

    def _stored(self, space: str) -> tuple[U64, U64]:
        """Its pages that are not zero, and where they are."""
        found = self._spaces().get(space, pagemap.EMPTY)
        stored = found.locs != 0
        return found.pages[stored], found.locs[stored]

    def read(self, space: str, runs: Sequence[Run]) -> bytes:
        """Those pages, in order; absent ones read as zero."""
        wanted = pagemap.expand(runs)
        found = self._spaces().get(space, pagemap.EMPTY)
        index, have = pagemap.find(found.pages, wanted)
        out = bytearray(len(wanted) * PAGE_SIZE)
        if len(found.pages):
            locs = np.where(have, found.locs[index], np.uint64(0))
            target = np.flatnonzero(locs != 0)
            view = memoryview(out)

            def place(positions: RunTable, data: memoryview) -> None:
                at = 0
                for first, count in positions.tolist():
                    size = count * PAGE_SIZE
                    view[first * PAGE_SIZE : first * PAGE_SIZE + size] = data[at : at + size]
                    at += size

            # "Page numbers" here are positions in the result.
            self._for_frames(target.astype("<u8"), locs[target], place)
        return bytes(out)

    def _for_frames(self, pages: U64, locs: U64, write: Write) -> None:
        """Hands every page out once, frame by frame, from several threads."""
        if not len(pages):
            return
        native.keep_freed_memory()
        order = np.argsort(locs, kind="stable") if (locs[1:] < locs[:-1]).any() else np.arange(len(locs))
        pages, locs = pages[order], locs[order]
        frames = locs >> _FRAME_SHIFT
        slots = (locs & _SLOT_MASK).astype(np.uint32)
        starts = np.concatenate(([0], np.flatnonzero(frames[1:] != frames[:-1]) + 1, [len(frames)]))
        work = iter(range(len(starts) - 1))
        lock = threading.Lock()
        errors: list[BaseException] = []

        def take() -> Iterator[int]:
            while not errors:
                with lock:
                    # Several small frames at a time: neighbours in a pack are neighbours in memory, mostly.
                    batch = list(itertools.islice(work, 8))
                if not batch:
                    return
                yield from batch

        def run() -> None:
            piece = _Piece(write)
            try:
                for number in take():
                    lo, hi = int(starts[number]), int(starts[number + 1])
                    frame = int(frames[lo])
                    self._one_frame(frame >> 20, frame & 0xFFFFF, pages[lo:hi], slots[lo:hi], piece)
                piece.flush()
            except BaseException as error:
                errors.append(error)

        first = int(frames[0])
        with self._store.naming_points(((first >> 20, first & 0xFFFFF),)):
            cached = self._store.readers.get(first >> 20).is_cached(first & 0xFFFFF)
        nr_threads = min(parallel.for_restoring(from_disk=not cached), len(starts) - 1)
        threads = [threading.Thread(target=run, name="snap-fill", daemon=True) for _ in range(nr_threads - 1)]
        for thread in threads:
            thread.start()
        run()
        for thread in threads:
            thread.join()
        if errors:
            error = errors[0]
            errors.clear()
            try:
                raise error
            finally:
                del error  # no cycle of the error and this frame, which holds buffers (see KeyTable)

    def _one_frame(self, pack: int, frame: int, pages: U64, slots: np.ndarray, piece: _Piece) -> None:
        with self._store.naming_points(((pack, frame),)):
            data, slots = self._store.readers.get(pack).read_pages(frame, slots)
        first = int(slots[0])
        count = len(slots)
        if count >= _DIRECT and int(slots[-1]) - first + 1 == count and (slots[1:] > slots[:-1]).all():
            view = memoryview(data)[first * PAGE_SIZE : (first + count) * PAGE_SIZE]
            piece.direct(pages, view)
        else:
            piece.add(pages, data, slots)


class _Piece:
    """Pages gathered by one thread until there are enough of them to hand out."""

    def __init__(self, write: Write) -> None:
        self._write = write
        self._buffer = memoryview(bytearray(PIECE_PAGES * PAGE_SIZE))
        self._pages: list[U64] = []
        self._fill = 0

    def direct(self, pages: U64, data: memoryview) -> None:
        """A frame's pages as they are; the write callback must be done with them when it returns."""
        self._write(_runs_in_order(pages), data)

    def add(self, pages: U64, data: bytes | bytearray, slots: np.ndarray) -> None:
        """Copies pages behind the others, in order of page numbers."""
        order = np.argsort(pages, kind="stable")
        pages, slots = pages[order], np.ascontiguousarray(slots[order])
        at = 0
        while at < len(pages):
            count = min(PIECE_PAGES - self._fill, len(pages) - at)
            target = self._buffer[self._fill * PAGE_SIZE : (self._fill + count) * PAGE_SIZE]
            native.gather(target, data, slots[at : at + count])
            self._pages.append(pages[at : at + count])
            self._fill += count
            at += count
            if self._fill == PIECE_PAGES:
                self.flush()

    def flush(self) -> None:
        """Hands out what there is."""
        if self._fill:
            data = self._buffer[: self._fill * PAGE_SIZE]
            self._write(_runs_in_order(np.concatenate(self._pages)), data)
            self._pages, self._fill = [], 0


def _runs_in_order(pages: U64) -> RunTable:
    """Runs of page numbers in the order given (not sorted: several frames follow one another)."""
    if not len(pages):
        raise StoreError("no pages to hand out")
    breaks = np.flatnonzero(pages[1:] != pages[:-1] + np.uint64(1)) + 1
    starts = np.concatenate(([0], breaks))
    counts = np.diff(np.concatenate((starts, [len(pages)])))
    return np.stack((pages[starts].astype(np.int64), counts), axis=1)
