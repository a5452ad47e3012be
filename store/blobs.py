"""A point's two blobs: its image set and its page map, each against an older one where that pays.

Shared by takes and by prune, which writes them again when their packs go. Bases are never changed: a blob that
others are based on stays for as long as one of them is needed, though its own point may be forgotten.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

from snapshotter.base.errors import VerificationError
from store import compress, imageset, pagemap
from store.catalog import BlobRefs
from store.pack import CODEC_ZSTD_BASE, KIND_IMAGES, KIND_MAPS, MAX_BLOB_BYTES, FrameRef

if TYPE_CHECKING:
    from store.packset import PackReaders, PackSet

from snapshotter.base.errors import StoreError


def add_images(
    packs: PackSet, readers: PackReaders, images: Mapping[str, bytes], parent: FrameRef | None
) -> tuple[FrameRef, int]:
    """Writes an image set, based on the parent's (or on the parent's base). Returns its place and raw size."""
    raw = imageset.encode(images)
    if len(raw) > MAX_BLOB_BYTES:
        raise StoreError(
            f"the images take {len(raw) >> 20} MiB, more than {MAX_BLOB_BYTES >> 20}",
            where="images",
            hint="the job has more state beside its memory than snap handles: full pipes and socket queues, mostly",
        )
    codec, data = compress.blob(raw)
    base: FrameRef | None = None
    if parent is not None:
        # A parent that cannot be read must not stop this point from being whole by itself.
        with contextlib.suppress(VerificationError):
            candidate = readers.base(parent) or parent
            packed = compress.blob(raw, readers.blob(candidate, KIND_IMAGES))[1]
            if len(packed) * 2 < len(data):
                codec, data, base = CODEC_ZSTD_BASE, packed, candidate
    ref = packs.append(data, raw=len(raw), codec=codec, kind=KIND_IMAGES, base=base)
    return ref, len(raw)


def add_maps(
    packs: PackSet,
    maps: pagemap.Maps,
    parent_maps: pagemap.Maps,
    parent: BlobRefs | None,
    images: FrameRef,
) -> BlobRefs:
    """Writes a page map: a delta on the parent's while the keyframe rule allows it."""
    if parent is not None:
        raw = pagemap.encode_delta(maps, parent_maps)
        codec, data = compress.blob(raw)
        if not pagemap.needs_keyframe(parent.chain, parent.delta_bytes, parent.keyframe_bytes, len(data)):
            ref = packs.append(data, raw=len(raw), codec=codec, kind=KIND_MAPS, base=parent.maps)
            return BlobRefs(
                images, ref, parent.chain + 1, parent.keyframe_bytes, parent.delta_bytes + len(data)
            )
    raw = pagemap.encode_keyframe(maps)
    if len(raw) > MAX_BLOB_BYTES:
        raise StoreError(f"the page map takes {len(raw) >> 20} MiB", where="page map")
    codec, data = compress.blob(raw)
    ref = packs.append(data, raw=len(raw), codec=codec, kind=KIND_MAPS)
    return BlobRefs(images, ref, 0, len(data), 0)
