"""Files with a path whose content is in the point: which they are, and finding or making them again.

Two kinds. NAMED: a file of a tmpfs that is mapped shared and writable (shm_open) is memory of the job's; its content goes
into the very inode that it was, for whoever else has it. KEPT: a small file that is mapped so, or a temporary one that is open; the
disk has its content as long as it is there, and only when its path leads nowhere is it made again: compilers, sort and the JVM
remove their temporary files when they are done, which is after the point.

One that is made is marked (an attribute that only root can set) as what it stands for, so that the point can be taken back
once more. A KEPT file is made with the file rights of its owner, who reaches no more that way than he could himself.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat as stat_module
from typing import TYPE_CHECKING

from checkpoint.kernel import descriptors
from checkpoint.kernel.fdinfo import O_PATH
from checkpoint.kernel.sys import syscall
from checkpoint.resources import paths
from checkpoint.resources.memory.identity import safe_close
from images import mm_pb2
from snapshotter.base.errors import RestoreConflictError, wrap_os_error

if TYPE_CHECKING:
    from collections.abc import Callable

    from checkpoint.restore_context import RestoreContext

WITH_PATH = frozenset({mm_pb2.Shmem.NAMED, mm_pb2.Shmem.KEPT})
KEPT_MAX_BYTES = 8 << 20
"""Of one open file; they are read while the job stands still (5 GB/s)."""
MAPPED_MAX_BYTES = 1 << 20
KEPT_MAX, KEPT_MAX_BYTES_IN_ALL = 64, 32 << 20
_TMPFS = 0x01021994
_DISKS = frozenset({0xEF53, 0x58465342, 0x9123683E, 0xF2F52010, 0x2FC12FC1, 0x794C7630})
"""ext4, XFS, Btrfs, F2FS, ZFS and overlays: reading there waits for no process, which might be the frozen job's."""
_FOUND = "memory.named"
_MARK = "trusted.snap.origin"
_PUNCH_HOLE = 0x3  # with FALLOC_FL_KEEP_SIZE


def mapped_role(path: str, stat: os.stat_result) -> mm_pb2.Shmem.Kind | None:
    """What becomes of the content of a file with a path that is mapped shared and writable; None: the file alone has it."""
    try:
        system = descriptors.filesystem_type(path)
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
        sticky = os.stat(folder).st_mode & stat_module.S_ISVTX
        return bool(sticky) and descriptors.filesystem_type(folder) in {*_DISKS, _TMPFS}
    except OSError:
        return False


def origin(fd: int, stat: os.stat_result) -> bytes:
    """The file that it was first, however often rollbacks have made it again."""
    if mark := _mark_of(fd):
        return mark
    with open("/proc/sys/kernel/random/boot_id", "rb") as file:
        return b"%s:%x:%x" % (file.read().strip(), stat.st_dev, stat.st_ino)


def hold_named(ctx: RestoreContext, name: str, image: mm_pb2.Shmem) -> None:
    """Find a NAMED file and keep it open until `release`: nobody can put another in its place.

    Raises:
        RestoreConflictError: another one has its name, or it cannot be made again.
    """
    found = _find_named(image)
    if found is not None:
        ctx.state.setdefault(_FOUND, {})[name] = found
    else:
        os.close(_directory_of(image))


def _find_named(image: mm_pb2.Shmem) -> int | None:
    """A descriptor of the file that it was, or that a rollback has put in its place; None when there is none.

    Raises:
        RestoreConflictError: another one has its name.
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
    try:
        found = os.fstat(path_fd)
        fd = paths.reopen(path_fd, os.O_RDWR, where) if stat_module.S_ISREG(found.st_mode) else -1
    finally:
        os.close(path_fd)
    if fd >= 0:
        if (found.st_dev, found.st_ino) == (image.dev, image.ino) or _mark_of(fd) == image.origin != b"":
            return fd
        os.close(fd)
    raise RestoreConflictError(
        "another file has the name of the job's shared memory now",
        where=where,
        hint="move it away, or let its owner unlink it; the rollback makes the job's again",
    )


def find_kept(ctx: RestoreContext, name: str) -> int:
    """An O_PATH descriptor of what a rollback has made in place of a KEPT file; -1: nothing is there, and it can be made.

    Raises:
        OSError, RestoreConflictError: neither.
    """
    image = ctx.image(name, mm_pb2.Shmem)
    try:
        path_fd = paths.find(image.name)
    except FileNotFoundError:
        _check_can_be_made(image)
        return -1
    if stat_module.S_ISREG(os.fstat(path_fd).st_mode) and image.origin:
        with contextlib.suppress(OSError):
            if os.getxattr(f"/proc/self/fd/{path_fd}", _MARK) == image.origin:
                return path_fd
    os.close(path_fd)
    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))


def _check_can_be_made(image: mm_pb2.Shmem) -> None:
    """Raises OSError when its owner may not make a file there: a nameless one tells, which leaves nothing."""
    directory = _directory_of(image)
    try:
        flags = os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC
        place = f"/proc/self/fd/{directory}"
        os.close(_with_rights(image, lambda: os.open(place, flags, 0o600)))
    except OSError as error:
        if error.errno not in {
            errno.EOPNOTSUPP,
            errno.EISDIR,
            errno.EINVAL,
        }:  # a file system without nameless files
            raise
    finally:
        os.close(directory)


def _with_rights(image: mm_pb2.Shmem, work: Callable[[], int]) -> int:
    return descriptors.with_file_rights(image.uid, image.gid, work)


def _directory_of(image: mm_pb2.Shmem) -> int:
    path = os.path.dirname(image.name)
    try:
        return descriptors.open_without_symlinks(path, O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        what = "file" if image.kind == mm_pb2.Shmem.KEPT else "shared memory"
        raise RestoreConflictError(
            f"the directory of the job's {what} cannot be opened: {error.strerror}",
            where=paths.shown(image.name),
            hint="make it again",
        ) from error


def open_again(ctx: RestoreContext, name: str, image: mm_pb2.Shmem) -> tuple[int, bool]:
    """(descriptor of the emptied file, whether it was made anew). The old job is dead by now."""
    fd = ctx.state.get(_FOUND, {}).pop(name, -1)
    if fd >= 0 and os.fstat(fd).st_nlink:
        with contextlib.suppress(OSError):
            # Never shortened first: whoever else has it mapped would get SIGBUS.
            syscall("fallocate", fd, _PUNCH_HOLE, 0, max(os.fstat(fd).st_size, 1))
        return fd, False
    safe_close(fd)  # unlinked since the check
    directory = _directory_of(image)

    def make() -> int:
        flags = os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_RDWR | os.O_CLOEXEC
        return os.open(os.path.basename(image.name), flags, 0o600, dir_fd=directory)

    try:
        made = _with_rights(image, make) if image.kind == mm_pb2.Shmem.KEPT else make()
    except OSError as error:
        what = "the job's file" if image.kind == mm_pb2.Shmem.KEPT else "the job's shared memory"
        raise wrap_os_error(error, f"cannot make {what} again", where=paths.shown(image.name)) from error
    finally:
        os.close(directory)
    # Without CAP_SYS_ADMIN, or on an old kernel, the next rollback will ask.
    with contextlib.suppress(OSError):
        os.setxattr(made, _MARK, image.origin)
    return made, True


def release(ctx: RestoreContext) -> None:
    """Close what `hold_named` has found. Safe to call twice."""
    for fd in ctx.state.pop(_FOUND, {}).values():
        safe_close(fd)


def _mark_of(fd: int) -> bytes:
    try:
        return os.getxattr(fd, _MARK)
    except OSError:
        return b""
