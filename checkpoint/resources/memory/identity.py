"""Files that are mapped, not stored: what they looked like, and whether they still do.

Owns FileIdentity: made at the dump from a stat of the open file (never from the device numbers in maps, which
differ from stat's on overlay and btrfs roots), compared at the restore with an open descriptor, never with a path
that may lead elsewhere a moment later. Build ids are read once per
(device, inode, mtime, size) and kept for the life of this process, so that looking warms them for the freeze.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat as stat_module
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from checkpoint.kernel import distant
from checkpoint.resources import authority, paths, proof
from images import common_pb2
from snapshotter.base.errors import RestoreConflictError, SnapshotterError

if TYPE_CHECKING:
    from checkpoint.resources.authority import Found
    from checkpoint.restore_context import RestoreContext

_PT_NOTE = 4
_NT_GNU_BUILD_ID = 3
_MAX_HEADERS = 256
_MAX_NOTE_BYTES = 65536

Reader = Callable[[int, int], bytes]
"""(offset, size) -> bytes, fewer at the end."""

_build_ids: dict[tuple[int, int, int, int], bytes] = {}


def build_id(path: str | bytes, stat: os.stat_result, link: bytes = b"") -> bytes:
    """The NT_GNU_BUILD_ID of the ELF file that `path` opens, b"" when it has none or is no ELF file. `link`: what `path` reads,
    if it is one of the links of /proc.
    """
    key = (stat.st_dev, stat.st_ino, stat.st_mtime_ns, stat.st_size)
    if key not in _build_ids:
        _build_ids[key] = _read_build_id(path, link)
    return _build_ids[key]


def _read_build_id(path: str | bytes, link: bytes) -> bytes:
    try:
        with distant.opened(path, link, flags=os.O_RDONLY | os.O_NONBLOCK) as read:
            return elf_build_id(read)
    except OSError:
        return b""


def elf_build_id(read: Reader, *, in_memory: bool = False) -> bytes:
    """Find the build id of a 64-bit little-endian ELF image.

    Args:
        read: (offset, size) -> bytes, possibly fewer.
        in_memory: offsets are addresses relative to the image's first byte (a mapped vdso), not file offsets.
    """
    head = read(0, 64)
    if len(head) < 64 or head[:6] != b"\x7fELF\x02\x01":
        return b""
    (header_offset,) = struct.unpack_from("<Q", head, 32)
    entry_size, nr_headers = struct.unpack_from("<HH", head, 54)
    if entry_size < 56 or nr_headers > _MAX_HEADERS:
        return b""
    table = read(header_offset, entry_size * nr_headers)
    for at in range(0, len(table) - 55, entry_size):
        kind, _, offset, vaddr, _, size = struct.unpack_from("<IIQQQQ", table, at)
        if kind == _PT_NOTE and size <= _MAX_NOTE_BYTES:
            found = _find_note(read(vaddr if in_memory else offset, size))
            if found:
                return found
    return b""


def _find_note(notes: bytes) -> bytes:
    at = 0
    while at + 12 <= len(notes):
        name_size, size, kind = struct.unpack_from("<III", notes, at)
        content = at + 12 + (name_size + 3 & ~3)
        if kind == _NT_GNU_BUILD_ID and notes[at + 12 : at + 16] == b"GNU\0":
            return notes[content : content + size]
        at = content + (size + 3 & ~3)
    return b""


def make(path: bytes, stat: os.stat_result, *, open_path: str | bytes = b"") -> common_pb2.FileIdentity:
    """The identity of an open file.

    Args:
        path: where it can be found again, without " (deleted)".
        stat: of the open file itself.
        open_path: what to open for its build id (map_files or fd link); `path` when empty.
    """
    identity = common_pb2.FileIdentity(
        path=path,
        dev=stat.st_dev,
        ino=stat.st_ino,
        mode=stat.st_mode,
        size_bytes=stat.st_size,
        mtime_ns=stat.st_mtime_ns,
        build_id=build_id(open_path or path, stat, path),
        deleted=stat.st_nlink == 0,
    )
    proof.record(identity, stat, open_path or path)
    return identity


def leads_to(path: bytes, stat: os.stat_result) -> bool:
    """Whether `path` still names the file that `stat` is of."""
    try:
        found = distant.stat(path)
    except OSError:
        return False
    return (found.st_dev, found.st_ino) == (stat.st_dev, stat.st_ino)


@dataclass(frozen=True, slots=True)
class Difference:
    """How a file differs from what the image needs; empty `text`: not at all."""

    text: str
    size_bytes: int = 0


def compare(wanted: common_pb2.FileIdentity, path_fd: int) -> Difference:
    """Whether an open file (O_PATH will do) is the one that the image names.

    The same inode with the same size and mtime is the same file; so is one with the same build id and size
    (a package installed again, a copied root). Device numbers may change with a reboot: inode, size and mtime
    decide then.
    """
    found = os.fstat(path_fd)
    unchanged = found.st_size == wanted.size_bytes and found.st_mtime_ns == wanted.mtime_ns
    if unchanged and found.st_ino == wanted.ino:
        return Difference("", size_bytes=found.st_size)
    if wanted.build_id and found.st_size == wanted.size_bytes:
        now = build_id(f"/proc/self/fd/{path_fd}", found)
        if now == wanted.build_id:
            return Difference("", size_bytes=found.st_size)
        return Difference(f"is another build: build id {now.hex() or 'none'}, not {wanted.build_id.hex()}")
    if found.st_size != wanted.size_bytes:
        text = f"has {found.st_size} bytes, not {wanted.size_bytes}"
    elif found.st_mtime_ns != wanted.mtime_ns:
        text = "was written to since the point (its modification time differs)"
    else:
        text = f"is another file: inode {found.st_ino}, not {wanted.ino}"
    return Difference(text, size_bytes=found.st_size)


def open_same(wanted: common_pb2.FileIdentity, use: str) -> int:
    """An O_PATH descriptor of the file that the image needs.

    Raises:
        RestoreConflictError: names the file and what changed.
    """
    where = paths.shown(wanted.path)
    hint = "put the file back as it was when the point was taken"
    try:
        fd = paths.find(wanted.path)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise paths.through_a_link(wanted.path) from error
        text = os.strerror(error.errno or 0)
        raise RestoreConflictError(f"{use} cannot be found: {text}", where=where, hint=hint) from error
    try:
        if not stat_module.S_ISREG(os.fstat(fd).st_mode):
            raise RestoreConflictError(f"{use} is no regular file any more", where=where, hint=hint)
        difference = compare(wanted, fd)
        if difference.text:
            raise RestoreConflictError(f"{use} {difference.text}", where=where, hint=hint)
    except BaseException:
        os.close(fd)
        raise
    return fd


def reopen_mapped(
    ctx: RestoreContext, wanted: common_pb2.FileIdentity, found: Found, *, writable: bool
) -> int:
    """Open what was found, to be mapped.

    Raises:
        RestoreConflictError: it cannot be opened.
    """
    where = paths.shown(wanted.path)
    try:
        return authority.open_found(ctx, found, os.O_RDWR if writable else os.O_RDONLY, where)
    except SnapshotterError as error:
        raise RestoreConflictError(
            f"cannot be opened to be mapped: {error.what}",
            where=where,
            hint="put the file back as it was when the point was taken",
        ) from error


def safe_close(fd: int) -> None:
    """Close what is open, ignore what is not."""
    if fd >= 0:
        with contextlib.suppress(OSError):
            os.close(fd)
