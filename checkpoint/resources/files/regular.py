"""Regular files: by path where they have one, from the store where they have none.

State: the file, the offset, the flags. A file with a path is reopened there and must still be the same
inode; its content is the disk's own, so a file that changed since the dump is given to the job as it
is now, and a warning names it. A file without a path (deleted, O_TMPFILE, memfd) has its content in a
Shmem image, which the memory resource reads and makes again (also when it is mapped). So has a file of a tmpfs
that the job maps shared (POSIX shared memory).

Refused: files of /proc, /sys and other file systems whose "content" is the kernel's own state; a file
whose name was deleted while other hard links remain (the path is gone and the content must stay
shared with those links); leases.
"""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

from checkpoint.kernel import descriptors
from checkpoint.resources import paths
from checkpoint.resources.files import kind
from checkpoint.resources.memory import shmem
from snapshotter.base.errors import Finding

if TYPE_CHECKING:
    from checkpoint.resources.files.dumping import FilesDump
    from checkpoint.resources.files.kind import Seen
    from checkpoint.resources.files.opening import Opening
    from images import files_pb2

_PSEUDO = {
    0x9FA0: "proc",
    0x62656572: "sysfs",
    0x27E0EB: "cgroup",
    0x63677270: "cgroup2",
    0x64626720: "debugfs",
    0x74726163: "tracefs",
    0xCAFE4A11: "bpf",
    0x73636673: "securityfs",
    0x62656570: "configfs",
    0x19800202: "mqueue",
    0x6E736673: "nsfs",
    0x65735546: "fuse",
}


class RegularKind(kind.Kind):
    field = "regular"

    def claims(self, seen: Seen) -> bool:
        return stat.S_ISREG(seen.stat.st_mode) and not seen.path_only

    def refusal(self, seen: Seen) -> Finding | None:
        if any(lock.kind == "LEASE" for lock in seen.info.locks):
            return Finding(seen.pid, seen.where, "has a lease (F_SETLEASE)", "release it before the dump")
        system = descriptors.filesystem_type(f"/proc/{seen.pid}/fd/{seen.fd}")
        name = _PSEUDO.get(system)
        if name is not None and name != "fuse" and not _harmless(seen):
            return Finding(
                seen.pid,
                seen.where,
                f"is a file of {name}, which holds state of the kernel",
                "close it first",
            )
        if seen.stat.st_nlink == 0 or name is not None:
            return None
        if seen.link.endswith(kind.DELETED) and not paths.leads_to(
            seen.link, seen.stat.st_dev, seen.stat.st_ino
        ):
            return Finding(
                seen.pid,
                seen.where,
                "its name was deleted while other hard links to it remain",
                "give it its name back (ln), or close it",
            )
        if not paths.leads_to(seen.path, seen.stat.st_dev, seen.stat.st_ino) and not paths.leads_to(
            seen.link, seen.stat.st_dev, seen.stat.st_ino
        ):
            return Finding(
                seen.pid,
                seen.where,
                "its path does not lead to it from here (another mount namespace, root, or a mount over it)",
                "run snap in the job's namespaces",
            )
        return None

    def dump(self, job: FilesDump, seen: Seen, description: files_pb2.Description) -> None:
        identity = kind.identity_of(seen)
        if not identity.deleted and paths.leads_to(seen.link, seen.stat.st_dev, seen.stat.st_ino):
            identity.path = seen.link  # a name may itself end with " (deleted)"
        description.regular.identity.CopyFrom(identity)
        if identity.deleted:
            description.regular.shmem = shmem.for_fd(job.ctx, seen.pid, seen.fd, seen.stat)
        else:  # shm_open: the memory was read before the descriptors
            description.regular.shmem = shmem.registered(job.ctx, seen.stat.st_dev, seen.stat.st_ino)

    def check(self, opening: Opening, description: files_pb2.Description) -> None:
        regular = description.regular
        if regular.shmem:
            return
        os.close(paths.locate(regular.identity, same_inode=not _is_pseudo(regular.identity.path)))

    def open(self, opening: Opening, description: files_pb2.Description) -> int:
        regular = description.regular
        where = paths.shown(regular.identity.path)
        if regular.shmem:
            source = shmem.open_shared(opening.ctx, regular.shmem)
            fd = paths.reopen(source, description.flags, where)
        else:
            pseudo = _is_pseudo(regular.identity.path)
            fd = paths.open_identity(regular.identity, description.flags, same_inode=not pseudo)
            now = os.fstat(fd)
            was = (regular.identity.size_bytes, regular.identity.mtime_ns)
            if not pseudo and (now.st_size, now.st_mtime_ns) != was:
                opening.warn(
                    f"{where} changed since the point was taken ({regular.identity.size_bytes} bytes then, "
                    f"{now.st_size} now); the job gets it as it is now, at its old offset {description.offset}"
                )
        if description.offset:
            os.lseek(fd, description.offset, os.SEEK_SET)
        return fd


def _is_pseudo(path: bytes) -> bool:
    return path.startswith((b"/proc/", b"/sys/"))


def _harmless(seen: Seen) -> bool:
    """Files of /proc and /sys that are only read, and not about one process: the same after a restore."""
    parts = seen.link.split(b"/")
    return (
        seen.info.access == os.O_RDONLY
        and _is_pseudo(seen.link)
        and not seen.link.endswith(kind.DELETED)
        and not parts[2].isdigit()
    )


KIND = RegularKind()
