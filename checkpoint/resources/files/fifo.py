"""FIFOs with a name: found again under it, or made again there when they are gone.

A FIFO's only content is what is in it while somebody has it open, which pipe.py puts back: so another one under the same
path, of the same owner and mode, does as well, and one that is gone (a script that removes it at its end, Valgrind's in /tmp) is
made with the rights of a task that had it (making.py). Those whose name
was deleted at the dump are nameless.py's.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from typing import TYPE_CHECKING

from checkpoint.resources import authority, making, paths, proof

if TYPE_CHECKING:
    from checkpoint.model.holders import Who
    from checkpoint.resources.authority import Found
    from checkpoint.restore_context import RestoreContext
    from images import common_pb2

_Warn = Callable[[str], None]


def check(
    ctx: RestoreContext, identity: common_pb2.FileIdentity, who: Who, access: int, known: Found | None
) -> Found | None:
    """Find it, and judge; None: it is gone, and can be made again. Touches nothing.

    Args:
        ctx: the restore.
        identity: what it was.
        who: gets it.
        access: for what (authority.py).
        known: what was found already, for another description of it; closed if this raises.

    Raises:
        RestoreConflictError: there is another, it is closed to the job, or it is gone and cannot be made.
    """
    try:
        fd = _find(identity, ctx.warn) if known is None else known.fd
    except FileNotFoundError:
        making.check(ctx, who, "FIFO", identity.path, _owner(identity))
        ctx.warn(f"{paths.shown(identity.path)}: the FIFO that the job had open is gone; it is made again")
        return None
    return authority.judged(ctx, fd, identity, who, access)


def reopen(
    ctx: RestoreContext, identity: common_pb2.FileIdentity, who: Who, found: Found | None, flags: int
) -> int:
    """A description of what `check` found, made again if it is gone. The old job is dead.

    Raises:
        RestoreConflictError: there is another by now, or it cannot be made.
    """
    if found is not None and os.fstat(found.fd).st_nlink:
        return paths.reopen(found.fd, flags, paths.shown(identity.path))
    fd = making.fifo(ctx, who, identity.path, _owner(identity))
    try:
        return paths.reopen(fd, flags, paths.shown(identity.path))
    finally:
        os.close(fd)


def _owner(identity: common_pb2.FileIdentity) -> making.Owner:
    return making.Owner(identity.uid, identity.gid, stat.S_IMODE(identity.mode))


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
    if proof.compare(identity, fd) is not proof.Sameness.OTHER:
        return fd
    if (now.st_uid, now.st_gid, now.st_mode) == (identity.uid, identity.gid, identity.mode):
        warn(f"{paths.shown(identity.path)}: another FIFO of the same owner is there than the job had open")
        return fd
    os.close(fd)
    return paths.locate(identity)  # says which it is
