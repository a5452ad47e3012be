"""What the store's tests share: a reader over bytes, a take in one call, and what a point restores to."""

from __future__ import annotations

import os

from store import PointMeta
from store.pack import KIND_PAGES, PackFile, PackKeys, PackWriter
from store.segments import SegmentPool

PAGE = 4096
KEYS = PackKeys(bytes(range(16)), bytes(32), b"\1" * 32)
META = {
    "pid": 42,
    "boot_id": "b" * 36,
    "dump_uptime_ns": 7,
    "tracker": "compare",
    "tasks": {42: 1000, 43: 1001},
}


class Memory:
    """A PageReader over a bytes-like object; page numbers count from `base`."""

    def __init__(self, data, base=0):
        self.data = memoryview(data)
        self.base = base

    def read_into(self, runs, buffer):
        at = 0
        for first, count in runs:
            start = (first - self.base) * PAGE
            buffer[at : at + count * PAGE] = self.data[start : start + count * PAGE]
            at += count * PAGE
        assert at == len(buffer)


def page(number, salt=0):
    """A page unlike any other, that compresses."""
    return (b"%08d %08d " % (number, salt)).ljust(64, b".") * 64


def take(store, data, parent=None, *, runs=None, job="sim", space="mm/42", images=None, **meta):
    """A point that holds `data` from page 0 on; with `runs` only those are put, the rest is the parent's."""
    whole = [(0, len(data) // PAGE)]
    with store.writer(job, parent) as writer:
        writer.put(space, whole if runs is None else runs, Memory(data))
        writer.drain()
        writer.close_space(space, whole)
        writer.add_images({"manifest": b"manifest", "mm/42": b"m" * 500} if images is None else images)
        return writer.commit(PointMeta(**{**META, **meta}))


def restored(store, point, space="mm/42"):
    """What `fill` writes, in a buffer that was zero."""
    with store.reader(point) as reader:
        runs = reader.runs(space)
        size = runs[-1][0] + runs[-1][1] if runs else 0
        out = bytearray(size * PAGE)

        def write(pieces, data):
            at = 0
            for first, count in pieces:
                out[first * PAGE : (first + count) * PAGE] = data[at : at + count * PAGE]
                at += count * PAGE
            assert at == len(data)

        reader.fill(space, write)
        assert reader.read(space, [(0, size)] if size else []) == bytes(out)
        return bytes(out)


def die_at(owner, name, nth, *, after=False):
    """Ends this process at the nth call of `owner.name`, before it happens or after."""
    real = getattr(owner, name)
    count = 0

    def wrapper(*args, **kwargs):
        nonlocal count
        count += 1
        if count == nth and not after:
            os._exit(77)
        result = real(*args, **kwargs)
        if count == nth:
            os._exit(77)
        return result

    setattr(owner, name, wrapper)


def one_frame(directory, stored, codec, nr_pages):
    """A pack of one frame of pages that says what it is told, with a right checksum."""
    pack = PackWriter(directory, 0x1234, KEYS, SegmentPool())
    number, offset = pack.reserve(len(stored))
    pack.put_frame(
        number, offset, stored, raw=nr_pages * 4096, codec=codec, kind=KIND_PAGES, base=None, page_keys=bytes(16 * nr_pages)
    )  # fmt: skip
    pack.filled(offset, len(stored))
    pack.seal()
    return PackFile(directory, 0x1234, KEYS)
