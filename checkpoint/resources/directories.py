"""Working directory, root and umask of a process.

Restore: the directories are found by path without following a link (paths.py), before anything is touched, and stay open until
the stubs have them. A working directory that is another one now is a warning; a root must be the very one.
"""

from __future__ import annotations

import errno
import os
import stat as stat_module
from typing import TYPE_CHECKING

from checkpoint.resources import paths
from images import common_pb2, task_pb2
from snapshotter.base.errors import RestoreConflictError, UnsupportedError

if TYPE_CHECKING:
    from checkpoint.parasite import Batch
    from checkpoint.restore_context import RestoreContext

_DIRECTORIES = "task.directories"
_DELETED = " (deleted)"


def dump(pid: int, message: task_pb2.Process) -> None:
    """Add cwd and root; the umask stands in a file that the task resource reads anyway."""
    message.cwd.CopyFrom(_directory(pid, "cwd"))
    message.root.CopyFrom(_directory(pid, "root"))


def _directory(pid: int, link: str) -> common_pb2.FileIdentity:
    path = f"/proc/{pid}/{link}"
    info, target = os.stat(path), os.readlink(path)
    if target.endswith(_DELETED) and not info.st_nlink:
        raise UnsupportedError(
            f"its {link} was deleted just now", where=f"task {pid}", hint="let it chdir first"
        )
    return common_pb2.FileIdentity(
        path=os.fsencode(target), dev=info.st_dev, ino=info.st_ino, mode=info.st_mode
    )


def check(ctx: RestoreContext, process: task_pb2.Process) -> None:
    """Working directory and root must be there. Touches nothing; the directories stay open until `release`."""
    for what, identity in (("working directory", process.cwd), ("root directory", process.root)):
        path, opened = paths.shown(identity.path), _directories(ctx)
        where = f"task {process.pid}"
        if _place(identity) in opened:
            continue
        try:
            fd = opened[_place(identity)] = paths.find(identity.path)
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise paths.through_a_link(identity.path) from error
            raise RestoreConflictError(
                f"its {what} {path} cannot be opened: {error.strerror}",
                where=where,
                hint="make it again, then roll back",
            ) from error
        info = os.fstat(fd)
        if not stat_module.S_ISDIR(info.st_mode):
            raise RestoreConflictError(f"its {what} {path} is no directory any more", where=where)
        if (info.st_dev, info.st_ino) == (identity.dev, identity.ino):
            continue
        if identity is process.root:
            raise RestoreConflictError(
                f"its {what} {path} is another directory now than at the point",
                where=where,
                hint="put the old one back: programs trust what they find below their root",
            )
        ctx.warn(f"task {process.pid}: its {what} {path} is another directory now than at the point")


def _directories(ctx: RestoreContext) -> dict[tuple[bytes, int, int], int]:
    found: dict[tuple[bytes, int, int], int] = ctx.state.setdefault(_DIRECTORIES, {})
    return found


def _place(identity: common_pb2.FileIdentity) -> tuple[bytes, int, int]:
    return identity.path, identity.dev, identity.ino


def release(ctx: RestoreContext) -> None:
    """Close the directories that `check` opened. Safe to call twice."""
    for fd in ctx.state.pop(_DIRECTORIES, {}).values():
        os.close(fd)


def restore(ctx: RestoreContext, batch: Batch, process: task_pb2.Process) -> None:
    """Root, cwd, umask."""
    own_root = os.stat("/")
    for identity, chroot in ((process.root, True), (process.cwd, False)):
        if chroot and (identity.dev, identity.ino) == (own_root.st_dev, own_root.st_ino):
            continue
        remote = ctx.give(batch, _directories(ctx)[_place(identity)])
        batch.call("fchdir", remote)
        if chroot:
            batch.call("chroot", b".\0")
        batch.call("close", remote)
    batch.call("umask", process.umask)
