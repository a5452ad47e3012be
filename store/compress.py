"""Frames in and out of zstd: levels, the probe for what does not compress, bytes or byte planes, blobs and their bases.

One `FrameCompressor` per thread: its contexts are reused, which zstd needs to be fast.
"""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np
import zstandard

from snapshotter.base.pages import PAGE_SIZE
from store import native
from store.pack import (
    CODEC_RAW,
    CODEC_ZSTD,
    CODEC_ZSTD_BASE,
    CODEC_ZSTD_PAGES,
    CODEC_ZSTD_PLANES,
    MAX_FRAME_PAGES,
)

FAST_LEVEL, FASTER_LEVEL = -1, -4
_FAST_TABLE = {"window_log": 17, "hash_log": 12, "min_match": 7}
"""What these levels get beside their strategy: tables that fit into the first cache. 5 % faster than the level's own (19, 13, 6),
and as small: 1.84 times to 1.84 on the benchmark's memory, 2.60 to 2.63 on that of a Python process.
"""
SMALL_LEVEL = 6
"""For a few dozen pages, where the time is nothing and a block of the file system counts."""
BLOB_LEVEL = 5
_PROBE_FROM = 64 * PAGE_SIZE
_PROBE_AT = (0.07, 0.31, 0.58, 0.93)
_WORTH = 0.97
_TRY_EVERY, _TRY_SELDOM, _TRY_AT_MOST_EVERY = 64, 512, 4
"""Frames after which all ways are tried again: twice as many after each time that nothing came of it, and no fewer than the third
number when they begin to compress otherwise.
"""
_OTHERWISE = 1.5
_LARGER = 1.1
"""The faster level may cost a tenth of space. It takes a sixth less time then; that is so for arrays of numbers, and a heap would grow by half."""


class FrameCompressor:
    """zstd contexts of one thread."""

    def __init__(self) -> None:
        self._contexts: dict[int, zstandard.ZstdCompressor] = {}
        self._was_random = False
        """The last frame did not compress: the next one may not either."""
        self._planes = memoryview(b"")
        self._as_planes = self._faster = False
        self._try_every = self._since_tried = _TRY_EVERY
        self._size_tried = 0.0
        """Part of its size that the frame had which was tried last."""

    def _context(self, level: int) -> zstandard.ZstdCompressor:
        if level not in self._contexts:
            if level in {FAST_LEVEL, FASTER_LEVEL}:
                parameters = zstandard.ZstdCompressionParameters.from_level(
                    level, write_checksum=False, write_content_size=True, **_FAST_TABLE
                )
                self._contexts[level] = zstandard.ZstdCompressor(compression_params=parameters)
            else:  # its tables depend on the size of what is compressed
                self._contexts[level] = zstandard.ZstdCompressor(
                    level=level, write_checksum=False, write_content_size=True
                )
        return self._contexts[level]

    def _looks_random(self, pages: memoryview, level: int) -> bool:
        """Four pages out of a large frame stand for it: on encrypted or packed data a fifth of the work saves the rest.

        They do not lie at equal distances: memory often repeats after some pages.
        """
        nr_pages = len(pages) // PAGE_SIZE
        sample = b"".join(
            pages[at * PAGE_SIZE : (at + 1) * PAGE_SIZE]
            for at in (int(part * nr_pages) for part in _PROBE_AT)
        )
        limit = len(sample) * _WORTH
        context = self._context(level)
        return (
            len(context.compress(sample)) > limit and len(context.compress(self._in_planes(sample))) > limit
        )

    def pages(
        self, pages: memoryview, level: int = FAST_LEVEL, *, beside: int = 0
    ) -> tuple[int, bytes | memoryview]:
        """(codec, bytes to store) of a frame of pages; `beside`: bytes stored as they are, of pages that lay between these."""
        if self._was_random and len(pages) >= _PROBE_FROM and self._looks_random(pages, level):
            return CODEC_RAW, pages
        if len(pages) >= _PROBE_FROM:
            codec, data = self._either_way(pages, level, beside)
        else:
            codec, data = CODEC_ZSTD, self._context(level).compress(pages)
        self._was_random = len(data) >= len(pages) * _WORTH
        return (CODEC_RAW, pages) if self._was_random else (codec, data)

    def _either_way(self, pages: memoryview, level: int, beside: int) -> tuple[int, bytes]:
        """As it is or as byte planes, whichever made less of the frame for which both were tried last.

        Neighbours are alike, mostly: a heap, an array, a file's text.
        """
        if self._since_tried >= self._try_every:
            return self._try(pages, level, beside)
        codec = CODEC_ZSTD_PLANES if self._as_planes else CODEC_ZSTD
        faster = self._faster and level == FAST_LEVEL
        data = self._compress(pages, codec, FASTER_LEVEL if faster else level)
        if len(data) >= len(pages) * _WORTH:
            return self._try(pages, level, beside)
        self._since_tried += 1
        size = len(data) / len(pages)
        if self._since_tried >= _TRY_AT_MOST_EVERY and not (
            self._size_tried / _OTHERWISE < size < self._size_tried * _OTHERWISE
        ):
            self._since_tried = self._try_every = _TRY_EVERY
        return codec, data

    def _try(self, pages: memoryview, level: int, beside: int) -> tuple[int, bytes]:
        """The frame in the best way, which is that of the next ones as well."""
        before = self._as_planes, self._faster
        plain = self._compress(pages, CODEC_ZSTD, level)
        planes = self._compress(pages, CODEC_ZSTD_PLANES, level)
        # Planes cost a step more, there and back.
        self._as_planes = len(planes) < len(plain) * _WORTH
        codec, data = (CODEC_ZSTD_PLANES, planes) if self._as_planes else (CODEC_ZSTD, plain)
        if level == FAST_LEVEL:
            faster = self._compress(pages, codec, FASTER_LEVEL)
            self._faster = len(faster) + beside <= (len(data) + beside) * _LARGER
            data = faster if self._faster else data
        same = before == (self._as_planes, self._faster)
        self._try_every = min(2 * self._try_every, _TRY_SELDOM) if same else _TRY_EVERY
        self._since_tried, self._size_tried = 1, len(data) / len(pages)
        return codec, data

    def _compress(self, pages: memoryview, codec: int, level: int) -> bytes:
        content = pages if codec == CODEC_ZSTD else self._in_planes(pages)
        data: bytes = self._context(level).compress(content)
        return data

    def _in_planes(self, pages: memoryview | bytes) -> memoryview:
        if not self._planes:
            self._planes = memoryview(mmap.mmap(-1, MAX_FRAME_PAGES * PAGE_SIZE, flags=mmap.MAP_PRIVATE))
        planes = self._planes[: len(pages)]
        native.to_planes(planes, pages)
        return planes

    def pages_apart(self, pages: memoryview, level: int = FAST_LEVEL) -> tuple[int, bytes | memoryview]:
        """The same for scattered pages, each compressed for itself: a later point that still needs a few of them need not
        decompress the others.
        """
        nr_pages = len(pages) // PAGE_SIZE
        table = np.full((nr_pages, 2), PAGE_SIZE, dtype=np.uint64)
        table[:, 0] *= np.arange(nr_pages, dtype=np.uint64)
        found = self._context(level).multi_compress_to_buffer(
            zstandard.BufferWithSegments(pages, table.tobytes()), threads=1
        )
        most = int(PAGE_SIZE * _WORTH)
        parts: list[Any] = [found[at] for at in range(nr_pages)]
        for at, part in enumerate(parts):
            if len(part) >= most:
                parts[at] = pages[at * PAGE_SIZE : (at + 1) * PAGE_SIZE]
        sizes = np.array([len(part) for part in parts], dtype="<u2")
        data = b"".join((sizes.tobytes(), *parts))
        return (CODEC_ZSTD_PAGES, data) if len(data) < len(pages) * _WORTH else (CODEC_RAW, pages)


def blob(data: bytes, base: bytes | None = None, level: int = BLOB_LEVEL) -> tuple[int, bytes]:
    """(codec, bytes to store) of a blob, with `base` as the dictionary if given."""
    if base is not None:
        dictionary = zstandard.ZstdCompressionDict(base, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
        # The dictionary has no content of its own to find matches in unless the window covers both.
        parameters = zstandard.ZstdCompressionParameters.from_level(
            level,
            source_size=len(data),
            dict_size=len(base),
            write_content_size=True,
            write_checksum=False,
            write_dict_id=False,
        )
        return CODEC_ZSTD_BASE, zstandard.ZstdCompressor(
            dict_data=dictionary, compression_params=parameters
        ).compress(data)
    packed = zstandard.ZstdCompressor(level=level, write_checksum=False).compress(data)
    return (CODEC_ZSTD, packed) if len(packed) < len(data) else (CODEC_RAW, data)
