"""Every write of the store to its directory: modes, temp + fsync + rename, errors with a hint.

Owns the file system's side of the store's promises: directories are 0700 and files 0600 whatever the umask
is; a file under its final name is complete and on disk; an errno becomes one of our errors here and nowhere
else. `pwrite_all` and `fsync` are the two calls that tests make fail.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path

from snapshotter.base import trust
from snapshotter.base.errors import NoStoreError, PermissionDeniedError, SnapshotterError, StoreError

TEMP_SUFFIX = ".tmp"

_HINTS = {
    errno.ENOSPC: "free some space, or run `snap forget` and `snap prune`; the points that exist are whole",
    errno.EDQUOT: "the quota is used up: raise it, or run `snap forget` and `snap prune`",
    errno.EFBIG: "a limit of the size of files: raise it (ulimit -f unlimited), or use a file system without it",
    errno.EROFS: "the file system is read-only: remount it, or use another --store",
    errno.EIO: "the disk failed: look at `dmesg`, then run `snap verify`",
    errno.EACCES: "use a store of your own with --store, or run as the store's owner",
    errno.EPERM: "use a store of your own with --store, or run as the store's owner",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
}


_WAY_HINT = "use a directory that only you and root can write; if you trust the owner like yourself: --store-owner USER"


class NoSpaceError(StoreError):
    """The disk or the quota is full."""


def store_error(error: OSError, what: str, where: str | Path) -> SnapshotterError:
    """The error to raise for an errno met in the store; use with `from error`."""
    code = error.errno or 0
    text = f"{what}: {os.strerror(code)} ({errno.errorcode.get(code, '?')})"
    kind: type[SnapshotterError] = StoreError
    if code in {errno.EACCES, errno.EPERM}:
        kind = PermissionDeniedError
    elif code in {errno.ENOSPC, errno.EDQUOT}:
        kind = NoSpaceError
    return kind(text, where=str(where), hint=_HINTS.get(code, ""))


@contextlib.contextmanager
def wrapped(what: str, where: str | Path) -> Iterator[None]:
    """Turns an OSError inside into a StoreError or PermissionDeniedError."""
    try:
        yield
    except OSError as error:
        raise store_error(error, what, where) from error


def pwrite_all(fd: int, data: bytes | memoryview, offset: int) -> None:
    """Write until everything is written; ENOSPC and friends raise as OSError."""
    view = memoryview(data).cast("B")
    while view.nbytes:
        count = os.pwrite(fd, view, offset)
        view = view[count:]
        offset += count


def fsync(fd: int) -> None:
    """Flush a file; an error is final: the kernel drops the dirty pages, so the file must be thrown away."""
    os.fsync(fd)


def pread_exact(fd: int, size: int, offset: int) -> bytes:
    """Exactly `size` bytes; fewer raise EOFError (a truncated file)."""
    data = os.pread(fd, size, offset)
    while len(data) < size:
        more = os.pread(fd, size - len(data), offset + len(data))
        if not more:
            raise EOFError
        data += more
    return data


def open_new(path: Path) -> int:
    """A new file, 0600 whatever the umask, refused when it exists or is a symbolic link."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        os.fchmod(fd, 0o600)
        give(fd, path.parent)
    except BaseException:
        os.close(fd)
        with contextlib.suppress(OSError):
            path.unlink()
        raise
    return fd


def fsync_dir(path: Path) -> None:
    """Makes names in a directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fsync(fd)
    finally:
        os.close(fd)


def publish(directory: Path, name: str, data: bytes) -> None:
    """A whole small file: temp, write, fsync, rename, fsync of the directory. OSErrors are the caller's."""
    temp = directory / f"{name}.{secrets.token_hex(4)}{TEMP_SUFFIX}"
    fd = open_new(temp)
    try:
        try:
            pwrite_all(fd, data, 0)
            fsync(fd)
        finally:
            os.close(fd)
        temp.rename(directory / name)
    except BaseException:
        with contextlib.suppress(OSError):
            temp.unlink()
        raise
    fsync_dir(directory)


def make_dir(path: Path) -> None:
    """A directory of ours, 0700 whatever the umask; fine when it exists."""
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            os.fchmod(fd, 0o700)
            give(fd, path.parent)
        finally:
            os.close(fd)


def _trusted(owner: int | None) -> frozenset[int]:
    return trust.callers() if owner is None else trust.callers() | {owner}


def check_way(path: Path, owner: int | None) -> None:
    """Refuses a path on which somebody else could put a directory of theirs; what does not exist yet is fine."""
    with wrapped("cannot look at the store", path):
        trust.check_way(path, _trusted(owner), hint=_WAY_HINT)


def check_private(path: Path, owner: int | None = None) -> None:
    """Refuses a store directory that is not ours (or the `owner`'s), that others may look into (it holds jobs' memory), or
    that they could exchange for another.
    """
    try:
        with trust.opened(path, _trusted(owner), hint=_WAY_HINT) as fd:
            status = os.fstat(fd)
    except FileNotFoundError:
        raise NoStoreError(
            "there is no store here", where=str(path), hint="`snap take` makes one; or name it with --store"
        ) from None
    except OSError as error:
        raise store_error(error, "cannot look at the store", path) from error
    if not stat.S_ISDIR(status.st_mode):
        raise NoStoreError("not a directory", where=str(path), hint="name another with --store")
    wanted = os.geteuid() if owner is None else owner
    if status.st_uid != wanted:
        raise PermissionDeniedError(
            f"the store belongs to uid {status.st_uid}, not to uid {wanted}",
            where=str(path),
            hint="run as its owner, or use a store of your own with --store; if you trust the owner like yourself: "
            "--store-owner USER",
        )
    if status.st_mode & 0o077:
        raise PermissionDeniedError(
            f"others have access to the store (mode {stat.S_IMODE(status.st_mode):04o})",
            where=str(path),
            hint=f"it holds the memory of jobs; look at who used it, then `chmod 700 {path}`",
        )


def give(fd: int, directory: Path) -> None:
    """Root's new file or directory in somebody else's store belongs to the store's owner, who must go on with it."""
    if os.geteuid() == 0:
        status = os.stat(directory)
        if status.st_uid:
            os.fchown(fd, status.st_uid, status.st_gid)
