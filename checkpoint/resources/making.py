"""Files that are made again at a restore, with the rights of a task that had them.

Owns that nobody gets made for him what he could not make himself: the directory is opened, the file made, and its owner
and mode set, with the rights of one task. A lock file of root's that `nobody` had open does not come back by way of `nobody`'s job.
Nothing is left of what was made but not finished. No link is followed.

A file that had no name any more gets none, and cannot be given one (O_EXCL, open(2)), unless the task made it so (O_TMPFILE). It lies on
its old file system: by the task's rights, or because the directories are as they were (the rule's exception); else in
memory. The bits that make a program run with its owner's rights never come back on a file that is made again.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from checkpoint.kernel import descriptors, rights
from checkpoint.kernel.fdinfo import O_PATH
from checkpoint.resources import authority, paths, proof
from snapshotter.base.errors import RestoreConflictError

if TYPE_CHECKING:
    from checkpoint.model.holders import Who
    from checkpoint.restore_context import RestoreContext
    from images import common_pb2

_NO_NAMELESS_FILES = frozenset({errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL})
"""What O_TMPFILE gives on a file system that lacks it."""
_OPEN = os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class Owner:
    """Whose a file is to be."""

    uid: int
    gid: int
    mode: int
    """Without type bits."""


def check(ctx: RestoreContext, who: Who, what: str, path: bytes, owner: Owner) -> None:
    """Whether one of these tasks may make such a file there. Leaves nothing.

    Raises:
        RestoreConflictError: none may.
    """

    def work() -> None:
        with _opened(os.path.dirname(path)) as folder:
            try:
                fd = _nameless(folder, linkable=False)
            except OSError as error:
                if error.errno not in _NO_NAMELESS_FILES:
                    raise
                if not rights.may_access(folder, os.W_OK | os.X_OK):
                    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES)) from None
                return
            try:
                authority.dress(fd, owner.uid, owner.gid, owner.mode)
            finally:
                os.close(fd)

    with _explained(what, path, owner):
        authority.with_rights_of(ctx, who, work)


def regular(ctx: RestoreContext, who: Who, what: str, path: bytes, owner: Owner) -> int:
    """Make an empty regular file; a descriptor that reads and writes.

    Raises:
        RestoreConflictError: none of the tasks may, or something has its name.
    """
    flags = os.O_CREAT | os.O_EXCL | os.O_RDWR | _OPEN
    return _make(ctx, who, what, path, owner, lambda folder, name: os.open(name, flags, 0o600, dir_fd=folder))


def fifo(ctx: RestoreContext, who: Who, path: bytes, owner: Owner) -> int:
    """Make a FIFO; an O_PATH descriptor.

    Raises:
        RestoreConflictError: none of the tasks may, or something has its name.
    """

    def make(folder: int, name: bytes) -> int:
        os.mkfifo(name, 0o600, dir_fd=folder)
        fd = os.open(name, O_PATH | _OPEN, dir_fd=folder)
        if not stat.S_ISFIFO(os.fstat(fd).st_mode):  # whoever may write there could put another in its place
            os.close(fd)
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
        return fd

    return _make(ctx, who, "FIFO", path, owner, make)


def nameless(
    ctx: RestoreContext, who: Who, file: common_pb2.FileIdentity, owner: Owner, *, linkable: bool
) -> int:
    """Make an empty regular file without a name where it was; -1: not there.

    Args:
        ctx: the restore.
        who: the tasks that had it.
        file: its old path, and the way to it.
        owner: whose it is to be.
        linkable: a task made it so that it could give it a name later (O_TMPFILE): it is then wholly its own.
    """
    path = os.path.dirname(file.path)

    def work() -> int:
        with _opened(path) as folder:
            fd = _nameless(folder, linkable=linkable)
            try:
                if linkable:
                    authority.dress(fd, owner.uid, owner.gid, owner.mode & 0o1777)
            except BaseException:
                os.close(fd)
                raise
            return fd

    fd = -1
    with contextlib.suppress(OSError):
        fd = authority.with_rights_of(ctx, who, work)
    if fd < 0 and file.way and proof.way(path) == file.way:
        with contextlib.suppress(OSError), _opened(path) as folder:
            fd = _nameless(folder, linkable=False)
    if fd >= 0 and not linkable:
        os.fchown(fd, owner.uid, owner.gid)
        os.fchmod(fd, owner.mode & 0o1777)
    return fd


def _nameless(folder: int, *, linkable: bool) -> int:
    flags = os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC | (0 if linkable else os.O_EXCL)
    return os.open(f"/proc/self/fd/{folder}", flags, 0o600)


@contextlib.contextmanager
def _opened(folder: bytes) -> Iterator[int]:
    fd = descriptors.open_without_symlinks(folder, O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def _make(
    ctx: RestoreContext, who: Who, what: str, path: bytes, owner: Owner, make: Callable[[int, bytes], int]
) -> int:
    folder_path, name = os.path.split(path)

    def work() -> int:
        with _opened(folder_path) as folder:
            fd = make(folder, name)
            try:
                authority.dress(fd, owner.uid, owner.gid, owner.mode)
            except BaseException:
                if os.path.samestat(os.fstat(fd), os.stat(name, dir_fd=folder, follow_symlinks=False)):
                    os.unlink(name, dir_fd=folder)
                os.close(fd)
                raise
            return fd

    with _explained(what, path, owner):
        return authority.with_rights_of(ctx, who, work)


@contextlib.contextmanager
def _explained(what: str, path: bytes, owner: Owner) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        text = (
            f"the {what} that the job had is gone and cannot be made again: {os.strerror(error.errno or 0)}"
        )
        hint = "put it back, or roll back to another point"
        if error.errno in {errno.EACCES, errno.EPERM}:
            text = (
                f"the {what} that the job had is gone, and the job's users may not make it again as it was "
                f"(user {owner.uid}, group {owner.gid}, mode {owner.mode:04o})"
            )
        elif error.errno == errno.ELOOP:
            raise paths.through_a_link(path) from error
        elif error.errno in {errno.ENOENT, errno.ENOTDIR}:
            text, hint = f"the directory of the {what} that the job had is gone", "make it again"
        raise RestoreConflictError(text, where=paths.shown(path), hint=hint) from error
