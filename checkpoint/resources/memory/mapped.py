"""Files that are mapped by path: found, compared and opened once, and kept open until the mappings are made.

Owns those descriptors of snap's. `check` opens each before anything is touched, `descriptor` gives it to the mapping:
in between nobody can put another file under the path. A file that is mapped shared must be the very inode, since
the job writes into it; one that is mapped privately, or executed, may also be
another copy of the same build. A small one that is mapped shared and gone is made again from the point (shmem.py), once the old job
is dead.
"""

from __future__ import annotations

import os

from checkpoint.model import vma as model
from checkpoint.model.holders import Who
from checkpoint.resources import authority, paths
from checkpoint.resources.authority import Found
from checkpoint.resources.memory import identity, named, shmem
from checkpoint.restore_context import RestoreContext
from images import common_pb2, mm_pb2
from snapshotter.base.errors import RestoreConflictError

_KEY = "memory.mapped"
_Key = tuple[bytes, int, int, bool]


def check(ctx: RestoreContext, space: str, mm: mm_pb2.Mm) -> None:
    """Open every file that the address space of this image name maps, and its executable.

    Raises:
        RestoreConflictError: names what is gone, changed, or closed to the job.
    """
    shared: dict[int, tuple[int, bool]] = {}  # file -> how far mappings reach, whether one can be written
    for vma in mm.vmas:
        if vma.kind == model.FILE_SHARED:
            reach, writable = shared.get(vma.file, (0, False))
            shared[vma.file] = (
                max(reach, vma.offset + vma.end - vma.start),
                writable or vma.writable_fd,
            )
    who = ctx.holders.of_space(space)
    for index in sorted({vma.file for vma in mm.vmas if vma.kind == model.FILE_PRIVATE}):
        wanted = mm.files[index]
        path_fd = identity.open_same(wanted, "is mapped by the job and")
        _keep(ctx, wanted, authority.judged(ctx, path_fd, wanted, who, os.R_OK))
    for index, (reach, writable) in sorted(shared.items()):
        wanted = mm.files[index]
        found = _locate_shared(ctx, wanted, who, os.R_OK | (os.W_OK if writable else 0))
        if found is None:
            continue
        try:
            _check_shared(ctx, wanted, found.fd, reach, writable=writable)
        except BaseException:
            found.close()
            raise
        _keep(ctx, wanted, found, writable=writable)
    if not mm.exe_shmem:
        path_fd = identity.open_same(mm.exe, "is the job's executable and")
        found = authority.judged(ctx, path_fd, mm.exe, who, os.X_OK)
        # A program that may be run but not read: the kernel wants a descriptor of it all the same (PR_SET_MM_EXE_FILE).
        _keep(ctx, mm.exe, Found(found.fd))


def _locate_shared(
    ctx: RestoreContext, wanted: common_pb2.FileIdentity, who: Who, access: int
) -> Found | None:
    """The file, or what a rollback has made in its place; None: it is gone, and `descriptor` will make it again.

    Raises:
        RestoreConflictError: it is gone for good, another has its path, or it is closed to the job.
    """
    try:
        return authority.locate(ctx, wanted, who, access, had="mapped")
    except RestoreConflictError as conflict:
        if not wanted.kept:
            raise
        found = named.find_kept(ctx, wanted.kept, conflict, wanted, who, access)
    if found is None:
        ctx.warn(
            f"{paths.shown(wanted.path)} is gone; it is made again, with the content that it had at the point"
        )
    return found


def _check_shared(
    ctx: RestoreContext, wanted: common_pb2.FileIdentity, path_fd: int, reach: int, *, writable: bool
) -> None:
    difference = identity.compare(wanted, path_fd)
    where = paths.shown(wanted.path)
    if difference.text and difference.size_bytes < min(wanted.size_bytes, reach):
        raise RestoreConflictError(
            f"is mapped by the job and {difference.text}: its mapping would reach behind its end",
            where=where,
            hint="put the file back as it was when the point was taken",
        )
    if writable and (difference.text or ctx.replaces):
        # A page that was dirty at the point is written on without a new modification time.
        how = f" (it {difference.text})" if difference.text else ""
        ctx.warn(
            f"{where} is mapped shared and writable: the job gets the file as it is at the rollback{how}"
        )
    elif difference.text:
        ctx.warn(f"{where} {difference.text}; the job maps it shared and gets it as it is now")


def _keep(
    ctx: RestoreContext, wanted: common_pb2.FileIdentity, found: Found, *, writable: bool = False
) -> None:
    """Open it as it will be mapped; takes over what was found."""
    opened = _opened(ctx)
    try:
        for mode in {False, writable}:
            if _key(wanted, mode) not in opened:
                opened[_key(wanted, mode)] = identity.reopen_mapped(ctx, wanted, found, writable=mode)
    finally:
        found.close()


def descriptor(ctx: RestoreContext, wanted: common_pb2.FileIdentity, *, writable: bool = False) -> int:
    """Snap's descriptor of a file that `check` opened, or found to be gone; `release` closes it."""
    opened, key = _opened(ctx), _key(wanted, writable)
    if key not in opened and wanted.kept:
        opened[key] = shmem.open_description(ctx, wanted.kept, os.O_RDWR if writable else os.O_RDONLY)
    return opened[key]


def release(ctx: RestoreContext) -> None:
    """Close them all. Safe to call twice."""
    for fd in ctx.state.pop(_KEY, {}).values():
        identity.safe_close(fd)


def _opened(ctx: RestoreContext) -> dict[_Key, int]:
    opened: dict[_Key, int] = ctx.state.setdefault(_KEY, {})
    return opened


def _key(wanted: common_pb2.FileIdentity, writable: bool) -> _Key:
    return wanted.path, wanted.dev, wanted.ino, writable
