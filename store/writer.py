"""The point writer: takes a dump's pages and images, and commits them as one point. It is a PageSink.

Pages are read, tested for zero, hashed, looked up and compressed by threads of its own, two megabytes at a
time, in buffers that are reused. While somebody waits in `drain` in a hurry (the job is frozen then), reading goes first
and compressing waits. Nothing of a writer exists for anybody else before `commit` returns; a writer that is
left without it removes its packs. After one failure a writer is broken and only says so.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import secrets
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np

from snapshotter.base import faults
from snapshotter.base.errors import MissingPagesError, SnapshotterError, StoreError, UsageError
from snapshotter.base.pages import PAGE_SIZE, PageReader
from snapshotter.base.runs import PageRuns, RunTable, as_table, cut
from store import native, pagemap, parallel, reserve, sizes
from store.blobs import add_images, add_maps
from store.files import store_error
from store.packset import PackSet
from store.staging import CHUNK_PAGES, PROVISIONAL, Worker
from store.types import Point, PointMeta, WriterStats

if TYPE_CHECKING:
    from store.native import Stager
    from store.pagemap import U64
    from store.repository import Store

_MARK = np.uint64(PROVISIONAL)
SPARE_BUFFERS = 32
"""Chunks that `drain` may have read ahead of compressing: 64 MiB."""


@dataclass(slots=True)
class Task:
    """One chunk to read: at most CHUNK_PAGES pages of one space; `locs` is filled by the worker."""

    runs: RunTable
    nr_pages: int
    reader: PageReader
    locs: U64


class PointWriter:
    """See the module. Use as a context manager; `put` and `drain` from one thread at a time."""

    def __init__(self, store: Store, job: str, parent: Point | None) -> None:
        self._store = store
        self._job = job
        self._parent = parent
        self._lock = store.lock_shared()
        try:
            reserve.make(store.path, reserve.LEAST_BYTES)  # before the take uses up the room
            self._start()
        except BaseException:
            self._lock.release()
            raise

    def _start(self) -> None:
        packs = frozenset(self._store.catalog.packs())
        self._parent_refs = None
        self._parent_maps: pagemap.Maps = {}
        if self._parent is not None:
            self._parent_refs = self._store.blob_refs(self._parent.id)
            with self._store.noting_damage():
                self._parent_maps = self._store.readers.maps(self._parent_refs.maps)
        # What the parent has in frames known to be damaged must be dumped again (MissingPagesError).
        self._inherited = pagemap.without(self._parent_maps, self._store.damage.load())
        native.keep_freed_memory()
        self._stager: Stager = self._store.stager(packs)
        self._packs = PackSet(self._store.packs_dir, self._store.keys, packs)
        self._images: dict[str, bytes] = {}
        self._puts: dict[str, list[U64]] = {}
        """The locations of what was put, one array for each put; filled in by the workers."""
        self._latest: dict[str, pagemap.Space] = {}
        """The pages that were put. Their locations are _MARK and a place in what was put, one put after the other."""
        self._closed: dict[str, pagemap.Space] = {}
        """What close_space was told, with locations as in _latest or the parent's."""
        self._changed = threading.Condition()
        self._queue: deque[Task] = deque()
        self._read_ahead: deque[tuple[Task, bytearray]] = deque()
        self._spare: list[bytearray] = []
        self._nr_spare = 0
        self._unread = 0
        self._leave = 0
        self._draining = 0
        nr_threads = parallel.for_taking()
        self._busy = nr_threads
        self._paused = False
        self._stopping = False
        self._done = False
        self._committing: str | None = None
        self._error: BaseException | None = None
        self._workers = [
            Worker(i, self._stager, self._packs, big_frames=self._parent is None) for i in range(nr_threads)
        ]
        self._threads = [
            threading.Thread(target=self._run, args=(worker,), name=f"snap-store-{number}", daemon=True)
            for number, worker in enumerate(self._workers)
        ]
        for thread in self._threads:
            thread.start()

    # -- PageSink -------------------------------------------------------------------------------------

    def expect(self, nr_pages: int) -> None:
        """See PageSink."""
        self._stager.expect(nr_pages)

    def put(self, space: str, runs: PageRuns, reader: PageReader) -> None:
        """Queue pages; may return before they were read. A later put of the same page wins."""
        self._check()
        table = as_table(runs)
        pages = pagemap.expand(table)
        locs = np.zeros(len(pages), dtype="<u8")
        puts = self._puts.setdefault(space, [])
        first = sum(map(len, puts))
        puts.append(locs)
        tasks = []
        for at, chunk in zip(range(0, len(pages), CHUNK_PAGES), cut(table, CHUNK_PAGES), strict=True):
            part = locs[at : at + CHUNK_PAGES]
            tasks.append(Task(chunk, len(part), reader, part))
        with self._changed:
            self._queue.extend(tasks)
            self._unread += len(tasks)
            self._changed.notify_all()
        places = np.arange(first, first + len(pages), dtype="<u8") | _MARK
        self._latest[space] = pagemap.put_over(self._latest.get(space, pagemap.EMPTY), pages, places)

    def drain(self, *, hurry: bool = True, leave: int = 0) -> None:
        """Wait until every queued page but `leave` was read (not necessarily stored); raises what a worker raised."""
        with self._changed:
            self._draining += hurry
            self._leave = leave
            self._changed.notify_all()
            try:
                while self._unread * CHUNK_PAGES > leave and self._error is None:
                    self._changed.wait()
            finally:
                self._draining -= hurry
        self._check()

    def pause(self) -> None:
        """Finish the chunks at hand and hold; see PageSink."""
        with self._changed:
            self._paused = True
            while self._busy and self._error is None:
                self._changed.wait()

    def resume(self) -> None:
        """End a pause. Idempotent."""
        with self._changed:
            self._paused = False
            self._changed.notify_all()

    def close_space(self, space: str, present: PageRuns) -> None:
        """The space's final set of pages; see snapshotter.base.pages."""
        self._check()
        pages = pagemap.ascending(pagemap.expand(present))
        closed, missing = pagemap.overlay(
            pages, self._latest.get(space, pagemap.EMPTY), self._inherited.get(space, pagemap.EMPTY)
        )
        if len(missing):
            raise MissingPagesError(
                f"{len(missing)} pages were neither dumped nor in the parent point, the first is "
                f"{int(missing[0]):#x}",
                where=space,
                hint="take the point again without a parent",
            )
        self._closed[space] = closed

    # -- the rest of a point --------------------------------------------------------------------------

    def add_images(self, images: Mapping[str, bytes]) -> None:
        """Images of the point, by name; a name given again is replaced."""
        self._check()
        self._images.update(images)

    def stats(self) -> WriterStats:
        """Counters so far; exact once drained, `bytes_stored` once committed."""
        return WriterStats(
            pages_put=sum(worker.pages_put for worker in self._workers),
            pages_new=sum(worker.pages_new for worker in self._workers),
            pages_zero=sum(worker.pages_zero for worker in self._workers),
            bytes_stored=self._packs.bytes_written,
        )

    def commit(self, meta: PointMeta) -> Point:
        """Everything on disk, then the one transaction that makes the point exist."""
        self._check()
        unclosed = sorted(set(self._puts) - set(self._closed))
        if unclosed:
            raise UsageError(f"pages were put but the space was not closed: {', '.join(unclosed)}")
        try:
            return self._commit(meta)
        except OSError as error:
            self._error = error
            raise store_error(error, "cannot write the point", self._store.path) from error
        except BaseException as error:
            self._error = error
            raise

    def _commit(self, meta: PointMeta) -> Point:
        self._stop(finish=True)
        self._check()
        maps = self._resolve()
        parent_images = self._parent_refs.images if self._parent_refs else None
        image_ref, image_bytes = add_images(self._packs, self._store.readers, self._images, parent_images)
        refs = add_maps(self._packs, maps, self._parent_maps, self._parent_refs, image_ref)
        rows = self._packs.publish()
        stats = self.stats()
        live = sizes.live_share(maps, {row.id for row in rows}, sum(row.nr_pages for row in rows))
        pages_total = sum(len(space.pages) for space in maps.values())
        point = Point(
            id=meta.point_id or secrets.token_hex(16),
            parent=self._parent.id if self._parent else None,
            job=self._job,
            pid=meta.pid,
            taken_at=meta.taken_at or dt.datetime.now(dt.UTC),
            dump_uptime_ns=meta.dump_uptime_ns,
            boot_id=meta.boot_id,
            tracker=meta.tracker,
            nonce=meta.nonce,
            nr_tasks=meta.nr_tasks,
            frozen_us=meta.frozen_us,
            duration_us=(time.monotonic_ns() - meta.started_ns) // 1000 if meta.started_ns else 0,
            pages_dirty=meta.pages_dirty,
            pages_new=stats.pages_new,
            pages_total=pages_total,
            bytes_logical=pages_total * PAGE_SIZE + image_bytes,
            bytes_stored=int(sum(row.size_bytes for row in rows) * live),
            warnings=tuple(meta.warnings),
            tasks=dict(meta.tasks),
        )
        faults.point("store.before_commit")
        self._committing = point.id
        point = self._store.catalog.add_point(point, refs, rows, meta.files)
        faults.point("store.committed")
        self._done = True
        self._lock.release()
        self._store.maintain_index()
        reserve.make(self._store.path)
        return point

    def _resolve(self) -> pagemap.Maps:
        """The point's page map: what close_space found out, every provisional location replaced."""
        finals = [final for worker in self._workers for final in worker.final]
        maps: pagemap.Maps = {}
        for space, closed in self._closed.items():
            if not len(closed.pages):
                continue
            if space in self._puts:
                native.resolve(closed.locs, np.concatenate(self._puts[space]), finals)
            maps[space] = closed
        return maps

    # -- threads --------------------------------------------------------------------------------------

    def _run(self, worker: Worker) -> None:
        try:
            while (step := self._next()) is not None:
                task, ahead = step
                if ahead is None:
                    worker.read(task.runs, task.nr_pages, task.reader)
                    self._mark_read()
                else:
                    worker.copy_in(ahead, task.nr_pages)
                    self._give_back(ahead)
                worker.stage(task.locs, contiguous=len(task.runs) == 1)
            if self._error is None:
                worker.finish()
        except BaseException as error:
            self._error = self._error or error
        finally:
            with self._changed:
                self._busy -= 1
                self._changed.notify_all()

    def _next(self) -> tuple[Task, bytearray | None] | None:
        """The next chunk for a worker; read-aheads are done here, as long as somebody waits for reading."""
        while True:
            with self._changed:
                while True:
                    if self._error is not None:
                        return None
                    if self._paused and not self._draining:
                        self._wait()
                        continue
                    if self._draining and self._queue and (self._spare or self._nr_spare < SPARE_BUFFERS):
                        task = self._queue.popleft()
                        break
                    if self._read_ahead:
                        return self._read_ahead.popleft()
                    if self._queue:
                        return self._queue.popleft(), None
                    if self._stopping and not self._unread:
                        return None
                    self._wait()
                if self._spare:
                    buffer = self._spare.pop()
                else:
                    buffer = bytearray()
                    self._nr_spare += 1
            if not buffer:
                buffer = bytearray(CHUNK_PAGES * PAGE_SIZE)
            task.reader.read_into(task.runs, memoryview(buffer)[: task.nr_pages * PAGE_SIZE])
            with self._changed:
                self._read_ahead.append((task, buffer))
            self._mark_read()

    def _wait(self) -> None:
        """A worker waits for something to change."""
        self._busy -= 1
        if self._paused:
            self._changed.notify_all()
        self._changed.wait()
        self._busy += 1

    def _mark_read(self) -> None:
        with self._changed:
            self._unread -= 1
            # Waking whoever drains for each chunk would cost as much as hashing it.
            if self._unread * CHUNK_PAGES <= self._leave or self._read_ahead or not self._unread:
                self._changed.notify_all()

    def _give_back(self, buffer: bytearray) -> None:
        with self._changed:
            self._spare.append(buffer)

    def _stop(self, *, finish: bool) -> None:
        with self._changed:
            self._stopping = True
            self._paused = False
            if not finish and self._error is None:
                self._error = StoreError("the writer was closed before its commit")
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _check(self) -> None:
        """Raises what broke the writer, in the caller's thread."""
        if self._done:
            raise UsageError("the point was committed already")
        if self._error is not None:
            if isinstance(self._error, OSError):
                raise store_error(self._error, "cannot write the point", self._store.path) from self._error
            if isinstance(self._error, (SnapshotterError, KeyboardInterrupt, MemoryError)):
                raise self._error
            raise StoreError(f"the point cannot be stored: {self._error}") from self._error

    def close(self) -> None:
        """Without a commit: stops the threads and removes the packs. Idempotent."""
        if self._done:
            return
        self._stop(finish=False)
        with contextlib.suppress(BaseException):
            # A commit that failed may have happened all the same: then the packs are the point's.
            if self._committing is None or not self._store.catalog.points(ids=[self._committing]):
                self._packs.discard()
        self._done = True
        self._error = None  # its traceback holds this writer: a cycle that would keep the buffers
        self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()
