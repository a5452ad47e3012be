"""What each point takes up: the STORED of `snap list`.

Points share pages, so a page counts for the oldest point that needs it, and for the next one once that is forgotten. The
sizes of all points add up to what is live in the packs. A frame counts by its share of live pages.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from store import native, pagemap
from store.pack import FRAME_BYTES, FrameRef

if TYPE_CHECKING:
    from store.pagemap import U64
    from store.repository import Store

_SLOT_BITS, _PACK_BITS = np.uint64(12), np.uint64(32)
_CACHED_MAPS = 8


def stored(store: Store) -> dict[str, int]:
    """Bytes of every point, by id. Raises VerificationError when a point cannot be resolved."""
    sizes: dict[str, int] = {}
    seen: U64 = pagemap.EMPTY.locs
    seen_blobs: set[FrameRef] = set()
    cache: dict[FrameRef, pagemap.Maps] = {}
    for point, refs in store.catalog.blobs().items():
        maps = store.readers.maps(refs.maps, cache)
        while len(cache) > _CACHED_MAPS:
            cache.pop(next(iter(cache)))
        blobs = set(store.readers.blob_frames(refs)) - seen_blobs
        seen_blobs |= blobs
        size = float(sum(_frame_bytes(store, ref) for ref in blobs))
        locs = [space.locs[space.locs != 0] for space in maps.values()]
        if locs:
            mine = pagemap.ascending(np.concatenate(locs))
            fresh = mine[~pagemap.find(seen, mine)[1]] if len(seen) else mine
            if len(fresh):
                size += _pages_bytes(store, fresh)
                seen = pagemap.ascending(np.concatenate((seen, fresh)))
        sizes[point] = int(size)
    return sizes


def _frame_bytes(store: Store, ref: FrameRef) -> int:
    return int(store.readers.get(ref[0]).frame(ref[1]).stored + FRAME_BYTES)


def _pages_bytes(store: Store, locs: U64) -> float:
    """Of sorted locations."""
    frames, counts = np.unique(locs >> _SLOT_BITS, return_counts=True)
    total = len(locs) * float(native.KEY_BYTES + 8)
    for frame, count in zip(frames.tolist(), counts.tolist(), strict=True):
        ref = (frame >> 20, frame & 0xFFFFF)
        total += _frame_bytes(store, ref) * count / max(store.readers.get(ref[0]).frame(ref[1]).nr_pages, 1)
    return total


def live_share(maps: pagemap.Maps, packs: set[int], nr_written: int) -> float:
    """Of the pages that a take has written into its packs, the part that its page map still needs."""
    if not nr_written:
        return 1.0
    locs = [space.locs[np.isin(space.locs >> _PACK_BITS, list(packs))] for space in maps.values()]
    live = len(np.unique(np.concatenate(locs))) if locs else 0
    return min(live / nr_written, 1.0)
