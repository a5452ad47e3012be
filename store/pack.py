"""Packs: append-only files of frames, written once and never changed.

Owns the pack format (FORMAT.md, "Pack"): header, frames, footer (frame table, key table), trailer. A
frame holds pages or one blob (images, page maps). A pack gets its final name only when it is complete and
on disk. Reading checks the footer once per open and every frame's keyed checksum on every read.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import struct
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zstandard

from snapshotter.base import faults
from snapshotter.base.errors import SnapshotterError, StoreError, VerificationError
from snapshotter.base.pages import PAGE_SIZE
from store import native
from store.files import TEMP_SUFFIX, fsync, open_new, pread_exact, store_error, wrapped
from store.keytable import KeyTable, encode_table, table_size
from store.segments import SegmentedFile, SegmentPool

PACK_BYTES = 64 << 20
PACK_SUFFIX = ".pack"
MAX_PACK_ID = (1 << 31) - 1
MAX_FRAMES = 1 << 20
MAX_FRAME_PAGES = 512
MAX_BLOB_BYTES = 256 << 20
VERSION = 1

CODEC_RAW, CODEC_ZSTD, CODEC_ZSTD_BASE, CODEC_ZSTD_PAGES, CODEC_ZSTD_PLANES = 0, 1, 2, 3, 4
_BY_SLOT = frozenset({CODEC_ZSTD_PAGES, CODEC_ZSTD_PLANES})
"""Of these a few pages are had without making all the others."""
KIND_PAGES, KIND_IMAGES, KIND_MAPS = 0, 1, 2

_HEADER = struct.Struct("<8sIIII16s8x")
HEADER_BYTES = _HEADER.size + 16
_TRAILER = struct.Struct("<8sIIQQQII")
TRAILER_BYTES = _TRAILER.size + 16
_FRAME = struct.Struct("<QIIBBHIII16s")
FRAME_BYTES = _FRAME.size
_MAP_ABOVE = 4 << 20  # smaller footers are read: a mapping costs a second descriptor
_MAGIC, _FOOT = b"SNAPPACK", b"SNAPFOOT"

_DAMAGE = frozenset({errno.EIO, errno.ENODATA, errno.EBADMSG, errno.EUCLEAN})
"""What disks and file systems say of bytes that they lost: I/O error, medium error, bad checksum, bad structure."""

FRAME_DTYPE = np.dtype(
    [
        ("offset", "<u8"),
        ("stored", "<u4"),
        ("raw", "<u4"),
        ("codec", "u1"),
        ("kind", "u1"),
        ("nr_pages", "<u2"),
        ("base_pack", "<u4"),
        ("base_frame", "<u4"),
        ("flags", "<u4"),
        ("checksum", "V16"),
    ]
)

FrameRef = tuple[int, int]
"""(pack id, frame number)"""


def location(pack: int, frame: int, slot: int = 0) -> int:
    """Pack << 32 | frame << 12 | slot; 0 is the all-zero page."""
    return pack << 32 | frame << 12 | slot


def pack_name(pack: int) -> str:
    """File name of a pack."""
    return f"{pack:08x}{PACK_SUFFIX}"


@dataclass(frozen=True, slots=True)
class PackKeys:
    """What a store's packs are checked with."""

    store_id: bytes
    frames: bytes
    """Keys frame and footer checksums."""
    pages: bytes
    """Keys page digests."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One row of the frame table."""

    offset: int
    stored: int
    raw: int
    codec: int
    kind: int
    nr_pages: int
    base: FrameRef | None
    checksum: bytes


class DamagedPackError(VerificationError):
    """A pack, or one frame of it, does not hold what was written. `frame` is None when no frame can be trusted."""

    def __init__(self, pack: int, frame: int | None, what: str) -> None:
        where = f"pack {pack:08x}" + ("" if frame is None else f", frame {frame}")
        super().__init__(what, where=where, hint="`snap verify` names every point that it hurts")
        self.pack = pack
        self.frame = frame


class PackWriter:
    """One pack being written. Frames may be put by several threads; `seal` comes after all of them."""

    def __init__(self, directory: Path, pack_id: int, keys: PackKeys, pool: SegmentPool) -> None:
        self.id = pack_id
        self.size = 0
        self.nr_pages = 0
        self.writers = 0  # frames reserved but not put yet; the pack set's lock guards it
        self.closing = False
        self._keys = keys
        self._frames: list[bytes | None] = []
        self._page_keys: list[tuple[int, bytes]] = []
        self._path = directory / pack_name(pack_id)
        self._temp = directory / (pack_name(pack_id) + TEMP_SUFFIX)
        with wrapped("cannot make a pack", self._temp):
            self._fd = open_new(self._temp)
        self._file = SegmentedFile(self._fd, pool)
        try:
            head = _HEADER.pack(_MAGIC, VERSION, 0, pack_id, 0, keys.store_id)
            head += native.checksum(keys.frames, head)
            self._make_room(len(head))
            self._file.copy_in(head, 0, keys.frames)
            self._file.filled(0, len(head))
        except BaseException:
            self.discard()  # nobody else knows of this pack yet
            raise

    @property
    def nr_frames(self) -> int:
        """Frames reserved so far."""
        return len(self._frames)

    @property
    def full(self) -> bool:
        """Time for the next pack."""
        return self.size >= PACK_BYTES or self.nr_frames >= MAX_FRAMES - 1

    def _make_room(self, stored: int) -> None:
        self.size += stored
        self._file.make_room(self.size)

    def reserve(self, stored: int) -> tuple[int, int]:
        """Room for a frame: (frame number, offset). Under the pack set's lock."""
        number, offset = len(self._frames), self.size
        self._frames.append(None)
        self._make_room(stored)
        self.writers += 1
        return number, offset

    def put_frame(
        self, number: int, offset: int, data: bytes | memoryview | native.Pages, *, raw: int, codec: int, kind: int,
        base: FrameRef | None, page_keys: bytes,
    ) -> None:  # fmt: skip
        """Copies a reserved frame to its place; any thread, no lock needed."""
        nr_pages = len(page_keys) // native.KEY_BYTES
        base_pack, base_frame = base or (0, 0)
        check = self._file.copy_in(data, offset, self._keys.frames)
        self._frames[number] = _FRAME.pack(
            offset, len(data), raw, codec, kind, nr_pages, base_pack, base_frame, 0, check
        )
        if nr_pages:
            self._page_keys.append((number, page_keys))

    def filled(self, offset: int, size: int) -> list[int]:
        """A frame was put: which segments are to be written now. Under the pack set's lock."""
        self.writers -= 1
        return self._file.filled(offset, size)

    def write_segment(self, number: int) -> None:
        """Writes a segment that `filled` named; waits for the disk. One thread."""
        with wrapped("cannot write a pack", self._temp):
            self._file.write(number)

    def drop_segment(self, number: int) -> None:
        """A segment was written, or never will be. Under the pack set's lock."""
        self._file.drop(number)

    def drop_rest(self) -> None:
        """Nothing more is written here. Under the pack set's lock."""
        self._file.drop_all()

    def seal(self) -> None:
        """Footer, fsync, rename. The directory's fsync is the caller's, once for all its packs."""
        locs = np.concatenate(
            [np.zeros(0, dtype="<u8")]
            + [
                np.arange(len(keys) // native.KEY_BYTES, dtype="<u8") + np.uint64(location(self.id, number))
                for number, keys in self._page_keys
            ]
        ).astype("<u8", copy=False)
        table, bits = encode_table(bytearray().join(keys for _, keys in self._page_keys), locs)
        self.nr_pages = len(locs)
        if any(frame is None for frame in self._frames):
            raise StoreError("a frame of the pack was never written", where=str(self._temp))
        data_end = self.size
        start = (data_end + 7) & ~7
        frames = b"".join(frame for frame in self._frames if frame is not None)
        table_offset = start + len(frames)
        footer = frames + table
        footer += _TRAILER.pack(_FOOT, len(self._frames), bits, len(locs), start, table_offset, self.id, 0)
        footer += native.checksum(self._keys.frames, footer)
        with wrapped("cannot write a pack", self._temp):
            self._file.finish(data_end, bytes(start - data_end) + footer)
        self.size = start + len(footer)
        faults.point("store.pack_written")
        with wrapped("cannot make a pack durable", self._temp):
            fsync(self._fd)
            faults.point("store.pack_synced")
            os.close(self._fd)
            self._fd = -1
            self._temp.rename(self._path)
        faults.point("store.pack_renamed")

    def discard(self) -> None:
        """Removes the file, whatever state it is in. Never raises."""
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                os.close(self._fd)
            self._fd = -1
        for path in (self._temp, self._path):
            with contextlib.suppress(OSError):
                path.unlink()


class PackFile:
    """A complete pack, open for reading. Any thread."""

    def __init__(self, directory: Path, pack_id: int, keys: PackKeys) -> None:
        self.id = pack_id
        self._keys = keys
        self._path = directory / pack_name(pack_id)
        try:
            self._fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            raise self.bad("the pack is missing") from None
        except OSError as error:
            raise self._unreadable(error) from error
        try:
            self._parse()
        except EOFError:
            raise self.bad("the pack is truncated") from None
        except OSError as error:
            raise self._unreadable(error) from error

    def bad(self, what: str, frame: int | None = None) -> DamagedPackError:
        """The error for damage in this pack."""
        return DamagedPackError(self.id, frame, what)

    def _unreadable(self, error: OSError, frame: int | None = None) -> SnapshotterError:
        """Bytes that the disk does not give back are damage like wrong ones; any other errno is about this machine."""
        if error.errno in _DAMAGE:
            name = errno.errorcode[error.errno]
            return self.bad(f"the disk cannot read it: {os.strerror(error.errno)} ({name})", frame)
        return store_error(error, "cannot read a pack", self._path)

    def _parse(self) -> None:
        self.size = os.fstat(self._fd).st_size
        if self.size < HEADER_BYTES + TRAILER_BYTES:
            raise EOFError
        head = pread_exact(self._fd, HEADER_BYTES, 0)
        magic, version, flags, pack_id, zero, store_id = _HEADER.unpack_from(head)
        if magic != _MAGIC or native.checksum(self._keys.frames, head[:-16]) != head[-16:]:
            raise self.bad("the pack's header is damaged")
        if version != VERSION:
            raise self.bad(f"pack version {version} is not known to this snap")
        if flags or zero:
            raise self.bad(f"pack flags {flags:#x} are not known to this snap")
        if pack_id != self.id or store_id != self._keys.store_id:
            raise self.bad("the pack belongs to another name or store")
        tail = pread_exact(self._fd, TRAILER_BYTES, self.size - TRAILER_BYTES)
        magic, nr_frames, bits, nr_keys, start, table, pack_id, zero = _TRAILER.unpack_from(tail)
        if magic != _FOOT or zero:
            raise self.bad("the pack is truncated or its footer damaged")
        if (
            nr_frames > MAX_FRAMES
            or bits > 20
            or nr_keys > nr_frames * MAX_FRAME_PAGES
            or start < HEADER_BYTES
            or start + nr_frames * FRAME_BYTES != table
            or table + table_size(nr_keys, bits) + TRAILER_BYTES != self.size
        ):
            raise self.bad("the pack's footer does not fit its size")
        if self.size - start <= _MAP_ABOVE:
            self._map = np.frombuffer(pread_exact(self._fd, self.size - start, start), dtype=np.uint8)
        else:
            page = start & ~(mmap.ALLOCATIONGRANULARITY - 1)
            mapped = mmap.mmap(self._fd, self.size - page, prot=mmap.PROT_READ, offset=page)
            self._map = np.frombuffer(mapped, dtype=np.uint8)[start - page :]
        if native.checksum(self._keys.frames, self._map[:-16]) != self._map[-16:].tobytes():
            raise self.bad("the pack's footer is damaged")
        size = nr_frames * FRAME_BYTES
        self.frames: np.ndarray[Any, Any] = self._map[:size].view(FRAME_DTYPE)
        self.table = KeyTable.parse(self._map[size:-TRAILER_BYTES], nr_keys, bits)
        self._data_end = start

    def frame(self, number: int) -> Frame:
        """A row of the frame table, with its bounds checked."""
        if not 0 <= number < len(self.frames):
            raise self.bad("there is no such frame", number)
        row = _FRAME.unpack_from(self._map.data, number * FRAME_BYTES)
        offset, stored, raw, codec, kind, nr_pages, base_pack, base_frame, flags, check = row
        if flags:
            raise self.bad(f"frame flags {flags:#x} are not known to this snap", number)
        if kind == KIND_PAGES:
            fits = raw == nr_pages * PAGE_SIZE and 0 < nr_pages <= MAX_FRAME_PAGES
        else:
            fits = raw <= MAX_BLOB_BYTES and nr_pages == 0 and kind in {KIND_IMAGES, KIND_MAPS}
        if not fits or codec > CODEC_ZSTD_PLANES or offset < HEADER_BYTES or offset + stored > self._data_end:
            raise self.bad("the frame table is out of bounds", number)
        base = (base_pack, base_frame) if base_pack else None
        return Frame(offset, stored, raw, codec, kind, nr_pages, base, check)

    def is_cached(self, number: int) -> bool:
        """Whether a frame's last byte can be read without waiting for the disk, as far as the kernel can tell (RWF_NOWAIT).

        The first ones come with the pack's header.
        """
        frame = self.frame(number)
        try:
            return bool(os.preadv(self._fd, [bytearray(1)], frame.offset + frame.stored - 1, os.RWF_NOWAIT))
        except OSError:
            return False

    def read_stored(self, number: int) -> tuple[Frame, bytes]:
        """A frame as it lies on disk, its checksum checked."""
        frame = self.frame(number)
        try:
            data = pread_exact(self._fd, frame.stored, frame.offset)
        except EOFError:
            raise self.bad("the pack is truncated", number) from None
        except OSError as error:
            raise self._unreadable(error, number) from error
        if native.checksum(self._keys.frames, data) != frame.checksum:
            raise self.bad("the frame's checksum does not match its bytes", number)
        return frame, data

    def read(self, number: int, kind: int, dictionary: bytes | None = None) -> bytes | bytearray:
        """A frame's content, checked and decompressed; `dictionary` is the base's content if it has one."""
        frame, data = self.read_stored(number)
        if frame.kind != kind:
            raise self.bad(f"a frame of kind {frame.kind} where one of kind {kind} is needed", number)
        if frame.codec == CODEC_RAW:
            if len(data) != frame.raw:
                raise self.bad("a raw frame of another size than it says", number)
            return data
        if frame.codec in _BY_SLOT:
            return self._slots(number, frame, data, np.arange(frame.nr_pages, dtype=np.uint32))
        return self._decompress(number, frame, data, dictionary)

    def read_pages(
        self, number: int, slots: np.ndarray[Any, Any]
    ) -> tuple[bytes | bytearray, np.ndarray[Any, Any]]:
        """What is needed for these slots of a frame of pages, checked and decompressed: (pages, where each is in them).

        Raises:
            VerificationError: damage, or there is no such slot.
        """
        frame = self.frame(number)
        if frame.kind == KIND_PAGES and int(slots.max()) >= frame.nr_pages:
            raise self.bad("a page map names a page that the frame does not have", number)
        if frame.codec not in _BY_SLOT:
            return self.read(number, KIND_PAGES), slots
        frame, data = self.read_stored(number)
        return self._slots(number, frame, data, slots), np.arange(len(slots), dtype=np.uint32)

    def _slots(
        self, number: int, frame: Frame, data: bytes, slots: np.ndarray[Any, Any]
    ) -> bytes | bytearray:
        """These slots, one after the other, of a frame that can be asked for them."""
        if frame.kind != KIND_PAGES:
            raise self.bad("a blob that is coded as pages are", number)
        if frame.codec == CODEC_ZSTD_PAGES:
            return self._pages_apart(number, frame, data, slots)
        # Byte planes (FORMAT.md, "Frame of codec 4").
        planes = self._decompress(number, frame, data)
        return native.from_planes(planes, np.ascontiguousarray(slots, dtype=np.uint32))

    def _decompress(self, number: int, frame: Frame, data: bytes, dictionary: bytes | None = None) -> bytes:
        try:
            if zstandard.frame_content_size(data) != frame.raw:
                raise self.bad("the compressed frame has another size than the table says", number)
            return self._decompressor(dictionary).decompress(data)
        except zstandard.ZstdError as error:
            raise self.bad(f"the frame cannot be decompressed ({error})", number) from error

    def _pages_apart(self, number: int, frame: Frame, data: bytes, slots: np.ndarray[Any, Any]) -> bytes:
        """These slots out of a frame whose pages are compressed one by one (FORMAT.md, "Frame of codec 3")."""
        head = 2 * frame.nr_pages
        if len(data) < head:
            raise self.bad("a frame of single pages that is none", number)
        sizes = np.frombuffer(data, dtype="<u2", count=frame.nr_pages).astype(np.uint64)
        ends = np.cumsum(sizes) + np.uint64(head)
        if int(ends[-1]) != len(data) or int(sizes.max()) > PAGE_SIZE:
            raise self.bad("the sizes of a frame's pages do not add up", number)
        table = np.stack((ends - sizes, sizes), axis=1)[slots]
        packed = table[table[:, 1] < PAGE_SIZE]
        try:
            unpacked: list[Any] = []
            if len(packed):
                found = self._decompressor(None).multi_decompress_to_buffer(
                    zstandard.BufferWithSegments(data, packed.tobytes()),
                    decompressed_sizes=np.full(len(packed), PAGE_SIZE, dtype=np.uint64).tobytes(),
                    threads=1,
                )
                unpacked = [found[i] for i in range(len(packed))]
            if len(packed) < len(table):
                rest = iter(unpacked)
                unpacked = [
                    next(rest) if size < PAGE_SIZE else data[start : start + size]
                    for start, size in table.tolist()
                ]
            return b"".join(unpacked)
        except zstandard.ZstdError as error:
            raise self.bad(f"a page cannot be decompressed ({error})", number) from error

    def _decompressor(self, dictionary: bytes | None) -> zstandard.ZstdDecompressor:
        if dictionary is not None:
            base = zstandard.ZstdCompressionDict(dictionary, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
            return zstandard.ZstdDecompressor(dict_data=base)
        found: zstandard.ZstdDecompressor | None = getattr(_THREAD, "decompressor", None)
        if found is None:
            found = _THREAD.decompressor = zstandard.ZstdDecompressor()
        return found

    def page_keys(self) -> dict[int, bytes]:
        """Frame number -> keys of its pages in slot order, out of the key table."""
        locs = self.table.locations()
        order = np.argsort(locs, kind="stable")
        keys = self.table.key_bytes()[order]
        frames = (locs[order] & np.uint64(0xFFFFFFFF)) >> np.uint64(12)
        numbers, starts = np.unique(frames, return_index=True)
        parts = np.split(keys, starts[1:]) if len(numbers) else []
        return {int(number): part.tobytes() for number, part in zip(numbers, parts, strict=True)}

    def close(self) -> None:
        """The mapping goes when nothing uses it any more."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError, OSError):
            self.close()


_THREAD = threading.local()
