"""Directories and O_PATH descriptors: reopened by path, same inode.

State: the place, and for a directory the getdents(2) position (a cookie of the file system, valid as
long as the directory is the same one). Deleted directories, FIFOs and symbolic links are made again without a name (nameless.py); places in /proc: pseudo.py.
Refused: other deleted files that are only a place (O_PATH).
"""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

from checkpoint.kernel import descriptors
from checkpoint.kernel.fdinfo import O_PATH
from checkpoint.resources import authority, nameless, paths
from checkpoint.resources.files import kind, pseudo
from snapshotter.base.errors import Finding

if TYPE_CHECKING:
    from checkpoint.resources.files.dumping import FilesDump
    from checkpoint.resources.files.kind import Seen
    from checkpoint.resources.files.opening import Opening
    from images import files_pb2


def _of_processes(seen: Seen) -> int:
    """The file system, if it is one of those that show processes; places in the kernel's other ones are places like any."""
    system = pseudo.system_of(seen)
    return system if system in {pseudo.PROC_MAGIC, pseudo.NSFS_MAGIC} else 0


def _refusal(seen: Seen) -> Finding | None:
    if system := _of_processes(seen):
        return pseudo.refusal(seen, system)
    if paths.leads_to(seen.link, seen.stat.st_dev, seen.stat.st_ino) or _is_nameless(seen):
        return None
    what = "was deleted" if seen.link.endswith(kind.DELETED) else "cannot be reached by its path from here"
    return Finding(seen.pid, seen.where, f"the {paths.type_name(seen.stat.st_mode)} {what}", "close it first")


def _is_nameless(seen: Seen) -> bool:
    return (
        seen.stat.st_nlink == 0
        and seen.link.endswith(kind.DELETED)
        and nameless.can_be_made(seen.stat.st_mode)
    )


def _dump(job: FilesDump, seen: Seen, place: files_pb2.Directory | files_pb2.PathOnly) -> None:
    identity = kind.identity_of(seen)
    if system := _of_processes(seen):
        place.proc.CopyFrom(
            pseudo.namespace_entry(seen) if system == pseudo.NSFS_MAGIC else pseudo.entry_of(seen.link)
        )
        identity.deleted = False
    if not identity.deleted:
        identity.path = seen.link
    elif stat.S_ISLNK(seen.stat.st_mode):
        with job.borrow(seen) as fd:
            identity.target = os.readlink(b"", dir_fd=fd)
    place.identity.CopyFrom(identity)


def _check(
    opening: Opening, description: files_pb2.Description, place: files_pb2.Directory | files_pb2.PathOnly
) -> None:
    flags = description.flags | (O_PATH if description.HasField("path_only") else 0)
    if place.HasField("proc") or pseudo.is_pseudo(place.identity.path):
        pseudo.check(opening.ctx, place.identity, place.proc, flags)
    elif place.identity.deleted:
        nameless.make(opening.ctx, place.identity)
    else:
        access = 0 if description.HasField("path_only") else None
        opening.judge(description, place.identity, access)


def _open(
    opening: Opening, description: files_pb2.Description, place: files_pb2.Directory | files_pb2.PathOnly
) -> int:
    flags = description.flags | (O_PATH if description.HasField("path_only") else 0)
    if place.HasField("proc") or pseudo.is_pseudo(place.identity.path):
        return pseudo.reopen(opening.ctx, place.identity, place.proc, flags)
    if place.identity.deleted:
        return paths.reopen(
            nameless.make(opening.ctx, place.identity), flags, paths.shown(place.identity.path)
        )
    if flags & (O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW) == O_PATH | os.O_NOFOLLOW:
        return os.dup(opening.judged[description.id].fd)
    return authority.open_found(
        opening.ctx, opening.judged[description.id], flags, paths.shown(place.identity.path)
    )


class DirectoryKind(kind.Kind):
    field = "directory"

    def claims(self, seen: Seen) -> bool:
        return stat.S_ISDIR(seen.stat.st_mode) and not seen.path_only

    def refusal(self, seen: Seen) -> Finding | None:
        return _refusal(seen)

    def dump(self, job: FilesDump, seen: Seen, description: files_pb2.Description) -> None:
        _dump(job, seen, description.directory)
        with job.borrow(seen) as fd:
            _, owner = descriptors.get_owner(fd)
        if owner:  # which F_NOTIFY sets (fcntl_dirnotify in fs/notify/dnotify/dnotify.c)
            job.ctx.warn(
                f"task {seen.pid}, {seen.where}: signals about changes of this directory (fcntl F_NOTIFY) end with a rollback"
            )

    def check(self, opening: Opening, description: files_pb2.Description) -> None:
        _check(opening, description, description.directory)

    def open(self, opening: Opening, description: files_pb2.Description) -> int:
        fd = _open(opening, description, description.directory)
        if description.offset:
            os.lseek(fd, description.offset, os.SEEK_SET)
        return fd


class PathOnlyKind(kind.Kind):
    field = "path_only"

    def claims(self, seen: Seen) -> bool:
        return seen.path_only

    def refusal(self, seen: Seen) -> Finding | None:
        return _refusal(seen)

    def dump(self, job: FilesDump, seen: Seen, description: files_pb2.Description) -> None:
        _dump(job, seen, description.path_only)

    def check(self, opening: Opening, description: files_pb2.Description) -> None:
        _check(opening, description, description.path_only)

    def open(self, opening: Opening, description: files_pb2.Description) -> int:
        return _open(opening, description, description.path_only)


DIRECTORY = DirectoryKind()
PATH_ONLY = PathOnlyKind()
