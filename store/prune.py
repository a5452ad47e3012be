"""Giving space back: files nobody needs, packs without a live page, packs half dead, many small packs.

Runs alone (the store's exclusive lock). Live is what the points' page maps and blobs reach. First go stray
files, then packs without anything live: both free space without needing any. Then packs less than half alive,
damaged ones, and small ones if there are many are copied: their live frames into new packs, then the page maps
(and images) of every point that needs anything in them are written again, then one catalog transaction swaps
old for new, then the old files go. A crash before the transaction leaves new packs as garbage, after it old packs
as garbage; the next prune removes either. All that is copied is copied in one swap, so that a point's page map is
written again once at most, however many packs it needs.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from snapshotter.base import faults
from snapshotter.base.errors import SnapshotterError, VerificationError
from snapshotter.base.pages import PAGE_SIZE
from store import compress, native, pagemap, reserve, sizes
from store.blobs import add_maps
from store.catalog import BlobRefs, PackRow
from store.compress import FrameCompressor
from store.files import TEMP_SUFFIX, NoSpaceError, wrapped
from store.pack import (
    FRAME_BYTES,
    HEADER_BYTES,
    KIND_IMAGES,
    KIND_PAGES,
    PACK_SUFFIX,
    TRAILER_BYTES,
    DamagedPackError,
    Frame,
    FrameRef,
    PackFile,
    location,
    pack_name,
)
from store.packset import PackSet
from store.staging import APART_FROM, BIG_FRAME, SMALL_FRAME
from store.types import PruneReport

if TYPE_CHECKING:
    from store.pagemap import U64
    from store.repository import Store

LIVE_ENOUGH = 0.5
SMALL_PACK = 1 << 20
"""Packs below this are repacked only with others: copying one small file into another gains nothing."""
MERGE_BELOW = 4 << 20
MERGE_FROM = 64
"""More packs than this that are smaller than that are merged: every increment makes one."""
ROOM_SHARE = 0.9
"""Of the free space that copying may use; the catalog's journal and the page maps need some too."""
HEAD_TEMP_AGE_S = 3600
"""A rollback that writes its head does not hold the store's lock any more, but is done in milliseconds."""
_CACHED_MAPS = 8


@dataclass(slots=True)
class _Live:
    """What is needed of one pack."""

    locs: list[U64] = field(default_factory=list)
    blobs: set[int] = field(default_factory=set)
    size_bytes: int | None = None  # once it was reckoned

    def pages(self) -> U64:
        """Sorted locations of live pages."""
        return pagemap.ascending(np.concatenate(self.locs)) if self.locs else np.zeros(0, dtype="<u8")


def prune(store: Store, *, dry_run: bool = False, wait_s: float = 10.0) -> PruneReport:
    """See Store.prune."""
    with store.lock_exclusive(wait_s):
        store.readers.forget_all()
        return _Pruner(store).run(dry_run=dry_run)


class _Pruner:
    def __init__(self, store: Store) -> None:
        self._store = store
        self._rows = store.catalog.packs()
        self._refs = store.catalog.blobs()
        self._live: dict[int, _Live] = {}  # in order of age: by the first point that needs the pack
        self._needs: dict[str, set[int]] = {}  # point -> packs that it needs
        self._image_users: Counter[FrameRef] = Counter()
        self._whole = True  # every point resolves
        self._warnings: list[str] = []

    def run(self, *, dry_run: bool) -> PruneReport:
        """Marks, then removes, then repacks."""
        self._mark()
        dead = {pack for pack in self._rows if pack not in self._live} if self._whole else set()
        garbage = self._garbage()
        if not dry_run:
            self._remove([path for path, _ in garbage])
            self._drop(dead)
        wanted = self._choose() if self._whole else []
        if dry_run:
            repack = self._that_fit(wanted)
            new_bytes = sum(self._live_bytes(pack) for pack in repack)
        else:
            repack, new_bytes = self._repack_all(wanted)
            self._store.damage.strike(self._store.damage.load().keys() - self._store.catalog.packs().keys())
            self._update_sizes()
        gone = dead.union(repack)
        before = sum(self._rows[pack].size_bytes for pack in gone) + sum(size for _, size in garbage)
        kept = sum(row.size_bytes for pack, row in self._rows.items() if pack not in gone) + new_bytes
        return PruneReport(
            packs_removed=len(dead),
            packs_repacked=len(repack),
            garbage_removed=len(garbage),
            bytes_freed=max(before - new_bytes, 0),
            bytes_kept=kept,
            dry_run=dry_run,
            warnings=tuple(self._warnings),
        )

    def _update_sizes(self) -> None:
        """What forgotten points had stored counts for those that still need it. A size that stays as it was harms nothing."""
        with contextlib.suppress(VerificationError, NoSpaceError):
            self._store.catalog.set_sizes(sizes.stored(self._store))

    # -- mark -----------------------------------------------------------------------------------------

    def _mark(self) -> None:
        cache: dict[FrameRef, pagemap.Maps] = {}
        for point, refs in self._refs.items():
            try:
                with self._store.noting_damage():
                    maps = self._store.readers.maps(refs.maps, cache)
                    blobs = self._store.readers.blob_frames(refs)
                    image_base = self._store.readers.base(refs.images)
            except VerificationError:
                # What a damaged point needs cannot be known, so nothing is thrown away until it is forgotten.
                self._whole = False
                continue
            while len(cache) > _CACHED_MAPS:
                cache.pop(next(iter(cache)))
            self._image_users.update({refs.images, image_base or refs.images})
            needs = {pack for pack, _ in blobs}
            for pack, frame in blobs:
                self._live.setdefault(pack, _Live()).blobs.add(frame)
            for space in maps.values():
                locs = pagemap.ascending(space.locs[space.locs != 0])
                packs = (locs >> np.uint64(32)).astype(np.int64)
                numbers, starts = np.unique(packs, return_index=True)
                for pack, part in zip(numbers.tolist(), np.split(locs, starts[1:]), strict=False):
                    live = self._live.setdefault(pack, _Live())
                    live.locs.append(part)
                    if len(live.locs) > 16:
                        live.locs = [live.pages()]
                    needs.add(pack)
            self._needs[point] = needs

    def _live_bytes(self, pack: int) -> int:
        """What a pack of nothing but its live frames would take, a frame counted by its share of live pages."""
        live = self._live[pack]
        if live.size_bytes is None:
            file = self._store.readers.get(pack)
            total = float(HEADER_BYTES + TRAILER_BYTES)
            total += sum(file.frame(frame).stored + FRAME_BYTES for frame in live.blobs)
            for number, locs in _by_frame(live.pages()):
                frame = file.frame(number)
                if frame.kind != KIND_PAGES:
                    raise file.bad("a page map names a frame that holds no pages", number)
                share = len(locs) / frame.nr_pages
                total += (frame.stored + FRAME_BYTES) * share + len(locs) * (native.KEY_BYTES + 8)
            live.size_bytes = int(total)
        return live.size_bytes

    def _choose(self) -> list[int]:
        """Packs to copy, in order of age, so that neighbouring points come together."""
        damaged = self._store.damage.load()
        chosen: list[int] = []
        tiny: list[int] = []
        small: list[int] = []
        for pack in self._live:
            row = self._rows.get(pack)
            try:
                with self._store.noting_damage():
                    alive = self._live_bytes(pack)
            except SnapshotterError:
                continue  # `verify` speaks about it; what it still holds may be needed
            if row is None:
                continue
            if row.size_bytes < MERGE_BELOW:
                small.append(pack)
            if pack in damaged:
                chosen.append(pack)
            elif alive < row.size_bytes * LIVE_ENOUGH:
                (tiny if row.size_bytes < SMALL_PACK else chosen).append(pack)
        if len(tiny) > 1 or chosen:
            chosen += tiny
        if len(small) > MERGE_FROM:
            chosen += small
        wanted = {pack for pack in chosen if self._readable(pack)}
        return [pack for pack in self._live if pack in wanted]

    def _repack_all(self, wanted: Sequence[int]) -> tuple[list[int], int]:
        """Copies what lives in the packs. When not all fit at once: the smallest first, whose room then serves the others.

        Returns the packs that went, and the bytes of the new ones.
        """
        left, gone, new_bytes = list(wanted), [], 0
        while left:
            fits = self._that_fit(left)
            if not fits and reserve.release(self._store.path):
                continue
            went, added = self._repack(fits) if fits else ([], [])
            new_bytes += sum(row.size_bytes for row in added)
            gone += went
            if not went or len(fits) == len(left):
                left = [pack for pack in left if pack not in fits] if went else left
                break
            left = [pack for pack in left if pack not in went]
            # Locations have changed: what lives where is found out anew.
            self._forget_marks()
            self._mark()
            left = [pack for pack in left if pack in self._live]
        if left and len(gone) < len(wanted) and not self._warnings:
            self._warn(len(left), "the disk is nearly full")
        return gone, new_bytes

    def _forget_marks(self) -> None:
        self._store.readers.forget_all()
        self._refs = self._store.catalog.blobs()
        self._live, self._needs, self._image_users = {}, {}, Counter()

    def _that_fit(self, packs: Sequence[int]) -> list[int]:
        """The packs, if there is room for copying them all; else as many of the smallest as there is room for. In order of age."""
        with wrapped("cannot look at the file system", self._store.packs_dir):
            status = os.statvfs(self._store.packs_dir)
        room = status.f_bavail * status.f_frsize * ROOM_SHARE
        fits: set[int] = set()
        for pack in sorted(packs, key=self._live_bytes):
            room -= self._live_bytes(pack)
            if room < 0:
                break
            fits.add(pack)
        return [pack for pack in packs if pack in fits]

    def _warn(self, nr_packs: int, why: str) -> None:
        packs = "a pack was" if nr_packs == 1 else f"{nr_packs} packs were"
        self._warnings.append(f"{packs} not repacked: {why}; free some space and prune again")

    def _readable(self, pack: int) -> bool:
        """Whether everything that is needed of a pack can be had."""
        live = self._live[pack]
        try:
            with self._store.noting_damage():
                file = self._store.readers.get(pack)
                for number in [number for number, _ in _by_frame(live.pages())] + sorted(live.blobs):
                    file.read_stored(number)
        except VerificationError:
            return False
        return True

    def _garbage(self) -> list[tuple[Path, int]]:
        """Temporary files, packs that no catalog row names. Nobody else is at work: the lock is exclusive."""
        found = []
        for directory in (self._store.path, self._store.packs_dir, self._store.path / "index"):
            with wrapped("cannot list the store", directory):
                for entry in os.scandir(directory):
                    orphan = entry.name.endswith(PACK_SUFFIX) and self._unknown(entry.name)
                    if entry.name.endswith(TEMP_SUFFIX) or orphan:
                        found.append((Path(entry.path), entry.stat(follow_symlinks=False).st_size))
        heads = self._store.path / "heads"
        with wrapped("cannot list the store", heads), contextlib.suppress(FileNotFoundError):
            for path in heads.glob("*" + TEMP_SUFFIX):
                status = path.lstat()
                if status.st_mtime < time.time() - HEAD_TEMP_AGE_S:
                    found.append((path, status.st_size))
        return found

    def _unknown(self, name: str) -> bool:
        try:
            return int(name.removesuffix(PACK_SUFFIX), 16) not in self._rows
        except ValueError:
            return False  # not ours to remove

    # -- sweep ----------------------------------------------------------------------------------------

    def _drop(self, dead: set[int]) -> None:
        """Packs without anything live: out of the catalog, then off the disk."""
        if not dead:
            return
        self._drop_indexes(dead)
        try:
            self._store.catalog.replace_packs([], dead, {})
        except NoSpaceError:
            # The journal needs a few KiB. Key tables can be made again.
            self._store.index.remove(self._store.index.names())
            self._store.catalog.replace_packs([], dead, {})
        faults.point("store.prune_committed")
        self._remove(self._paths(dead))

    def _repack(self, packs: list[int]) -> tuple[list[int], list[PackRow]]:
        """Copies what lives in `packs`. Returns the packs that went and the new ones; a full disk only warns."""
        while packs:
            try:
                with self._store.noting_damage():
                    added = self._swap(packs)
            except NoSpaceError as error:
                self._warn(len(packs), error.what)
                break
            except DamagedPackError as error:
                if error.pack not in packs:
                    raise
                packs = [pack for pack in packs if pack != error.pack]
            else:
                self._remove(self._paths(packs))
                return packs, added
        return [], []

    def _swap(self, repack: list[int]) -> list[PackRow]:
        """New packs for what lives in `repack`, and the transaction. Returns the new packs."""
        gone = set(repack)
        packs = PackSet(self._store.packs_dir, self._store.keys, set(self._rows))
        try:
            old, new = self._copy_pages(packs, repack)
            moved = self._rewrite(packs, gone, old, new)
            rows = packs.publish()
            faults.point("store.prune_copied")
            self._drop_indexes(gone)
            self._store.catalog.replace_packs(rows, gone, moved)
            faults.point("store.prune_committed")
        except BaseException:
            if self._untouched(gone):
                packs.discard()
            raise
        return rows

    def _untouched(self, gone: set[int]) -> bool:
        """False when the transaction happened, or may have: then the new packs stay."""
        try:
            return gone <= set(self._store.catalog.packs())
        except SnapshotterError:
            return False

    def _copy_pages(self, packs: PackSet, repack: list[int]) -> tuple[U64, U64]:
        """Live pages into new packs; a frame that is all alive goes as it is.

        Returns:
            The old locations, sorted, and the new one of each.
        """
        compressor = FrameCompressor()
        old: list[U64] = []
        new: list[U64] = []
        buffer = bytearray()
        waiting: list[U64] = []

        def flush() -> None:
            nonlocal buffer, waiting
            if not waiting:
                return
            # What is left of old frames is what newer points still need some of: see staging.
            apart = len(buffer) >= APART_FROM * PAGE_SIZE
            compress = compressor.pages_apart if apart else compressor.pages
            codec, data = compress(memoryview(bytes(buffer)), 1)
            keys = native.hash_pages(self._store.keys.pages, bytes(buffer))
            pack, frame = packs.append(data, raw=len(buffer), codec=codec, kind=KIND_PAGES, page_keys=keys)
            locs = np.concatenate(waiting)
            old.append(locs)
            new.append(np.arange(len(locs), dtype="<u8") + np.uint64(location(pack, frame)))
            buffer, waiting = bytearray(), []

        for pack in repack:
            file = self._store.readers.get(pack)
            keys = file.page_keys()
            for number, mine in _by_frame(self._live[pack].pages()):
                frame = file.frame(number)
                if frame.nr_pages == len(mine) == (int(mine[-1]) & 0xFFF) + 1:
                    place = _copy_frame(packs, file, number, frame, keys.get(number, b""))
                    old.append(mine)
                    new.append(np.arange(len(mine), dtype="<u8") + np.uint64(location(*place)))
                    continue
                if len(buffer) + len(mine) * PAGE_SIZE > BIG_FRAME * PAGE_SIZE:
                    flush()
                data = file.read(number, KIND_PAGES)
                if native.hash_pages(self._store.keys.pages, data) != keys.get(number):
                    raise file.bad("pages do not match their digests", number)
                for loc in mine.tolist():
                    slot = loc & 0xFFF
                    if (slot + 1) * PAGE_SIZE > len(data):
                        raise file.bad("a page map names a page that the frame does not have", number)
                    buffer += data[slot * PAGE_SIZE : (slot + 1) * PAGE_SIZE]
                waiting.append(mine)
                if len(buffer) >= SMALL_FRAME * PAGE_SIZE:
                    flush()
        flush()
        if not old:
            return pagemap.EMPTY.locs, pagemap.EMPTY.locs
        olds, news = np.concatenate(old), np.concatenate(new)
        order = np.argsort(olds)
        return olds[order], news[order]

    def _rewrite(self, packs: PackSet, repack: set[int], old: U64, new: U64) -> dict[str, BlobRefs]:
        """New blobs for every point that needs a pack that goes."""
        moved: dict[str, BlobRefs] = {}
        previous: dict[str, tuple[pagemap.Maps, BlobRefs]] = {}
        cache: dict[FrameRef, pagemap.Maps] = {}
        images: dict[FrameRef, FrameRef] = {}
        jobs = self._store.catalog.job_of_points()
        for point, refs in self._refs.items():
            if not self._needs[point] & repack:
                continue
            maps = {
                name: pagemap.Space(space.pages, _translate(space.locs, old, new))
                for name, space in self._store.readers.maps(refs.maps, cache).items()
            }
            while len(cache) > _CACHED_MAPS:
                cache.pop(next(iter(cache)))
            place = self._copy_images(packs, repack, refs.images, images)
            # Each on the one before of its job: they share most; the keyframe rule bounds the chain.
            before_maps, before = previous.pop(jobs[point], ({}, None))
            moved[point] = add_maps(packs, maps, before_maps, before, place)
            previous[jobs[point]] = (maps, moved[point])
            while len(previous) > _CACHED_MAPS:
                previous.pop(next(iter(previous)))
        return moved

    def _copy_images(
        self, packs: PackSet, repack: set[int], ref: FrameRef, done: dict[FrameRef, FrameRef]
    ) -> FrameRef:
        """The place of an image set from now on; `done` knows those that were copied."""
        readers = self._store.readers
        base = readers.base(ref)
        if ref[0] not in repack and (base is None or base[0] not in repack):
            return ref
        if ref in done:
            return done[ref]
        if base is None or self._image_users[base] > 1:
            if base is not None and readers.base(base) is not None:
                raise readers.get(base[0]).bad("an image set's base has a base", base[1])
            place = None if base is None else self._copy_images(packs, repack, base, done)
            frame, data = readers.get(ref[0]).read_stored(ref[1])
            if frame.kind != KIND_IMAGES:
                raise readers.get(ref[0]).bad("not an image set", ref[1])
            done[ref] = packs.append(data, raw=frame.raw, codec=frame.codec, kind=KIND_IMAGES, base=place)
        else:
            # Its base is kept for this one alone: without it, it takes less.
            raw = readers.image_bytes(ref)
            codec, data = compress.blob(raw)
            done[ref] = packs.append(data, raw=len(raw), codec=codec, kind=KIND_IMAGES)
        return done[ref]

    def _drop_indexes(self, gone: set[int]) -> None:
        """Index files that cover a pack that goes: removed before the catalog changes, never after."""
        names = set(self._store.index.names())
        with wrapped("cannot remove an index file", self._store.path / "index"):
            for index in self._store.index.load(frozenset(self._rows)):
                if not index.packs & gone:
                    names.discard(index.name)
            self._store.index.remove(names)

    def _paths(self, packs: Iterable[int]) -> list[Path]:
        return [self._store.packs_dir / pack_name(pack) for pack in packs]

    def _remove(self, paths: Iterable[Path]) -> None:
        self._store.readers.forget_all()
        with wrapped("cannot remove a file of the store", self._store.packs_dir):
            for path in paths:
                path.unlink(missing_ok=True)
                faults.point("store.prune_deleted")


def _by_frame(locs: U64) -> Iterator[tuple[int, U64]]:
    """Sorted locations of one pack, by the number of their frame."""
    frames = (locs & np.uint64(0xFFFFFFFF)) >> np.uint64(12)
    numbers, starts = np.unique(frames, return_index=True)
    return zip(numbers.tolist(), np.split(locs, starts[1:]) if len(numbers) else [], strict=True)


def _copy_frame(packs: PackSet, file: PackFile, number: int, frame: Frame, page_keys: bytes) -> FrameRef:
    """A frame of pages into another pack, compressed as it is."""
    if frame.kind != KIND_PAGES or frame.base or len(page_keys) != frame.nr_pages * native.KEY_BYTES:
        raise file.bad("the frame's pages do not fit its keys", number)
    data = file.read_stored(number)[1]
    return packs.append(data, raw=frame.raw, codec=frame.codec, kind=KIND_PAGES, page_keys=page_keys)


def _translate(locs: U64, old: U64, new: U64) -> U64:
    """Locations with those in `old` (sorted) replaced by their partners in `new`."""
    index, found = pagemap.find(old, locs)
    out = locs.copy()
    if len(old):
        out[found] = new[index[found]]
    return out
