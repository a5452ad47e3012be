"""What shows a file to be the one that it was: not its inode number alone, which ext4 gives to the next file at once.

Owns what a FileIdentity says of that, recorded at the dump and compared at the restore: the file handle, which has the generation of the
inode (name_to_handle_at(2)), and the birth time (statx(2)), as far as the file system knows them; owner, group, mode and access
list; and the `way`, a digest of the owners and modes of all directories above it.

The first two are asked of the open file in the frozen window, unless the look has asked already and the file has
not changed since (its ctime). The way is worked out after the thaw, and only where the path still leads to that file.
"""

from __future__ import annotations

import contextlib
import ctypes
import enum
import hashlib
import os
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from google.protobuf.message import Message

from checkpoint.kernel import descriptors, distant
from checkpoint.kernel.fdinfo import O_PATH
from checkpoint.kernel.sys import syscall
from images import common_pb2, files_pb2, mm_pb2, task_pb2

_AT_FDCWD = -100
_STATX_BTIME, _STATX_BYTES = 0x800, 256
_MARK = "trusted.snap.origin"
_ACL = "system.posix_acl_access"
_DIGEST_BYTES = 12
_FUSE = 0x65735546
_KNOWN_MAX = 1 << 16


@dataclass(frozen=True, slots=True)
class Traits:
    """What a stat(2) lacks."""

    handle_type: int
    handle: bytes
    birth_ns: int
    """0: the file system does not know."""
    acl: bytes
    """Digest of its access list; empty without one."""


_known: dict[tuple[int, int, int], Traits] = {}
"""(dev, ino, ctime in ns) -> traits: asked at the look, so that the frozen window need not. Any change of rights changes the ctime."""


def traits(path: str | bytes, stat: os.stat_result) -> Traits:
    """What is known of the file that `path` opens (a link of /proc/PID/fd will do), whose stat is given."""
    key = (stat.st_dev, stat.st_ino, stat.st_ctime_ns)
    found = _known.get(key)
    if found is None:
        if len(_known) > _KNOWN_MAX:
            _known.clear()
        found = _known[key] = _read(os.fsencode(path))
    return found


def prepare(path: str, stat: os.stat_result) -> None:
    """At the look, while the job runs: ask beforehand, unless the link leads elsewhere by now."""
    key = (stat.st_dev, stat.st_ino, stat.st_ctime_ns)
    if key in _known:
        return
    with contextlib.suppress(OSError):
        found, now = _read(os.fsencode(path)), distant.stat(path, os.fsencode(os.readlink(path)))
        if (now.st_dev, now.st_ino, now.st_ctime_ns) == key and len(_known) < _KNOWN_MAX:
            _known[key] = found


def _read(path: bytes) -> Traits:
    link = os.readlink(path) if path.startswith(b"/proc/") else path
    if distant.is_distant(link):
        return Traits(0, b"", 0, b"")  # nothing is proven; a server may answer late, or never
    try:
        handle_type, handle = descriptors.file_handle(path)
    except OSError:  # not every file system has them
        handle_type, handle = 0, b""
    return Traits(handle_type, handle, _birth_ns(path), _acl(path))


def _birth_ns(path: bytes) -> int:
    buffer = ctypes.create_string_buffer(_STATX_BYTES)
    try:
        syscall("statx", _AT_FDCWD, ctypes.create_string_buffer(path), 0, _STATX_BTIME, buffer)
    except OSError:
        return 0
    (mask,) = struct.unpack_from("=I", buffer.raw)
    seconds, nanoseconds = struct.unpack_from("=qI", buffer.raw, 80)
    return seconds * 10**9 + nanoseconds if mask & _STATX_BTIME else 0


def _acl(path: bytes) -> bytes:
    try:
        return hashlib.sha256(os.getxattr(path, _ACL)).digest()[:_DIGEST_BYTES]
    except OSError:
        return b""


def record(identity: common_pb2.FileIdentity, stat: os.stat_result, open_path: str | bytes) -> None:
    """Note everything but the way. `open_path` opens the file that `stat` is of."""
    found = traits(open_path, stat)
    identity.uid, identity.gid = stat.st_uid, stat.st_gid
    identity.handle_type, identity.handle = found.handle_type, found.handle
    identity.birth_ns, identity.acl = found.birth_ns, found.acl


# -- marks ------------------------------------------------------------------------------------------------------


def origin(path: str | bytes, stat: os.stat_result) -> bytes:
    """The file that it was first, however often rollbacks have made it again."""
    try:
        return os.getxattr(path, _MARK)
    except OSError:
        with open("/proc/sys/kernel/random/boot_id", "rb") as file:
            return b"%s:%x:%x" % (file.read().strip(), stat.st_dev, stat.st_ino)


def is_marked(fd: int, wanted: bytes) -> bool:
    """Whether a rollback has made a file for the one of this origin. Only root can set that mark."""
    try:
        return os.getxattr(f"/proc/self/fd/{fd}", _MARK) == wanted != b""
    except OSError:
        return False


def mark(fd: int, wanted: bytes) -> None:
    """Note what a file was made for. Without CAP_SYS_ADMIN, or on some file systems, the next rollback will ask."""
    with contextlib.suppress(OSError):
        os.setxattr(f"/proc/self/fd/{fd}", _MARK, wanted)


# -- the way ----------------------------------------------------------------------------------------------------


def record_ways(messages: Iterable[Message]) -> None:
    """Note the ways of all files in a dump's images. The job runs again."""
    ways: dict[bytes, bytes] = {}
    for identity in _identities(messages):
        if not identity.path.startswith(b"/"):
            continue
        if not identity.deleted and not _leads(identity):
            continue
        folder = os.path.dirname(identity.path)
        if folder not in ways:
            ways[folder] = way(folder)
        identity.way = ways[folder]


def way(folder: bytes) -> bytes:
    """Digest of owners, modes and access lists of a directory and of all above it; empty if one of them is none."""
    parts = hashlib.sha256()
    at = b""
    for name in folder.split(b"/"):
        at = b"/" if at in {b"", b"/"} and not name else os.path.join(at, name)
        try:
            fd = descriptors.open_without_symlinks(at, O_PATH | os.O_NOFOLLOW | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            return b""
        try:
            stat = os.fstat(fd)
            parts.update(struct.pack("=IIII", stat.st_uid, stat.st_gid, stat.st_mode, len(name)))
            parts.update(_acl(b"/proc/self/fd/%d" % fd))
        finally:
            os.close(fd)
    return parts.digest()[:_DIGEST_BYTES]


def _leads(identity: common_pb2.FileIdentity) -> bool:
    try:
        now = os.lstat(identity.path)
    except OSError:
        return False
    return (now.st_dev, now.st_ino) == (identity.dev, identity.ino)


def _identities(messages: Iterable[Message]) -> Iterator[common_pb2.FileIdentity]:
    for message in messages:
        if isinstance(message, task_pb2.Process):
            yield from (message.cwd, message.root)
            for thread in message.threads:
                if thread.HasField("fs"):
                    yield from (thread.fs.cwd, thread.fs.root)
        elif isinstance(message, mm_pb2.Mm):
            yield from message.files
            yield message.exe
        elif isinstance(message, mm_pb2.Shmem) and message.HasField("file"):
            yield message.file
        elif isinstance(message, files_pb2.Files):
            for pipe in message.pipes:
                if pipe.is_fifo:
                    yield pipe.fifo
            for description in message.descriptions:
                yield from _of_description(description)


def _of_description(description: files_pb2.Description) -> Iterator[common_pb2.FileIdentity]:
    field = description.WhichOneof("kind")
    if field in {"regular", "directory", "device", "terminal", "path_only"}:
        yield getattr(description, field).identity
    elif field == "inotify":
        yield from (watch.file for watch in description.inotify.watches)
    elif field == "unix" and description.unix.HasField("bound"):
        yield description.unix.bound


# -- at a restore -----------------------------------------------------------------------------------------------


class Sameness(enum.Enum):
    """What can be said of a file that has the inode number of another."""

    SAME = "same"
    """Proven: the handle with its generation, or the birth time, is what it was."""
    OTHER = "other"
    UNKNOWN = "unknown"
    """The file system has neither."""


def compare(wanted: common_pb2.FileIdentity, fd: int) -> Sameness:
    """Whether an open file (O_PATH will do) is the one that was recorded."""
    stat = os.fstat(fd)
    if (stat.st_dev, stat.st_ino) != (wanted.dev, wanted.ino):
        return Sameness.OTHER
    place = b"/proc/self/fd/%d" % fd
    now = _read(place)
    births = wanted.birth_ns and now.birth_ns
    if births and now.birth_ns != wanted.birth_ns:
        return Sameness.OTHER
    if wanted.handle and now.handle:
        if (now.handle_type, now.handle) == (wanted.handle_type, wanted.handle):
            return Sameness.SAME
        # A FUSE server may forget a file and number it anew.
        return Sameness.UNKNOWN if descriptors.filesystem_type(place) == _FUSE else Sameness.OTHER
    return Sameness.SAME if births else Sameness.UNKNOWN


def changed_rights(wanted: common_pb2.FileIdentity, fd: int, *, along_path: bool = True) -> str:
    """What decides about access and is not as it was at the point, as a clause; "" if everything is."""
    now = os.fstat(fd)
    if (now.st_uid, now.st_gid) != (wanted.uid, wanted.gid):
        return f"belongs to user {now.st_uid}, group {now.st_gid} now, at the point to user {wanted.uid}, group {wanted.gid}"
    if now.st_mode != wanted.mode:
        return f"has mode {now.st_mode & 0o7777:04o} now, at the point {wanted.mode & 0o7777:04o}"
    if _acl(b"/proc/self/fd/%d" % fd) != wanted.acl:
        return "has another access list now than at the point"
    if along_path and (not wanted.way or way(os.path.dirname(wanted.path)) != wanted.way):
        return "is below directories whose owner or mode changed since the point"
    return ""
