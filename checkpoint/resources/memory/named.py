"""Files with a path whose content is in the point: which they are, and finding or making them again.

Two kinds. NAMED: a file of a tmpfs that is mapped shared and writable (shm_open) is memory of the job's; its content goes
into the very inode that it was, for whoever else has it. KEPT: a small file that is mapped so, or a temporary one that is open; the
disk has its content as long as it is there, and only when its path leads nowhere is it made again: compilers, sort and the JVM
remove their temporary files when they are done, which is after the point.

One that is made is marked (an attribute that only root can set) as what it stands for, so that the point can be taken back
once more. It is made with the rights of a task that had it, so that nobody gets made for him what he could not make (making.py).
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat as stat_module
from typing import TYPE_CHECKING

from checkpoint.kernel import distant
from checkpoint.kernel.sys import syscall
from checkpoint.resources import authority, making, paths, proof
from checkpoint.resources.memory.identity import safe_close
from images import mm_pb2
from snapshotter.base.errors import RestoreConflictError, wrap_os_error

if TYPE_CHECKING:
    from checkpoint.model.holders import Who
    from checkpoint.resources.authority import Found
    from checkpoint.restore_context import RestoreContext
    from images import common_pb2

WITH_PATH = frozenset({mm_pb2.Shmem.NAMED, mm_pb2.Shmem.KEPT})
KEPT_MAX_BYTES = 8 << 20
"""Of one open file; they are read while the job stands still (5 GB/s)."""
MAPPED_MAX_BYTES = 1 << 20
KEPT_MAX, KEPT_MAX_BYTES_IN_ALL = 64, 32 << 20
_TMPFS = 0x01021994
_DISKS = frozenset({0xEF53, 0x58465342, 0x9123683E, 0xF2F52010, 0x2FC12FC1, 0x794C7630})
"""ext4, XFS, Btrfs, F2FS, ZFS and overlays: reading there waits for no process, which might be the frozen job's."""
_FOUND = "memory.named"
_PUNCH_HOLE = 0x3  # with FALLOC_FL_KEEP_SIZE


def mapped_role(path: str, stat: os.stat_result, link: bytes) -> mm_pb2.Shmem.Kind | None:
    """What becomes of the content of a file with a path that is mapped shared and writable; None: the file alone has it."""
    try:
        system = distant.filesystem_type(path, link)
    except OSError:
        return None
    if system == _TMPFS:
        return mm_pb2.Shmem.NAMED
    return mm_pb2.Shmem.KEPT if system in _DISKS and stat.st_size <= MAPPED_MAX_BYTES else None


def is_temporary(path: bytes, stat: os.stat_result) -> bool:
    """Whether it is a small file in a directory for temporary ones (sticky, as /tmp), of which a job removes its own at will.

    One that is missed anywhere else was not to be removed: that is said, and nothing put in its place.
    """
    if stat.st_size > KEPT_MAX_BYTES or stat.st_nlink != 1:
        return False
    folder = os.path.dirname(path)
    try:
        sticky = distant.stat(folder).st_mode & stat_module.S_ISVTX
        return bool(sticky) and distant.filesystem_type(folder) in {*_DISKS, _TMPFS}
    except OSError:
        return False


def hold_named(ctx: RestoreContext, name: str, image: mm_pb2.Shmem) -> None:
    """Find a NAMED file and keep it open until `release`: nobody can put another in its place.

    Raises:
        RestoreConflictError: another one has its name, it is closed to the job, or the job may not make it again.
    """
    found = _find_named(ctx, name, image)
    if found is not None:
        ctx.state.setdefault(_FOUND, {})[name] = found
    else:
        _check_can_be_made(ctx, name, image)


def _find_named(ctx: RestoreContext, name: str, image: mm_pb2.Shmem) -> int | None:
    """A descriptor of the file that it was, or that a rollback has put in its place; None when there is none.

    Raises:
        RestoreConflictError: another one has its name, or it is closed to the job.
    """
    where = paths.shown(image.name)
    try:
        path_fd = paths.find(image.name)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise paths.through_a_link(image.name) from error
        raise wrap_os_error(error, "cannot look at the job's shared memory", where=where) from error
    regular = stat_module.S_ISREG(os.fstat(path_fd).st_mode)
    made = regular and proof.is_marked(path_fd, image.origin)
    if made or (regular and proof.compare(image.file, path_fd) is not proof.Sameness.OTHER):
        who = ctx.holders.of_object(name)
        found = authority.judged(ctx, path_fd, image.file, who, os.R_OK | os.W_OK, proven=made)
        try:
            return authority.open_found(ctx, found, os.O_RDWR, where)
        finally:
            found.close()
    os.close(path_fd)
    raise RestoreConflictError(
        "another file has the name of the job's shared memory now",
        where=where,
        hint="move it away, or let its owner unlink it; the rollback makes the job's again",
    )


def find_kept(
    ctx: RestoreContext,
    name: str,
    conflict: RestoreConflictError,
    identity: common_pb2.FileIdentity,
    who: Who,
    access: int,
) -> Found | None:
    """What a rollback has made in place of a KEPT file; None: nothing is there, and it can be made.

    Args:
        ctx: the restore.
        name: of the Shmem with its content.
        conflict: raised when another file is there.
        identity: what it was.
        who: gets it.
        access: for what (authority.py).

    Raises:
        RestoreConflictError: neither; or it is closed to the job.
    """
    image = ctx.image(name, mm_pb2.Shmem)
    try:
        path_fd = paths.find(image.name)
    except FileNotFoundError:
        _check_can_be_made(ctx, name, image)
        return None
    except OSError:
        raise conflict from None
    if stat_module.S_ISREG(os.fstat(path_fd).st_mode) and proof.is_marked(path_fd, image.origin):
        return authority.judged(ctx, path_fd, identity, who, access, proven=True)
    os.close(path_fd)
    raise conflict


def _check_can_be_made(ctx: RestoreContext, name: str, image: mm_pb2.Shmem) -> None:
    making.check(ctx, ctx.holders.of_object(name), _what(image), image.name, _owner(image))


def _what(image: mm_pb2.Shmem) -> str:
    return "file" if image.kind == mm_pb2.Shmem.KEPT else "shared memory"


def _owner(image: mm_pb2.Shmem) -> making.Owner:
    return making.Owner(image.uid, image.gid, image.mode & 0o1777)


def open_again(ctx: RestoreContext, name: str, image: mm_pb2.Shmem) -> tuple[int, bool]:
    """(descriptor of the emptied file, whether it was made anew). The old job is dead by now."""
    fd = ctx.state.get(_FOUND, {}).pop(name, -1)
    if fd >= 0 and os.fstat(fd).st_nlink:
        with contextlib.suppress(OSError):
            # Never shortened first: whoever else has it mapped would get SIGBUS.
            syscall("fallocate", fd, _PUNCH_HOLE, 0, max(os.fstat(fd).st_size, 1))
        return fd, False
    safe_close(fd)  # unlinked since the check
    made = making.regular(ctx, ctx.holders.of_object(name), _what(image), image.name, _owner(image))
    proof.mark(made, image.origin)
    return made, True


def release(ctx: RestoreContext) -> None:
    """Close what `hold_named` has found. Safe to call twice."""
    for fd in ctx.state.pop(_FOUND, {}).values():
        safe_close(fd)
