"""The store's view of the C page helpers (parasite_c/hash.c, pages.c): bytes and numpy arrays in, plain values out.

Every call drops the GIL (cffi). Sizes are checked here, because C trusts them.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import numpy as np
from parasite_c._native import ffi, lib

from snapshotter.base.pages import PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from store.pagemap import U64

KEY_BYTES = 16
_OUTSIDE = -2
_MOST_EXPECTED = 1 << 20
Buffer = Any  # anything with the buffer protocol


@functools.lru_cache(maxsize=64)
def _context(secret: bytes) -> Any:
    """A secret's key material (hash.c)."""
    if len(secret) != 32:
        raise ValueError("a secret has 32 bytes")
    context = ffi.new("snap_hash_key *")
    if lib.snap_hash_init(context, secret) < 0:
        raise MemoryError
    return context


def derive(secret: bytes, label: bytes) -> bytes:
    """Another secret for another use: keyed BLAKE3 of the label, 32 bytes."""
    if len(secret) != 32:
        raise ValueError("a secret has 32 bytes")
    out = ffi.new("uint8_t[32]")
    if lib.snap_blake3(secret, label, len(label), out) < 0:
        raise MemoryError
    return bytes(ffi.buffer(out, 32))


def checksum(secret: bytes, data: Buffer) -> bytes:
    """Digest of any bytes: 16 bytes."""
    view = ffi.from_buffer("uint8_t[]", data)
    out = ffi.new("uint8_t[]", KEY_BYTES)
    if lib.snap_digest(_context(secret), view, len(view), out) < 0:
        raise MemoryError
    return bytes(ffi.buffer(out, KEY_BYTES))


def hash_pages(secret: bytes, pages: Buffer) -> bytes:
    """The digest of each 4 KiB page, in order."""
    view = ffi.from_buffer("uint8_t[]", pages)
    nr_pages, rest = divmod(len(view), PAGE_SIZE)
    if rest:
        raise ValueError("whole pages are needed")
    out = bytearray(nr_pages * KEY_BYTES)
    lib.snap_hash_pages(_context(secret), view, nr_pages, ffi.from_buffer("uint8_t[]", out))
    return bytes(out)


def sort_table(keys: bytearray, locs: U64) -> None:
    """Sort keys (16 bytes each) and their locations together, in place."""
    if len(keys) != len(locs) * KEY_BYTES:
        raise ValueError("keys and locations differ in number")
    if lib.snap_table_sort(
        ffi.from_buffer("uint8_t[]", keys), ffi.from_buffer("uint64_t[]", locs), len(locs)
    ):
        raise MemoryError


def fanout(keys: Buffer, nr_keys: int, bits: int) -> bytes:
    """First index of every prefix of `bits` bits, and the end: (1 << bits) + 1 little-endian u32."""
    out = np.zeros((1 << bits) + 1, dtype="<u4")
    lib.snap_table_fanout(
        ffi.from_buffer("uint8_t[]", keys), nr_keys, bits, ffi.from_buffer("uint32_t[]", out)
    )
    return out.tobytes()


def gather(target: Buffer, source: Buffer, slots: npt.NDArray[np.uint32]) -> None:
    """target[i] = source[slots[i]], in pages. ValueError: a slot outside the source."""
    to, frm = ffi.from_buffer("uint8_t[]", target), ffi.from_buffer("uint8_t[]", source)
    if len(to) < len(slots) * PAGE_SIZE:
        raise ValueError("target too small")
    if lib.snap_gather(to, frm, len(frm) // PAGE_SIZE, ffi.from_buffer("uint32_t[]", slots), len(slots)):
        raise ValueError("slot outside the frame")


def to_planes(target: Buffer, pages: Buffer) -> None:
    """Whole pages as byte planes, into as many bytes of `target` (planes.c)."""
    to, frm = ffi.from_buffer("uint8_t[]", target), ffi.from_buffer("uint8_t[]", pages)
    nr_pages, rest = divmod(len(frm), PAGE_SIZE)
    if rest or len(to) < len(frm):
        raise ValueError("whole pages are needed, and room for as many bytes")
    lib.snap_to_planes(to, frm, nr_pages)


def from_planes(planes: Buffer, slots: npt.NDArray[np.uint32]) -> bytearray:
    """These pages of those whose byte planes are given. ValueError: a slot outside of them."""
    frm = ffi.from_buffer("uint8_t[]", planes)
    nr_pages, rest = divmod(len(frm), PAGE_SIZE)
    if rest:
        raise ValueError("whole pages are needed")
    pages = bytearray(len(slots) * PAGE_SIZE)
    to = ffi.from_buffer("uint8_t[]", pages)
    if lib.snap_from_planes(to, frm, nr_pages, ffi.from_buffer("uint32_t[]", slots), len(slots)):
        raise ValueError("slot outside the frame")
    return pages


class Pages:
    """Whole pages in these slots of a buffer, in place of their bytes one after the other."""

    def __init__(self, buffer: Buffer, slots: npt.NDArray[np.uint32]) -> None:
        self._nr = len(slots)
        view = ffi.from_buffer("uint8_t[]", buffer)
        self.native = (view, len(view) // PAGE_SIZE, ffi.from_buffer("uint32_t[]", slots), self._nr)

    def __len__(self) -> int:
        return self._nr * PAGE_SIZE


class Room:
    """A buffer that things are put into."""

    def __init__(self, buffer: Buffer) -> None:
        self.buffer = buffer
        self.native = ffi.from_buffer("uint8_t[]", buffer)
        self.size = len(self.native)


def put(secret: bytes, data: Buffer | Pages, parts: Sequence[tuple[Room, int, int]]) -> bytes:
    """Copy any bytes to their places, (room, offset, size) one after the other. Returns their digest, as `checksum` does.

    In one call, because after each a thread has to wait for Python's lock. ValueError: it does not fit.
    """
    nr_parts = len(parts)
    table = ffi.new("snap_part[]", nr_parts)
    total = 0
    for number, (room, at, size) in enumerate(parts):
        if at < 0 or size < 0 or at + size > room.size:
            raise ValueError("target too small")
        entry = table[number]
        entry.to, entry.size = room.native + at, size
        total += size
    if total != len(data):
        raise ValueError("the places have another size than the data")
    out = ffi.new("uint8_t[]", KEY_BYTES)
    if isinstance(data, Pages):
        error = lib.snap_put_pages(_context(secret), *data.native, table, nr_parts, out)
    else:
        error = lib.snap_put(
            _context(secret), ffi.from_buffer("uint8_t[]", data), total, table, nr_parts, out
        )
    if error == _OUTSIDE:
        raise ValueError("slot outside the buffer")
    if error:
        raise MemoryError
    return bytes(ffi.buffer(out, KEY_BYTES))


def compact(pages: Buffer, slots: npt.NDArray[np.uint32]) -> None:
    """Move the pages in these ascending slots to the front. ValueError: a slot outside."""
    if lib.snap_compact(*Pages(pages, slots).native):
        raise ValueError("slot outside the buffer")


def resolve(locs: U64, put: U64, finals: Sequence[U64]) -> None:
    """Replace marked locations in place (snap_resolve in pages.c); `finals`: the final locations of each stream.

    ValueError: one is of a page that was never put.
    """
    starts = np.cumsum([0, *map(len, finals)])[:-1].astype("<u8")
    arrays = [ffi.from_buffer("uint64_t[]", array) for array in (locs, put, np.concatenate(finals), starts)]
    if lib.snap_resolve(*(part for array in arrays for part in (array, len(array)))):
        raise ValueError("a location out of bounds")


def address(buffer: Buffer) -> int:
    """Where a buffer is."""
    return int(ffi.cast("uintptr_t", ffi.from_buffer("uint8_t[]", buffer)))


def start_writeback(fd: int, offset: int, size: int) -> None:
    """Ask the kernel to start writing a range; an error here shows again, and counts, in fsync."""
    lib.snap_sync_range(fd, offset, size)


def keep_freed_memory() -> None:
    """Before work with many large buffers: what is freed is used again instead of given back to the kernel. Cheap, idempotent."""
    lib.snap_keep_freed()


class Tables:
    """An array of C key tables over buffers that it keeps alive."""

    def __init__(self, tables: Sequence[tuple[Buffer, Buffer, Buffer, int, int]]) -> None:
        """Each table: keys, locs, fanout (buffers of checked sizes), nr_keys, fanout_bits."""
        self.count = len(tables)
        self.array = ffi.new("snap_table[]", max(self.count, 1))
        self._keep: list[Any] = []
        for entry, (keys, locs, prefixes, nr_keys, bits) in zip(self.array, tables, strict=False):
            views = [
                ffi.from_buffer("uint8_t[]", keys),
                ffi.from_buffer("uint64_t[]", locs),
                ffi.from_buffer("uint32_t[]", prefixes),
            ]
            if (
                len(views[0]) < nr_keys * KEY_BYTES
                or len(views[1]) < nr_keys
                or len(views[2]) < (1 << bits) + 1
            ):
                raise ValueError("key table shorter than its counts")
            entry.keys, entry.locs, entry.fanout = views
            entry.nr_keys, entry.fanout_bits = nr_keys, bits
            self._keep += [keys, locs, prefixes, *views]


class Stager:
    """Zero test, keyed hash, dedup and compaction for the threads of one writer."""

    def __init__(self, secret: bytes, tables: Tables) -> None:
        self._key = _context(secret)
        self._tables = tables
        self._pending = ffi.gc(lib.snap_pending_new(), lib.snap_pending_free)
        if self._pending == ffi.NULL:
            raise MemoryError

    def expect(self, nr_pages: int) -> None:
        """So many pages will come: room for them is made now, where it keeps nobody waiting."""
        lib.snap_pending_expect(self._pending, min(nr_pages, _MOST_EXPECTED))

    def stage(self, pages: memoryview, locs: U64, plain: Kind, random: Kind | None) -> int:
        """See snap_stage in pages.c; what is new is in `plain` and `random`. Returns the number of zero pages."""
        nr_pages = len(locs)
        if len(pages) != nr_pages * PAGE_SIZE or any(
            kind.most < nr_pages for kind in (plain, random) if kind is not None
        ):
            raise ValueError("buffers do not fit the number of pages")
        nr_zero = ffi.new("uint64_t *")
        error = lib.snap_stage(
            self._key,
            ffi.from_buffer("uint8_t[]", pages),
            nr_pages,
            self._tables.array,
            self._tables.count,
            self._pending,
            plain.native,
            ffi.NULL if random is None else random.native,
            ffi.from_buffer("uint64_t[]", locs),
            nr_zero,
        )
        if error < 0:
            raise MemoryError
        return int(nr_zero[0])


class Kind:
    """New pages of one kind that a staging has found: their keys and slots."""

    def __init__(self, first_loc: int, most: int) -> None:
        self.most = most
        self._keys = memoryview(bytearray(most * KEY_BYTES))
        self._slots = np.zeros(most, dtype="<u4")
        self.native = ffi.new("snap_kind *")
        self.native.first_loc = first_loc
        self.native.keys = self._keys_view = ffi.from_buffer("uint8_t[]", self._keys)
        self.native.slots = self._slots_view = ffi.from_buffer("uint32_t[]", self._slots)

    @property
    def nr(self) -> int:
        """Pages found by the last staging."""
        found: int = self.native.nr
        return found

    @property
    def keys(self) -> memoryview:
        """Their keys."""
        return self._keys[: self.native.nr * KEY_BYTES]

    @property
    def slots(self) -> npt.NDArray[np.uint32]:
        """Where they were in what was staged."""
        return self._slots[: self.native.nr]

    def go_on(self) -> None:
        """The next one's location is behind theirs."""
        self.native.first_loc += self.native.nr
