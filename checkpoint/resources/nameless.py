"""FIFOs, directories, links and devices that the job has open and whose name was deleted: made again, nameless as they were.

They are made under their old path in an empty file system in memory that is mounted nowhere, and deleted there: nobody sees
them, nothing along a path that others write is touched, and /proc shows the same link. A deleted directory is made
in its old parent instead where every task of the job may do that, for `..` must still lead out of it: without permissions until it
has no name any more, and only under a name that is free.

One node for all that had the same inode: descriptors, FIFO ends, working directories.
"""

from __future__ import annotations

import contextlib
import os
import stat
from typing import TYPE_CHECKING

from checkpoint.kernel import descriptors
from checkpoint.kernel.fdinfo import O_PATH
from checkpoint.resources import authority, paths
from images import common_pb2
from snapshotter.base.errors import RestoreConflictError

if TYPE_CHECKING:
    from checkpoint.restore_context import RestoreContext

_STATE = "nameless"
_OPEN = O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC


def can_be_made(mode: int) -> bool:
    """Whether a node of this type (st_mode) can be made again without its name."""
    return stat.S_ISFIFO(mode) or stat.S_ISDIR(mode) or stat.S_ISLNK(mode)


def make(ctx: RestoreContext, identity: common_pb2.FileIdentity, rdev: int = 0) -> int:
    """An O_PATH descriptor of the node, made at the first call; `release` closes it. `rdev`: of a character device, which the
    caller must know to be a harmless one.

    Raises:
        RestoreConflictError: it cannot be made here.
    """
    made: dict[tuple[int, int], int] = ctx.state.setdefault(_STATE, {})
    key = (identity.dev, identity.ino)
    if key not in made:
        try:
            fd = (
                _in_its_parent(ctx, identity)
                if stat.S_ISDIR(identity.mode) and not ctx.options.dry_run
                else None
            )
            made[key] = _hidden(identity, rdev) if fd is None else fd
        except (OSError, ValueError) as error:
            raise RestoreConflictError(
                f"the deleted {paths.type_name(identity.mode)} that the job had open cannot be made again: {error}",
                where=paths.shown(identity.path),
                hint="it takes CAP_SYS_ADMIN and CAP_SYS_CHROOT: run the rollback as root",
            ) from error
    return made[key]


def release(ctx: RestoreContext) -> None:
    """Close the nodes. Safe to call twice."""
    for fd in ctx.state.pop(_STATE, {}).values():
        os.close(fd)


def _hidden(identity: common_pb2.FileIdentity, rdev: int) -> int:
    def work() -> int:
        path = os.path.normpath(b"/" + identity.path)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        if stat.S_ISFIFO(identity.mode):
            os.mkfifo(path, 0)
        elif stat.S_ISDIR(identity.mode):
            os.mkdir(path, 0)
        elif rdev:
            os.mknod(path, stat.S_IFCHR, rdev)
        else:
            os.symlink(identity.target, path)
        fd = os.open(path, _OPEN)
        (os.rmdir if stat.S_ISDIR(identity.mode) else os.unlink)(path)
        with contextlib.suppress(OSError):
            os.removedirs(os.path.dirname(path))
        return fd

    root = descriptors.detached_tmpfs()
    try:
        return _dressed(descriptors.with_root(root, work), identity)
    finally:
        os.close(root)


def _in_its_parent(ctx: RestoreContext, identity: common_pb2.FileIdentity) -> int | None:
    """A deleted directory in the directory that it was in; None where that cannot be.

    Its `..` leads into that one, past whatever is above: every task of the job must be able to make it there.
    """
    folder, name = os.path.split(identity.path)
    made: list[int] = []

    def work() -> None:
        parent = descriptors.open_without_symlinks(folder, O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.mkdir(name, 0, dir_fd=parent)
            made.append(os.open(name, _OPEN, dir_fd=parent))
            # Whoever may write there could have put another one in its place: that one is removed, or none.
            os.rmdir(name, dir_fd=parent)
        finally:
            os.close(parent)

    try:
        for task in sorted(ctx.holders.everybody):
            authority.with_rights_of(ctx, frozenset({task}), work)
    except OSError:
        made, lost = [], made
    else:
        lost, made = made[1:], made[:1]
    for fd in lost:
        os.close(fd)
    if made and stat.S_ISDIR(os.fstat(made[0]).st_mode) and not os.fstat(made[0]).st_nlink:
        return _dressed(made[0], identity)
    for fd in made:
        os.close(fd)
    return None


def _dressed(fd: int, identity: common_pb2.FileIdentity) -> int:
    """Owner and mode, now that nobody can reach it by a name."""
    try:
        descriptors.change_owner(fd, identity.uid, identity.gid)
        if not stat.S_ISLNK(identity.mode):
            os.chmod(f"/proc/self/fd/{fd}", stat.S_IMODE(identity.mode))
    except BaseException:
        os.close(fd)
        raise
    return fd
