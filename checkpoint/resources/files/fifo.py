"""FIFOs with a name: found again under it, or made again there when they are gone.

A FIFO's only content is what is in it while somebody has it open, which pipe.py puts back: so another one under the same
path, of the same owner and mode, does as well, and one that is gone (a script that removes it at its end, Valgrind's in /tmp) is
made with the file rights of its owner, who reaches no more that way than he could reach himself. Those whose name
was deleted at the dump are nameless.py's.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from typing import TYPE_CHECKING

from checkpoint.kernel import descriptors
from checkpoint.kernel.fdinfo import O_PATH
from checkpoint.resources import paths
from snapshotter.base.errors import RestoreConflictError

if TYPE_CHECKING:
    from images import common_pb2

_Warn = Callable[[str], None]


def check(identity: common_pb2.FileIdentity, warn: _Warn) -> None:
    """Whether it is there, or can be made. Touches nothing.

    Raises:
        RestoreConflictError: neither.
    """
    try:
        os.close(_find(identity, warn))
    except FileNotFoundError:
        os.close(_directory_of(identity))
        warn(f"{paths.shown(identity.path)}: the FIFO that the job had open is gone; it is made again")


def reopen(identity: common_pb2.FileIdentity, flags: int) -> int:
    """A description of it, made again if it is gone. The old job is dead.

    Raises:
        RestoreConflictError: there is another, or it cannot be made.
    """
    try:
        fd = _find(identity, lambda _text: None)
    except FileNotFoundError:
        fd = _make(identity)
    try:
        return paths.reopen(fd, flags, paths.shown(identity.path))
    finally:
        os.close(fd)


def _find(identity: common_pb2.FileIdentity, warn: _Warn) -> int:
    """An O_PATH descriptor; FileNotFoundError: nothing is there."""
    try:
        os.close(paths.find(identity.path))
    except FileNotFoundError:
        raise
    except OSError:
        pass  # locate() says what it is
    fd = paths.locate(identity, same_inode=False)
    now = os.fstat(fd)
    if (now.st_dev, now.st_ino) == (identity.dev, identity.ino):
        return fd
    if _traits(now) == (identity.uid, identity.gid, identity.mode):
        warn(f"{paths.shown(identity.path)}: another FIFO of the same owner is there than the job had open")
        return fd
    os.close(fd)
    return paths.locate(identity)  # says which it is


def _traits(node: os.stat_result) -> tuple[int, int, int]:
    return node.st_uid, node.st_gid, node.st_mode


def _directory_of(identity: common_pb2.FileIdentity) -> int:
    folder = os.path.dirname(identity.path)
    try:
        return descriptors.open_without_symlinks(folder, O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise RestoreConflictError(
            f"the directory of the FIFO that the job had open cannot be opened: {error.strerror}",
            where=paths.shown(identity.path),
            hint="make it again",
        ) from error


def _make(identity: common_pb2.FileIdentity) -> int:
    directory = _directory_of(identity)
    name = os.path.basename(identity.path)
    fd = -1
    try:
        descriptors.with_file_rights(
            identity.uid, identity.gid, lambda: os.mkfifo(name, 0o600, dir_fd=directory)
        )
        fd = os.open(name, O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
        # Whoever may write there could have put another one in its place.
        made = os.fstat(fd)
        if not stat.S_ISFIFO(made.st_mode) or made.st_uid != identity.uid:
            raise FileExistsError(0, "somebody has put another file in its place just now")
        if _traits(made) != (identity.uid, identity.gid, identity.mode):
            descriptors.with_file_rights(
                identity.uid,
                identity.gid,
                lambda: os.chmod(f"/proc/self/fd/{fd}", stat.S_IMODE(identity.mode)),
            )
    except OSError as error:
        if fd >= 0:
            os.close(fd)
        raise RestoreConflictError(
            f"the FIFO that the job had open is gone and cannot be made again: {error.strerror}",
            where=paths.shown(identity.path),
            hint="make it (mkfifo), then roll back",
        ) from error
    finally:
        os.close(directory)
    return fd
