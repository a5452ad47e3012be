"""Frames in and out of zstd: levels, the probe for what does not compress, blobs and their bases.

One `FrameCompressor` per thread: its contexts are reused, which zstd needs to be fast.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import zstandard

from snapshotter.base.pages import PAGE_SIZE
from store.pack import CODEC_RAW, CODEC_ZSTD, CODEC_ZSTD_BASE, CODEC_ZSTD_PAGES

FAST_LEVEL = -1
_FAST_TABLE = {"window_log": 17, "hash_log": 12, "min_match": 7}
"""What level -1 gets beside its strategy: tables that fit into the first cache. 5 % faster than the level's own (19, 13, 6),
and as small: 1.84 times to 1.84 on the benchmark's memory, 2.60 to 2.63 on that of a Python process.
"""
SMALL_LEVEL = 6
"""For a few dozen pages, where the time is nothing and a block of the file system counts."""
BLOB_LEVEL = 5
_PROBE_FROM = 64 * PAGE_SIZE
_PROBE_AT = (0.07, 0.31, 0.58, 0.93)
_WORTH = 0.97


class FrameCompressor:
    """zstd contexts of one thread."""

    def __init__(self) -> None:
        self._contexts: dict[int, zstandard.ZstdCompressor] = {}
        self._was_random = False
        """The last frame did not compress: the next one may not either."""

    def _context(self, level: int) -> zstandard.ZstdCompressor:
        if level not in self._contexts:
            if level == FAST_LEVEL:
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
        return len(self._context(level).compress(sample)) > len(sample) * _WORTH

    def pages(self, pages: memoryview, level: int = FAST_LEVEL) -> tuple[int, bytes | memoryview]:
        """(codec, bytes to store) of a frame of pages."""
        if self._was_random and len(pages) >= _PROBE_FROM and self._looks_random(pages, level):
            return CODEC_RAW, pages
        data = self._context(level).compress(pages)
        self._was_random = len(data) >= len(pages) * _WORTH
        return (CODEC_RAW, pages) if self._was_random else (CODEC_ZSTD, data)

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
