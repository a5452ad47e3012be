"""Directories and O_PATH descriptors: reopened by path, same inode.

State: the place, and for a directory the getdents(2) position (a cookie of the file system, valid as
long as the directory is the same one). Refused: deleted directories, for nothing can lead there again.
"""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

from checkpoint.kernel.fdinfo import O_PATH
from checkpoint.resources import paths
from checkpoint.resources.files import kind
from snapshotter.base.errors import Finding

if TYPE_CHECKING:
    from checkpoint.resources.files.dumping import FilesDump
    from checkpoint.resources.files.kind import Seen
    from checkpoint.resources.files.opening import Opening
    from images import files_pb2


def _unreachable(seen: Seen) -> Finding | None:
    if paths.leads_to(seen.link, seen.stat.st_dev, seen.stat.st_ino) or seen.link.startswith(b"/proc/"):
        return None
    what = "was deleted" if seen.link.endswith(kind.DELETED) else "cannot be reached by its path from here"
    return Finding(seen.pid, seen.where, f"the {paths.type_name(seen.stat.st_mode)} {what}", "close it first")


class DirectoryKind(kind.Kind):
    field = "directory"

    def claims(self, seen: Seen) -> bool:
        return stat.S_ISDIR(seen.stat.st_mode) and not seen.path_only

    def refusal(self, seen: Seen) -> Finding | None:
        return _unreachable(seen)

    def dump(self, job: FilesDump, seen: Seen, description: files_pb2.Description) -> None:
        identity = kind.identity_of(seen)
        identity.path = seen.link
        description.directory.identity.CopyFrom(identity)

    def check(self, opening: Opening, description: files_pb2.Description) -> None:
        identity = description.directory.identity
        os.close(paths.locate(identity, same_inode=not identity.path.startswith(b"/proc/")))

    def open(self, opening: Opening, description: files_pb2.Description) -> int:
        identity = description.directory.identity
        fd = paths.open_identity(
            identity, description.flags, same_inode=not identity.path.startswith(b"/proc/")
        )
        if description.offset:
            os.lseek(fd, description.offset, os.SEEK_SET)
        return fd


class PathOnlyKind(kind.Kind):
    field = "path_only"

    def claims(self, seen: Seen) -> bool:
        return seen.path_only

    def refusal(self, seen: Seen) -> Finding | None:
        return _unreachable(seen)

    def dump(self, job: FilesDump, seen: Seen, description: files_pb2.Description) -> None:
        identity = kind.identity_of(seen)
        identity.path = seen.link
        description.path_only.identity.CopyFrom(identity)

    def check(self, opening: Opening, description: files_pb2.Description) -> None:
        identity = description.path_only.identity
        os.close(paths.locate(identity, same_inode=not identity.path.startswith(b"/proc/")))

    def open(self, opening: Opening, description: files_pb2.Description) -> int:
        identity = description.path_only.identity
        fd = paths.locate(identity, same_inode=not identity.path.startswith(b"/proc/"))
        if description.flags & (O_PATH | os.O_DIRECTORY) == O_PATH:
            return fd
        try:
            return os.open(f"/proc/self/fd/{fd}", O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        finally:
            os.close(fd)


DIRECTORY = DirectoryKind()
PATH_ONLY = PathOnlyKind()
