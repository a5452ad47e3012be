"""Packs as a set: the open ones of a store for reading, and the ones that a take is writing.

`PackReaders` keeps a bounded number of packs open and reads blobs with their bases. `PackSet` hands out room in
the current pack to several compressing threads; in a thread of its own it writes what they have put and seals full packs (both
wait for the disk, which compressing must not); and it either publishes all of them or removes all of them.
"""

from __future__ import annotations

import contextlib
import queue
import secrets
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path

from snapshotter.base.errors import SnapshotterError, StoreError, VerificationError
from store import imageset, native, pagemap
from store.catalog import BlobRefs, PackRow
from store.files import fsync_dir, wrapped
from store.pack import (
    KIND_IMAGES,
    KIND_MAPS,
    MAX_PACK_ID,
    FrameRef,
    PackFile,
    PackKeys,
    PackWriter,
    pack_name,
)
from store.segments import SegmentPool

MAX_OPEN = 256


class PackReaders:
    """Open packs of one store. Any thread."""

    def __init__(self, directory: Path, keys: PackKeys) -> None:
        self._directory = directory
        self._keys = keys
        self._open: OrderedDict[int, PackFile] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, pack: int) -> PackFile:
        """The pack, opened and its footer checked if need be. VerificationError: it is damaged or missing."""
        with self._lock:
            found = self._open.get(pack)
            if found is not None:
                self._open.move_to_end(pack)
                return found
        if not 0 < pack <= MAX_PACK_ID:
            raise VerificationError(f"no pack can have the number {pack}", hint="run `snap verify`")
        opened = PackFile(self._directory, pack, self._keys)
        with self._lock:
            self._open[pack] = opened
            while len(self._open) > MAX_OPEN:
                self._open.popitem(last=False)  # closed when the last thread that reads it lets go
        return opened

    def forget_all(self) -> None:
        """Lets go of every pack (they are about to be removed, or to be checked again)."""
        with self._lock:
            self._open.clear()

    def blob(self, ref: FrameRef, kind: int, dictionary: bytes | None = None) -> bytes:
        """One blob's bytes."""
        return bytes(self.get(ref[0]).read(ref[1], kind, dictionary))

    def base(self, ref: FrameRef) -> FrameRef | None:
        """What a blob was made against."""
        return self.get(ref[0]).frame(ref[1]).base

    def chain(self, ref: FrameRef) -> list[FrameRef]:
        """A blob and its bases, newest first. A cycle or an endless chain is damage."""
        chain = [ref]
        while (base := self.base(chain[-1])) is not None:
            if len(chain) > pagemap.MAX_CHAIN + 1 or base in chain:
                raise self.get(base[0]).bad("the chain of bases is too long", base[1])
            chain.append(base)
        return chain

    def maps(self, ref: FrameRef, cache: dict[FrameRef, pagemap.Maps] | None = None) -> pagemap.Maps:
        """The resolved page map of a point. `cache` may hold maps of earlier calls and gets this one."""
        chain = []
        at: FrameRef | None = ref
        resolved: pagemap.Maps | None = None
        for at in self.chain(ref):
            if cache is not None and at in cache:
                resolved = cache[at]
                break
            chain.append(at)
        for step in reversed(chain):
            try:
                resolved = pagemap.decode(self.blob(step, KIND_MAPS), resolved)
            except pagemap.BadMapError as error:
                raise self.get(step[0]).bad(f"the page map is damaged: {error}", step[1]) from error
        if resolved is None:
            raise self.get(ref[0]).bad("the page map has no keyframe", ref[1])
        if cache is not None:
            cache[ref] = resolved
        return resolved

    def image_bytes(self, ref: FrameRef) -> bytes:
        """The encoded image set of a point."""
        base = self.base(ref)
        dictionary = None
        if base is not None:
            if self.base(base) is not None:
                raise self.get(base[0]).bad("an image set's base has a base", base[1])
            dictionary = self.blob(base, KIND_IMAGES)
        return self.blob(ref, KIND_IMAGES, dictionary)

    def images(self, ref: FrameRef) -> dict[str, bytes]:
        """The images of a point."""
        try:
            return imageset.decode(self.image_bytes(ref))
        except imageset.BadImageSetError as error:
            raise self.get(ref[0]).bad(f"the image set is damaged: {error}", ref[1]) from error

    def blob_frames(self, refs: BlobRefs) -> list[FrameRef]:
        """Every blob frame that a point needs."""
        frames = self.chain(refs.maps)
        frames.append(refs.images)
        if (base := self.base(refs.images)) is not None:
            frames.append(base)
        return frames


class PackSet:
    """The packs of one take or prune, until `publish` or `discard`."""

    def __init__(self, directory: Path, keys: PackKeys, taken: Collection[int]) -> None:
        self._directory = directory
        self._keys = keys
        self._taken = taken
        self._lock = threading.Lock()
        self._room = threading.Condition(self._lock)
        self._pool = SegmentPool()
        self._current: PackWriter | None = None
        self._all: list[PackWriter] = []
        self._to_disk: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._disk: threading.Thread | None = None
        self._error: BaseException | None = None

    def _new_pack(self) -> PackWriter:
        for _ in range(64):
            pack_id = 1 + secrets.randbelow(MAX_PACK_ID)
            if pack_id not in self._taken and not (self._directory / pack_name(pack_id)).exists():
                pack = PackWriter(self._directory, pack_id, self._keys, self._pool)
                self._all.append(pack)
                return pack
        raise StoreError("no free pack number was found", where=str(self._directory), hint="run `snap prune`")

    def append(
        self, data: bytes | memoryview | native.Pages, *, raw: int, codec: int, kind: int, base: FrameRef | None = None,
        page_keys: bytes = b"",
    ) -> FrameRef:  # fmt: skip
        """Takes one frame. Any thread; only the reservation is serialised, and waits while the disk is far behind."""
        try:
            with self._lock:
                pack, number, offset = self._reserve(len(data))
            pack.put_frame(
                number, offset, data, raw=raw, codec=codec, kind=kind, base=base, page_keys=page_keys
            )
        except BaseException as error:
            self._fail(error)
            raise
        with self._lock:
            complete = pack.filled(offset, len(data))
            for segment in complete:
                self._later(partial(self._write_segment, pack, segment))
            if pack.closing and pack.writers == 0:
                self._later(partial(self._seal, pack))
        return pack.id, number

    def _reserve(self, size: int) -> tuple[PackWriter, int, int]:
        """Room for a frame: (pack, frame number, offset). Under the lock, which it lets go while it waits."""
        while self._pool.exhausted and self._error is None:
            self._room.wait()
        self._raise_earlier()
        if self._current is None:
            self._current = self._new_pack()
        pack = self._current
        number, offset = pack.reserve(size)
        if pack.full:
            pack.closing = True
            self._current = None
        return pack, number, offset

    def _raise_earlier(self) -> None:
        if isinstance(self._error, SnapshotterError):
            raise self._error  # with its reason: a full disk is told from others
        if self._error is not None:
            raise StoreError("an earlier write failed", where=str(self._directory)) from self._error

    def _fail(self, error: BaseException) -> None:
        """Nobody may wait for room that will never be made."""
        with self._lock:
            self._error = self._error or error
            self._room.notify_all()

    def _later(self, work: Callable[[], None]) -> None:
        """Have the disk's thread do something, after all that it was given before. Under the lock."""
        if self._disk is None:
            self._disk = threading.Thread(target=self._disk_loop, name="snap-disk", daemon=True)
            self._disk.start()
        self._to_disk.put(work)

    def _disk_loop(self) -> None:
        while (work := self._to_disk.get()) is not None:
            try:
                work()
            except BaseException as error:
                self._fail(error)

    def _write_segment(self, pack: PackWriter, segment: int) -> None:
        try:
            if self._error is None:
                pack.write_segment(segment)
        finally:
            with self._lock:
                pack.drop_segment(segment)
                self._room.notify_all()

    def _seal(self, pack: PackWriter) -> None:
        if self._error is None:
            pack.seal()
        with self._lock:
            pack.drop_rest()
            self._room.notify_all()

    def _join(self) -> None:
        if self._disk is not None:
            self._to_disk.put(None)
            self._disk.join()
            self._disk = None

    def publish(self) -> list[PackRow]:
        """Every pack complete, on disk, and under its name. What is left is the catalog's commit."""
        self._join()
        if self._error is None and self._current is not None:
            self._current.seal()
            self._current = None
        if self._error is not None:
            raise self._error
        if self._all:
            with wrapped("cannot make packs durable", self._directory):
                fsync_dir(self._directory)
        return [PackRow(pack.id, pack.size, pack.nr_pages) for pack in self._all]

    def discard(self) -> None:
        """Removes every file of the set. Never raises."""
        with contextlib.suppress(BaseException):
            self._join()
        for pack in self._all:
            pack.discard()
        self._all.clear()

    @property
    def bytes_written(self) -> int:
        """Bytes of all packs so far."""
        with self._lock:
            return sum(pack.size for pack in self._all)
