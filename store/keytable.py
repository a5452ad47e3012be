"""Key tables: which page is where. In the footer of every pack, and merged in index files.

Owns their encoding, parsing and merging (FORMAT.md, "Key table" and "Index file"). A table is
only an accelerator: every index file can be made again from the packs' footers, and one that does not
check is ignored. A wrong answer would put somebody else's page into a job, so nothing is used unchecked.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import secrets
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from store import native
from store.files import TEMP_SUFFIX, fsync, fsync_dir, open_new, pwrite_all

if TYPE_CHECKING:
    import numpy.typing as npt

    from store.pagemap import U64

KEY_BYTES = native.KEY_BYTES
MAX_FANOUT_BITS = 20
MAX_KEYS = 1 << 31

INDEX_MAGIC = b"SNAPKIDX"
INDEX_VERSION = 1
_INDEX_HEADER = struct.Struct("<8sIIIIQ")
INDEX_SUFFIX = ".idx"
MERGE_AT = 8
"""Packs without an index file that make a merge worth its while."""


class BadTableError(Exception):
    """Bytes that are no key table; the message says why."""


def _align8(size: int) -> int:
    return (size + 7) & ~7


def fanout_bits(nr_keys: int) -> int:
    """About 16 keys for each prefix; none for a handful of keys."""
    return min(max(nr_keys.bit_length() - 5, 0), MAX_FANOUT_BITS)


def table_size(nr_keys: int, bits: int) -> int:
    """Encoded bytes of a table."""
    return _align8(4 * ((1 << bits) + 1)) + nr_keys * (KEY_BYTES + 8)


def encode_table(keys: bytearray, locs: U64) -> tuple[bytes, int]:
    """Sorts (in place) and encodes. Returns the bytes and the fanout's bits."""
    native.sort_table(keys, locs)
    bits = fanout_bits(len(locs))
    fanout = native.fanout(keys, len(locs), bits)
    padding = bytes(_align8(len(fanout)) - len(fanout))
    return b"".join((fanout, padding, keys, locs.astype("<u8", copy=False).tobytes())), bits


@dataclass(frozen=True, slots=True)
class KeyTable:
    """A parsed table: three views of one buffer.

    Arrays, not memoryviews: CPython before 3.13 crashes when its cycle collector meets a memoryview in garbage
    (gh-77894), and tracebacks of failed takes are such garbage.
    """

    keys: npt.NDArray[np.uint8]
    locs: npt.NDArray[np.uint8]
    fanout: npt.NDArray[np.uint8]
    nr_keys: int
    bits: int

    @classmethod
    def parse(cls, data: npt.NDArray[np.uint8], nr_keys: int, bits: int) -> KeyTable:
        """The table at the start of `data`, whose checksum the caller has checked."""
        if nr_keys > MAX_KEYS or bits > MAX_FANOUT_BITS or table_size(nr_keys, bits) > len(data):
            raise BadTableError(f"a table of {nr_keys} keys does not fit in {len(data)} bytes")
        start = _align8(4 * ((1 << bits) + 1))
        middle = start + nr_keys * KEY_BYTES
        return cls(data[start:middle], data[middle : middle + nr_keys * 8], data[:start], nr_keys, bits)

    def native(self) -> tuple[Any, Any, Any, int, int]:
        """As native.Tables wants it."""
        return self.keys, self.locs, self.fanout, self.nr_keys, self.bits

    def locations(self) -> U64:
        """Locations in the order of the keys."""
        return self.locs.view("<u8")

    def key_bytes(self) -> npt.NDArray[np.uint8]:
        """Keys as rows of 16 bytes."""
        return self.keys.reshape(-1, KEY_BYTES)


@dataclass(frozen=True, slots=True)
class IndexFile:
    """One merged index: the packs that it covers, and their table."""

    name: str
    packs: frozenset[int]
    table: KeyTable

    @classmethod
    def open(cls, path: Path, store_key: bytes) -> IndexFile:
        """Maps, checks and parses. BadTableError or OSError: ignore this file."""
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            size = os.fstat(fd).st_size
            if size < _INDEX_HEADER.size + KEY_BYTES:
                raise BadTableError("shorter than an index file's header")
            data = np.frombuffer(mmap.mmap(fd, size, prot=mmap.PROT_READ), dtype=np.uint8)
        finally:
            os.close(fd)
        magic, version, nr_packs, bits, zero, nr_keys = _INDEX_HEADER.unpack_from(data.data)
        if magic != INDEX_MAGIC or version != INDEX_VERSION or zero:
            raise BadTableError("no index file of a known version")
        start = _align8(_INDEX_HEADER.size + 4 * nr_packs)
        if (
            bits > MAX_FANOUT_BITS
            or nr_keys > MAX_KEYS
            or start + table_size(nr_keys, bits) + KEY_BYTES != size
        ):
            raise BadTableError("counts do not agree with the file's size")
        if native.checksum(store_key, data[:-KEY_BYTES]) != data[-KEY_BYTES:].tobytes():
            raise BadTableError("checksum does not match")
        packs = struct.unpack_from(f"<{nr_packs}I", data.data, _INDEX_HEADER.size)
        return cls(path.name, frozenset(packs), KeyTable.parse(data[start:-KEY_BYTES], nr_keys, bits))


def encode_index(packs: Iterable[int], keys: bytearray, locs: U64, store_key: bytes) -> bytes:
    """A whole index file."""
    table, bits = encode_table(keys, locs)
    ids = sorted(packs)
    head = _INDEX_HEADER.pack(INDEX_MAGIC, INDEX_VERSION, len(ids), bits, 0, len(locs))
    head += struct.pack(f"<{len(ids)}I", *ids)
    body = head + bytes(_align8(len(head)) - len(head)) + table
    return body + native.checksum(store_key, body)


def merge(tables: Sequence[KeyTable]) -> tuple[bytearray, U64]:
    """Keys and locations of several tables together, each key once (which copy it names does not matter)."""
    keys = bytearray().join(table.keys.data for table in tables)
    locs = np.concatenate([np.zeros(0, dtype="<u8"), *(table.locations() for table in tables)]).astype("<u8")
    native.sort_table(keys, locs)
    if len(locs) < 2:
        return keys, locs
    rows = np.frombuffer(keys, dtype="<u8").reshape(-1, 2)
    first = np.concatenate(([True], (rows[1:] != rows[:-1]).any(axis=1)))
    if first.all():
        return keys, locs
    return bytearray(rows[first].tobytes()), locs[first]


class IndexDir:
    """The directory of index files of one store."""

    def __init__(self, path: Path, store_key: bytes) -> None:
        self._path = path
        self._key = store_key

    def load(self, packs: frozenset[int]) -> list[IndexFile]:
        """The files that check and cover only packs of the catalog, largest first."""
        found = []
        with contextlib.suppress(FileNotFoundError):
            for name in sorted(os.listdir(self._path)):
                if not name.endswith(INDEX_SUFFIX):
                    continue
                with contextlib.suppress(BadTableError, OSError):
                    index = IndexFile.open(self._path / name, self._key)
                    if index.packs <= packs:
                        found.append(index)
        return sorted(found, key=lambda index: -index.table.nr_keys)

    def write(self, packs: Iterable[int], tables: Sequence[KeyTable]) -> str:
        """Publishes one file for `tables`. Its packs must be on disk and in the catalog. Raises OSError."""
        keys, locs = merge(tables)
        data = encode_index(packs, keys, locs, self._key)
        name = secrets.token_hex(8)
        temp = self._path / (name + TEMP_SUFFIX)
        fd = open_new(temp)
        try:
            try:
                pwrite_all(fd, data, 0)
                fsync(fd)
            finally:
                os.close(fd)
            temp.rename(self._path / (name + INDEX_SUFFIX))
        except BaseException:
            with contextlib.suppress(OSError):
                temp.unlink()
            raise
        fsync_dir(self._path)
        return name + INDEX_SUFFIX

    def remove(self, names: Iterable[str]) -> None:
        """Files that another one has replaced."""
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                (self._path / name).unlink()

    def names(self) -> list[str]:
        """Every index file, good or bad."""
        with contextlib.suppress(FileNotFoundError):
            return [name for name in sorted(os.listdir(self._path)) if name.endswith(INDEX_SUFFIX)]
        return []


def tier(indexes: Sequence[IndexFile], nr_fresh_keys: int) -> list[IndexFile]:
    """The index files to merge with that many fresh keys: the small ones, until the next is twice the sum."""
    chosen, total = [], nr_fresh_keys
    for index in sorted(indexes, key=lambda item: item.table.nr_keys):
        if index.table.nr_keys > 2 * total:
            break
        chosen.append(index)
        total += index.table.nr_keys
    return chosen
