"""Giving space back: files nobody needs, packs without a live page, packs that are less than half alive.

Runs alone (the store's exclusive lock). Live is what the points' page maps and blobs reach. A pack less than
half alive is copied: its live pages into new packs, then the page maps (and images) of every point that needs
anything in it are written again, then one catalog transaction swaps old for new, then the old files go. A crash
before the transaction leaves new packs as garbage, after it old packs as garbage; the next prune removes either.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from snapshotter.base import faults
from snapshotter.base.errors import SnapshotterError, VerificationError
from snapshotter.base.pages import PAGE_SIZE
from store import compress, native, pagemap
from store.blobs import add_maps
from store.catalog import BlobRefs, PackRow
from store.compress import FrameCompressor
from store.files import TEMP_SUFFIX, wrapped
from store.pack import CODEC_ZSTD_BASE, KIND_IMAGES, KIND_PAGES, PACK_SUFFIX, FrameRef, location
from store.packset import PackSet
from store.staging import BIG_FRAME, SMALL_FRAME
from store.types import PruneReport

if TYPE_CHECKING:
    from store.pagemap import U64
    from store.repository import Store

LIVE_ENOUGH = 0.5
SMALL_PACK = 1 << 20
"""Packs below this are repacked only with others: copying one small file into another gains nothing."""


@dataclass(slots=True)
class _Live:
    """What is needed of one pack."""

    locs: list[U64] = field(default_factory=list)
    blobs: set[int] = field(default_factory=set)

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
        self._live: dict[int, _Live] = {}
        self._needs: dict[str, set[int]] = {}  # point -> packs that it needs
        self._whole = True  # every point resolves

    def run(self, *, dry_run: bool) -> PruneReport:
        """Marks, then repacks, then removes."""
        self._mark()
        dead = {pack for pack in self._rows if pack not in self._live} if self._whole else set()
        repack = self._choose(dead) if self._whole else set()
        garbage = self._garbage()
        before = sum(self._rows[pack].size_bytes for pack in dead | repack) + sum(size for _, size in garbage)
        added: list[PackRow] = []
        if dry_run:
            new_bytes = sum(self._live_bytes(pack) for pack in repack)
        else:
            added = self._swap(dead, repack)
            new_bytes = sum(row.size_bytes for row in added)
            self._remove(dead | repack, garbage)
        kept = (
            sum(row.size_bytes for pack, row in self._rows.items() if pack not in dead | repack) + new_bytes
        )
        return PruneReport(
            packs_removed=len(dead),
            packs_repacked=len(repack),
            garbage_removed=len(garbage),
            bytes_freed=max(before - new_bytes, 0),
            bytes_kept=kept,
            dry_run=dry_run,
        )

    # -- mark -----------------------------------------------------------------------------------------

    def _mark(self) -> None:
        cache: dict[FrameRef, pagemap.Maps] = {}
        for point, refs in self._refs.items():
            try:
                maps = self._store.readers.maps(refs.maps, cache)
                blobs = self._store.readers.blob_frames(refs)
            except VerificationError:
                # What a damaged point needs cannot be known, so nothing is thrown away until it is forgotten.
                self._whole = False
                continue
            while len(cache) > 8:
                cache.pop(next(iter(cache)))
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
        """Stored bytes of live frames, a frame counted by its share of live pages."""
        file = self._store.readers.get(pack)
        live = self._live[pack]
        total = float(sum(file.frame(frame).stored for frame in live.blobs))
        frames = ((live.pages() & np.uint64(0xFFFFFFFF)) >> np.uint64(12)).astype(np.int64)
        for number, count in zip(*np.unique(frames, return_counts=True), strict=True):
            frame = file.frame(int(number))
            total += frame.stored * int(count) / frame.nr_pages + int(count) * (native.KEY_BYTES + 8)
        return int(total)

    def _choose(self, dead: set[int]) -> set[int]:
        """Packs to copy. Damaged ones are left for `verify` to speak about."""
        chosen: set[int] = set()
        small: set[int] = set()
        for pack, row in self._rows.items():
            if pack in dead:
                continue
            try:
                alive = self._live_bytes(pack)
            except SnapshotterError:
                continue
            if alive < row.size_bytes * LIVE_ENOUGH:
                (small if row.size_bytes < SMALL_PACK else chosen).add(pack)
        if len(small) > 1 or chosen:
            chosen |= small
        return {pack for pack in chosen if self._readable(pack)}

    def _readable(self, pack: int) -> bool:
        file = self._store.readers.get(pack)
        frames = {int(loc) & 0xFFFFFFFF for loc in self._live[pack].pages()}
        try:
            for number in {low >> 12 for low in frames} | self._live[pack].blobs:
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
        return found

    def _unknown(self, name: str) -> bool:
        try:
            return int(name.removesuffix(PACK_SUFFIX), 16) not in self._rows
        except ValueError:
            return False  # not ours to remove

    # -- sweep ----------------------------------------------------------------------------------------

    def _swap(self, dead: set[int], repack: set[int]) -> list[PackRow]:
        """New packs for what lives in `repack`, and the transaction. Returns the new packs."""
        if not dead | repack:
            return []
        packs = PackSet(self._store.packs_dir, self._store.keys, set(self._rows))
        try:
            old, new = self._copy_pages(packs, repack)
            moved = self._rewrite(packs, repack, old, new)
            rows = packs.publish()
            faults.point("store.prune_copied")
            self._drop_indexes(dead | repack)
            self._store.catalog.replace_packs(rows, dead | repack, moved)
            faults.point("store.prune_committed")
        except BaseException:
            if self._untouched(dead | repack):
                packs.discard()
            raise
        return rows

    def _untouched(self, gone: set[int]) -> bool:
        """False when the transaction happened, or may have: then the new packs stay."""
        try:
            return gone <= set(self._store.catalog.packs())
        except SnapshotterError:
            return False

    def _copy_pages(self, packs: PackSet, repack: set[int]) -> tuple[U64, U64]:
        """Live pages into new frames. Returns old locations, sorted, and the new one of each."""
        compressor = FrameCompressor()
        old: list[U64] = []
        new: list[U64] = []
        buffer = bytearray()
        waiting: list[U64] = []

        def flush() -> None:
            nonlocal buffer, waiting
            if not waiting:
                return
            codec, data = compressor.pages(memoryview(bytes(buffer)), 1)
            keys = native.hash_pages(self._store.keys.pages, bytes(buffer))
            pack, frame = packs.append(data, raw=len(buffer), codec=codec, kind=KIND_PAGES, page_keys=keys)
            locs = np.concatenate(waiting)
            old.append(locs)
            new.append(np.arange(len(locs), dtype="<u8") + np.uint64(location(pack, frame)))
            buffer, waiting = bytearray(), []

        for pack in sorted(repack):
            file = self._store.readers.get(pack)
            keys = file.page_keys()
            locs = self._live[pack].pages()
            frames = ((locs & np.uint64(0xFFFFFFFF)) >> np.uint64(12)).astype(np.int64)
            for number in np.unique(frames).tolist():
                mine = locs[frames == number]
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
        previous: tuple[pagemap.Maps, BlobRefs] | None = None
        image_base: tuple[FrameRef, bytes] | None = None
        cache: dict[FrameRef, pagemap.Maps] = {}
        for point, refs in self._refs.items():
            if not self._needs[point] & repack:
                continue
            readers = self._store.readers
            maps = {
                name: pagemap.Space(space.pages, _translate(space.locs, old, new))
                for name, space in readers.maps(refs.maps, cache).items()
            }
            while len(cache) > 8:
                cache.pop(next(iter(cache)))
            images = refs.images
            frames = {images, readers.base(images) or images}
            if any(pack in repack for pack, _ in frames):
                images, image_base = self._copy_images(packs, readers.image_bytes(refs.images), image_base)
            # Each on the one before: neighbours in time share most, whichever job they are of; the rule bounds it.
            before_maps, before = previous or ({}, None)
            moved[point] = add_maps(packs, maps, before_maps, before, images)
            previous = (maps, moved[point])
        return moved

    @staticmethod
    def _copy_images(
        packs: PackSet, raw: bytes, base: tuple[FrameRef, bytes] | None
    ) -> tuple[FrameRef, tuple[FrameRef, bytes]]:
        """An image set again, against the last full one written here if that pays. Returns it and the base to use next."""
        codec, data = compress.blob(raw)
        if base is not None:
            packed = compress.blob(raw, base[1])[1]
            if len(packed) * 2 < len(data):
                ref = packs.append(
                    packed, raw=len(raw), codec=CODEC_ZSTD_BASE, kind=KIND_IMAGES, base=base[0]
                )
                return ref, base
        ref = packs.append(data, raw=len(raw), codec=codec, kind=KIND_IMAGES)
        return ref, (ref, raw)

    def _drop_indexes(self, gone: set[int]) -> None:
        """Index files that cover a pack that goes: removed before the catalog changes, never after."""
        names = set(self._store.index.names())
        with wrapped("cannot remove an index file", self._store.path / "index"):
            for index in self._store.index.load(frozenset(self._rows)):
                if not index.packs & gone:
                    names.discard(index.name)
            self._store.index.remove(names)

    def _remove(self, packs: set[int], garbage: list[tuple[Path, int]]) -> None:
        self._store.readers.forget_all()
        paths = [path for path, _ in garbage]
        paths += [self._store.packs_dir / f"{pack:08x}{PACK_SUFFIX}" for pack in sorted(packs)]
        with wrapped("cannot remove a file of the store", self._store.packs_dir):
            for path in paths:
                path.unlink(missing_ok=True)
                faults.point("store.prune_deleted")


def _translate(locs: U64, old: U64, new: U64) -> U64:
    """Locations with those in `old` (sorted) replaced by their partners in `new`."""
    index, found = pagemap.find(old, locs)
    out = locs.copy()
    if len(old):
        out[found] = new[index[found]]
    return out
