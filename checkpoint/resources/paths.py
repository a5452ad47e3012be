"""Opens a file of an image by path, and only if it is that very file.

Owns the way in which everything with a path is found again: descriptors, mapped files, the executable, directories.
The recorded paths are the kernel's own and hold no symbolic links, so none is followed: whoever may write below a
path of the job must not choose which file root opens for it. Nothing is ever created or truncated here,
and no device is opened before it is known to be the right one: the path is first opened O_PATH (which
has no side effect), the *descriptor* is compared, and then reopened through /proc/self/fd.
"""

from __future__ import annotations

import errno
import os
import stat

from checkpoint.kernel import descriptors, distant
from checkpoint.kernel.fdinfo import O_PATH, O_TMPFILE_BIT
from checkpoint.resources import proof
from checkpoint.resources.proof import Sameness
from images import common_pb2
from snapshotter.base.errors import RestoreConflictError, wrap_os_error

_NEVER = os.O_CREAT | os.O_EXCL | os.O_TRUNC | os.O_ASYNC | os.O_NOFOLLOW

_TYPES = {
    stat.S_IFREG: "regular file",
    stat.S_IFDIR: "directory",
    stat.S_IFCHR: "character device",
    stat.S_IFBLK: "block device",
    stat.S_IFIFO: "FIFO",
    stat.S_IFSOCK: "socket",
    stat.S_IFLNK: "symbolic link",
}


def type_name(mode: int) -> str:
    """What an st_mode is of: "regular file", "directory" and so on."""
    return _TYPES.get(stat.S_IFMT(mode), "file")


def shown(path: bytes) -> str:
    """A path for messages."""
    return path.decode("utf-8", "backslashreplace")


def find(path: bytes) -> int:
    """An O_PATH descriptor of whatever is there; OSError, ELOOP when the path leads through a symbolic link."""
    return descriptors.open_without_symlinks(path, O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)


def locate(
    identity: common_pb2.FileIdentity, *, same_inode: bool = True, rdev: int | None = None, had: str = "open"
) -> int:
    """An O_PATH descriptor of the file; RestoreConflictError if it is gone or another one.

    Args:
        identity: what it was.
        same_inode: False compares the type only (devices, whose nodes may be made anew at boot).
        rdev: the device that it must be.
        had: what the job had of it, for messages: "open", "mapped".
    """
    kind = type_name(identity.mode)
    where = shown(identity.path)
    try:
        fd = find(identity.path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise RestoreConflictError(
            f"the {kind} that the job had {had} is gone",
            where=where,
            hint="put it back under this path, or roll back to another point",
        ) from error
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise through_a_link(identity.path) from error
        raise wrap_os_error(error, f"cannot open the {kind} that the job had {had}", where=where) from error
    now = os.fstat(fd)
    if stat.S_IFMT(now.st_mode) != stat.S_IFMT(identity.mode):
        os.close(fd)
        raise RestoreConflictError(
            f"the job had a {kind} {had} here, now there is a {type_name(now.st_mode)}",
            where=where,
            hint="put the old one back",
        )
    if same_inode and proof.compare(identity, fd) is Sameness.OTHER:
        os.close(fd)
        numbers = f"inode {identity.ino}, now {now.st_ino}"
        if (now.st_dev, now.st_ino) == (identity.dev, identity.ino):
            numbers = f"the new one got its inode number {identity.ino}"
        raise RestoreConflictError(
            f"the {kind} that the job had {had} was replaced by another ({numbers})",
            where=where,
            hint="put the old one back under this path, or roll back to another point",
        )
    if rdev is not None and now.st_rdev != rdev:
        os.close(fd)
        raise RestoreConflictError(
            f"no longer the device {os.major(rdev)}:{os.minor(rdev)}",
            where=where,
            hint="make it again with mknod",
        )
    return fd


def through_a_link(path: bytes) -> RestoreConflictError:
    """The error for a path that a symbolic link has come into."""
    return RestoreConflictError(
        "the path leads through a symbolic link now, which it did not at the point",
        where=shown(path),
        hint="a rollback follows none: put the directories and the file themselves back",
    )


def reopen(path_fd: int, flags: int, where: str) -> int:
    """Opens what an O_PATH descriptor stands for, with a description's own flags."""
    flags &= ~_NEVER
    if flags & O_TMPFILE_BIT:
        flags &= ~(O_TMPFILE_BIT | os.O_DIRECTORY)  # O_TMPFILE holds O_DIRECTORY, which this file is not
    try:
        return os.open(f"/proc/self/fd/{path_fd}", flags | os.O_CLOEXEC | os.O_NOCTTY)
    except OSError as error:
        raise wrap_os_error(error, "cannot open it again", where=where) from error


def by_handle(folder: bytes, handle_type: int, handle: bytes) -> int:
    """An O_PATH descriptor of a file by its handle (open_by_handle_at(2)), on the file system of `folder` or what is left
    of it. OSError where that cannot be.
    """
    while True:
        try:
            place = descriptors.open_without_symlinks(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            break
        except OSError:
            if folder in {b"/", b""}:
                raise
            folder = os.path.dirname(folder)
    try:
        return descriptors.open_by_handle(place, handle_type, handle, O_PATH | os.O_CLOEXEC)
    finally:
        os.close(place)


def is_closed(path: bytes) -> bool:
    """Whether the rights of snap's user end before the path does."""
    try:
        distant.lstat(path)
    except PermissionError:
        return True
    except OSError:
        return False
    return False


def leads_to(path: bytes, dev: int, ino: int) -> bool:
    """Whether the path, as snap sees it, leads to that file."""
    try:
        now = distant.lstat(path)
    except OSError:
        return False
    return (now.st_dev, now.st_ino) == (dev, ino)
