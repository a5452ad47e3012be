"""The images of one point as one blob: names and bytes, compressed together.

An image set is compressed alone or against one older set (its base, never itself based on another), so a
point's images cost at most two frames to read. FORMAT.md, "Image set".
"""

from __future__ import annotations

import struct
from collections.abc import Mapping

MAGIC = b"SNAPIMGS"
VERSION = 1
MAX_IMAGES = 1 << 20
_HEADER = struct.Struct("<8sII")
_ENTRY = struct.Struct("<HHI")


class BadImageSetError(Exception):
    """Bytes that are no image set; the message says why."""


def encode(images: Mapping[str, bytes]) -> bytes:
    """Sorted by name, so that equal sets are equal bytes."""
    parts = [_HEADER.pack(MAGIC, VERSION, len(images))]
    for name in sorted(images):
        raw = name.encode()
        parts += [_ENTRY.pack(len(raw), 0, len(images[name])), raw, images[name]]
    return b"".join(parts)


def decode(data: bytes) -> dict[str, bytes]:
    """Hostile input: raises BadImageSetError."""
    if len(data) < _HEADER.size:
        raise BadImageSetError("shorter than a header")
    magic, version, count = _HEADER.unpack_from(data)
    if magic != MAGIC or version != VERSION or count > MAX_IMAGES:
        raise BadImageSetError("no image set of a known version")
    images: dict[str, bytes] = {}
    at = _HEADER.size
    for _ in range(count):
        if at + _ENTRY.size > len(data):
            raise BadImageSetError("truncated")
        name_size, flags, size = _ENTRY.unpack_from(data, at)
        if flags:
            raise BadImageSetError(f"flags {flags:#x} of an image are not known to this snap")
        at += _ENTRY.size
        if at + name_size + size > len(data):
            raise BadImageSetError("truncated")
        try:
            name = data[at : at + name_size].decode()
        except UnicodeDecodeError as error:
            raise BadImageSetError("a name is not UTF-8") from error
        at += name_size
        if name in images:
            raise BadImageSetError("an image comes twice")
        images[name] = data[at : at + size]
        at += size
    if at != len(data):
        raise BadImageSetError("bytes after the last image")
    return images
