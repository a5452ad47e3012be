"""Checking what is on disk: everything that a set of points can reach, byte by byte.

Each frame is read once: its keyed checksum, its decompression, and every page's digest against the pack's key
table. Damage is reported with the points that it hurts; it never stops the rest from being checked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from snapshotter.base.errors import SnapshotterError, VerificationError
from snapshotter.base.pages import PAGE_SIZE
from store import native, pagemap
from store.pack import KIND_PAGES, DamagedPackError, FrameRef
from store.types import Damage, Point, VerifyReport

if TYPE_CHECKING:
    from store.catalog import BlobRefs
    from store.pagemap import U64
    from store.repository import Store

_KEEP = 8  # resolved maps kept while walking along chains


def page_frames(maps: pagemap.Maps) -> tuple[U64, U64]:
    """The page frames of a point as sorted location >> 12, and the highest slot used of each."""
    parts = [space.locs[space.locs != 0] for space in maps.values()]
    locs = pagemap.ascending(np.concatenate(parts)) if parts else np.zeros(0, dtype="<u8")
    frames = locs >> np.uint64(12)
    last = np.concatenate((frames[1:] != frames[:-1], [True])) if len(frames) else np.zeros(0, dtype=bool)
    return frames[last], locs[last] & np.uint64(0xFFF)


def resolve_all(store: Store, refs: dict[str, BlobRefs]) -> dict[str, tuple[U64, U64] | VerificationError]:
    """For every point its page frames, or why its page map cannot be had."""
    cache: dict[FrameRef, pagemap.Maps] = {}
    result: dict[str, tuple[U64, U64] | VerificationError] = {}
    for point, ref in refs.items():
        try:
            result[point] = page_frames(store.readers.maps(ref.maps, cache))
        except VerificationError as error:
            result[point] = error
        while len(cache) > _KEEP:
            cache.pop(next(iter(cache)))
    return result


def points_using(store: Store, frames: Sequence[FrameRef]) -> list[str]:
    """Ids of the points that need any of these frames; those that do not resolve count as hurt."""
    wanted = set(frames)
    numbers = np.array([pack << 20 | frame for pack, frame in frames], dtype="<u8")
    refs = store.catalog.blobs()
    hurt = []
    for point, found in resolve_all(store, refs).items():
        if isinstance(found, VerificationError) or np.isin(numbers, found[0]).any():
            hurt.append(point)
            continue
        try:
            blobs = store.readers.blob_frames(refs[point])
        except VerificationError:
            hurt.append(point)
        else:
            if wanted.intersection(blobs):
                hurt.append(point)
    return hurt


def verify(store: Store, points: list[Point] | None) -> VerifyReport:
    """See Store.verify."""
    with store.lock_shared():
        store.readers.forget_all()
        refs = store.catalog.blobs(None if points is None else [point.id for point in points])
        verifier = _Verifier(store, refs)
        report = verifier.run()
        store.damage.strike(verifier.recovered())
        store.damage.add(verifier.found)
        return report


class _Verifier:
    def __init__(self, store: Store, refs: dict[str, BlobRefs]) -> None:
        self._store = store
        self._refs = refs
        self._damage: list[Damage] = []
        self.found: list[tuple[int, int | None]] = []
        """Packs and frames that proved damaged."""
        self._nr_frames = self._nr_pages = self._bytes = 0

    def run(self) -> VerifyReport:
        users: dict[str, U64] = {}
        highest: dict[int, int] = {}
        broken_blobs: dict[tuple[str, str], list[str]] = {}
        for point, found in resolve_all(self._store, self._refs).items():
            try:
                if isinstance(found, VerificationError):
                    raise found
                self._store.readers.images(self._refs[point].images)
            except VerificationError as error:
                broken_blobs.setdefault((error.where, error.what), []).append(point)
                self._note(error)
            if isinstance(found, VerificationError):
                continue
            users[point] = found[0]
            for frame, slot in zip(found[0].tolist(), found[1].tolist(), strict=True):
                highest[frame] = max(highest.get(frame, 0), slot)
        self._damage += [Damage(where, what, tuple(ids)) for (where, what), ids in broken_blobs.items()]
        self._check_pages(users, highest)
        return VerifyReport(
            points=tuple(self._refs),
            nr_frames=self._nr_frames,
            nr_pages=self._nr_pages,
            nr_packs=len({frame >> 20 for frame in highest}),
            bytes_read=self._bytes,
            damage=tuple(self._damage),
        )

    def _check_pages(self, users: dict[str, U64], highest: dict[int, int]) -> None:
        by_pack: dict[int, list[int]] = {}
        for frame in sorted(highest):
            by_pack.setdefault(frame >> 20, []).append(frame)
        for pack, frames in by_pack.items():
            try:
                keys = self._store.readers.get(pack).page_keys()
            except SnapshotterError as error:
                self._add(error, frames, users)
                continue
            for frame in frames:
                try:
                    self._check_frame(pack, frame & 0xFFFFF, keys, highest[frame])
                except SnapshotterError as error:
                    self._add(error, [frame], users)

    def _check_frame(self, pack: int, number: int, keys: dict[int, bytes], highest: int) -> None:
        reader = self._store.readers.get(pack)
        self._nr_frames += 1
        self._bytes += reader.frame(number).stored
        data = reader.read(number, KIND_PAGES)
        self._nr_pages += len(data) // PAGE_SIZE
        if highest >= len(data) // PAGE_SIZE:
            raise reader.bad("a page map names a page that the frame does not have", number)
        if native.hash_pages(self._store.keys.pages, data) != keys.get(number):
            raise reader.bad("pages do not match their digests", number)

    def recovered(self) -> list[int]:
        """Packs noted as damaged of which every frame is right again, those included that no point needs, or gone."""
        known = self._store.catalog.packs()
        return [pack for pack in self._store.damage.load() if pack not in known or self._is_right(pack)]

    def _is_right(self, pack: int) -> bool:
        try:
            reader = self._store.readers.get(pack)
            keys = reader.page_keys()
            for number in range(len(reader.frames)):
                if reader.frame(number).kind == KIND_PAGES:
                    self._check_frame(pack, number, keys, 0)
                else:
                    reader.read_stored(number)
        except SnapshotterError:
            return False
        return True

    def _note(self, error: SnapshotterError) -> None:
        if isinstance(error, DamagedPackError):
            self.found.append((error.pack, error.frame))

    def _add(self, error: SnapshotterError, frames: list[int], users: dict[str, U64]) -> None:
        self._note(error)
        numbers = np.array(frames, dtype="<u8")
        hurt = tuple(point for point, used in users.items() if np.isin(numbers, used).any())
        self._damage.append(Damage(error.where, error.what, hurt))
