"""Regular files: by path where they have one, from the store where they have none.

State: the file, the offset, the flags. A file with a path is reopened there and must still be the same
inode; its content is the disk's own, so a file that changed since the dump is given to the job as it
is now, and a warning names it. A small one in /tmp or its like that the job writes, or that is younger than the job, is made again
when it is gone: such files are removed when they are done with (memory/named.py). A file without a path (deleted, O_TMPFILE, memfd) has its content in a
Shmem image, which the memory resource reads and makes again (also when it is mapped). So has a file of a tmpfs
that the job maps shared (POSIX shared memory).

A file whose name was deleted while other hard links to it remain is the disk's own too: it is found again by another
name, or by its file handle. Files of /proc and /sys: pseudo.py.

Refused: such a file on a file system without handles; a file that no path leads to; leases.
"""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

from checkpoint.kernel import descriptors, distant
from checkpoint.resources import authority, paths
from checkpoint.resources.authority import Found
from checkpoint.resources.files import fleeting, kind, pseudo
from checkpoint.resources.memory import named, shmem
from images import mm_pb2
from snapshotter.base.errors import Finding, RestoreConflictError, SnapshotterError

if TYPE_CHECKING:
    from checkpoint.resources.files.dumping import FilesDump
    from checkpoint.resources.files.kind import Seen
    from checkpoint.resources.files.opening import Opening
    from images import files_pb2


class RegularKind(kind.Kind):
    field = "regular"

    def claims(self, seen: Seen) -> bool:
        return stat.S_ISREG(seen.stat.st_mode) and not seen.path_only

    def refusal(self, seen: Seen) -> Finding | None:
        if any(lock.breaking for lock in seen.info.locks):
            what = "has a lease (F_SETLEASE) that somebody waits for"
            return Finding(seen.pid, seen.where, what, "take the point when it has been given up")
        if system := pseudo.system_of(seen):
            return pseudo.refusal(seen, system)
        if seen.link.startswith(b"/secretmem"):
            what = "is secret memory (memfd_secret), which nobody but its process can read"
            return Finding(seen.pid, seen.where, what, "close it first")
        if shmem.is_huge_memfd(seen.stat, seen.link):
            return Finding(seen.pid, seen.where, shmem.HUGE_MEMFD, shmem.HUGE_MEMFD_HINT)
        if seen.stat.st_nlink == 0 or _leads(seen):
            return None
        if seen.link.endswith(kind.DELETED):
            if _handle_of(seen) is not None:
                return None
            return Finding(
                seen.pid,
                seen.where,
                "its name was deleted while other hard links to it remain",
                "give it its name back (ln), or close it",
            )
        if paths.is_closed(seen.link):
            return Finding(
                seen.pid,
                seen.where,
                "snap may not look along its path (permission denied)",
                "run as root",
            )
        return Finding(
            seen.pid,
            seen.where,
            "its path does not lead to it from here (another mount namespace, root, or a mount over it)",
            "run snap in the job's namespaces",
        )

    def dump(self, job: FilesDump, seen: Seen, description: files_pb2.Description) -> None:
        identity = kind.identity_of(seen)
        regular = description.regular
        if system := pseudo.system_of(seen):
            regular.proc.CopyFrom(
                pseudo.namespace_entry(seen) if system == pseudo.NSFS_MAGIC else pseudo.entry_of(seen.link)
            )
            identity.deleted = False
        elif not identity.deleted:
            if paths.leads_to(seen.link, seen.stat.st_dev, seen.stat.st_ino):
                identity.path = seen.link  # a name may itself end with " (deleted)"
            elif not _leads(seen) and (handle := _handle_of(seen)) is not None:
                regular.handle_type, regular.handle, identity.path = handle
        regular.identity.CopyFrom(identity)
        if identity.deleted:
            regular.shmem = shmem.for_fd(job.ctx, seen.pid, seen.fd, seen.stat)
        else:  # shm_open: the memory was read before the descriptors
            regular.shmem = shmem.registered(job.ctx, seen.stat.st_dev, seen.stat.st_ino)
            if not regular.shmem and not regular.HasField("proc"):
                regular.kept = _kept(job, seen, identity.path)
                if not regular.kept:
                    path, birth_ns, began_ns = identity.path, identity.birth_ns, job.began_ns
                    # A warning can wait for the thaw.
                    job.ctx.later.append(lambda: fleeting.warn(job.ctx, seen, path, birth_ns, began_ns))

    def check(self, opening: Opening, description: files_pb2.Description) -> None:
        regular = description.regular
        if regular.HasField("proc") or pseudo.is_pseudo(regular.identity.path):
            pseudo.check(opening.ctx, regular.identity, regular.proc, description.flags)
        elif not regular.shmem:
            found = _locate(opening, description)
            if found is not None:
                opening.keep(description, found)
                _warn_if_changed(opening, description, os.fstat(found.fd))
            else:
                path = paths.shown(regular.identity.path)
                opening.warn(f"{path} is gone; it is made again, with the content that it had at the point")

    def open(self, opening: Opening, description: files_pb2.Description) -> int:
        regular = description.regular
        where = paths.shown(regular.identity.path)
        if regular.HasField("proc") or pseudo.is_pseudo(regular.identity.path):
            fd = pseudo.reopen(opening.ctx, regular.identity, regular.proc, description.flags)
        elif regular.shmem:
            fd = shmem.open_description(opening.ctx, regular.shmem, description.flags)
        elif regular.kept and _is_gone(opening, description):
            fd = shmem.open_description(opening.ctx, regular.kept, description.flags)
        else:
            fd = opening.open_judged(description, where)
            _warn_if_changed(opening, description, os.fstat(fd))
        if description.offset:
            os.lseek(fd, description.offset, os.SEEK_SET)
        return fd

    def settle(self, opening: Opening, description: files_pb2.Description) -> None:
        """Memory with content of the point's has been written just now: the time of its last change, as it was."""
        regular, fd = description.regular, opening.fds[description.id]
        if not regular.shmem and not shmem.is_made(opening.ctx, regular.kept):
            return
        try:
            os.utime(fd, ns=(os.fstat(fd).st_atime_ns, regular.identity.mtime_ns))
        except OSError as error:
            opening.warn(
                f"{paths.shown(regular.identity.path)}: the time of its last change is not kept ({error.strerror})"
            )


def _warn_if_changed(opening: Opening, description: files_pb2.Description, now: os.stat_result) -> None:
    """Once, at the check already: a dry run says it too. A living job may change the file again before it is killed."""
    identity = description.regular.identity
    same = (now.st_size, now.st_mtime_ns) == (identity.size_bytes, identity.mtime_ns)
    if same or description.id in opening.changed:
        return
    opening.changed.add(description.id)
    appends = description.flags & os.O_APPEND and description.flags & os.O_ACCMODE != os.O_RDONLY
    at = "and goes on at its end" if appends else f"at its old offset {description.offset}"
    opening.warn(
        f"{paths.shown(identity.path)} changed since the point was taken ({identity.size_bytes} bytes then, "
        f"{now.st_size} now); the job gets it as it is now, {at}"
    )


def _kept(job: FilesDump, seen: Seen, path: bytes) -> str:
    """Image name of the content of a file that may be a temporary one of the job's; else ""."""
    if known := shmem.kept(job.ctx, seen.stat.st_dev, seen.stat.st_ino):
        return known
    writes = seen.info.flags & os.O_ACCMODE != os.O_RDONLY
    if not writes and seen.stat.st_ctime_ns < job.began_ns:
        return ""  # nothing of its own making
    if any(lock.kind == "LEASE" for lock in seen.info.locks):
        return ""  # which opening it would break
    if not named.is_temporary(path, seen.stat) or shmem.keeps_enough(job.ctx, seen.stat.st_size):
        return ""
    opens = f"/proc/{seen.pid}/fd/{seen.fd}"
    try:
        return shmem.register(job.ctx, opens, seen.stat, path, role=mm_pb2.Shmem.KEPT).image_name
    except SnapshotterError:  # not readable for snap's user
        return ""


def _is_gone(opening: Opening, description: files_pb2.Description) -> bool:
    """Whether its content is to be made again: it was gone at the check, or is since."""
    if shmem.is_made(opening.ctx, description.regular.kept) or description.id not in opening.judged:
        return True
    return not os.fstat(opening.judged[description.id].fd).st_nlink


def _locate(opening: Opening, description: files_pb2.Description) -> Found | None:
    """The file, or what a rollback has made in its place; None: it is gone, and can be made again.

    Raises:
        RestoreConflictError: it is gone for good, another has its path, or it is closed to the job.
    """
    regular, ctx = description.regular, opening.ctx
    who, access = ctx.holders.of_description(description.id), authority.access_of(description.flags)
    try:
        fd, by_path = _find(regular)
    except RestoreConflictError as conflict:
        if not regular.kept:
            raise
        return named.find_kept(ctx, regular.kept, conflict, regular.identity, who, access)
    return authority.judged(ctx, fd, regular.identity, who, access, along_path=by_path)


def _leads(seen: Seen) -> bool:
    """Whether its link leads to it, or would without the kernel's " (deleted)"."""
    return any(paths.leads_to(path, seen.stat.st_dev, seen.stat.st_ino) for path in {seen.link, seen.path})


def _handle_of(seen: Seen) -> tuple[int, bytes, bytes] | None:
    """(type, handle, path) of a file that has other names: a path that leads to it if the kernel knows one, else the one
    that it was opened by. None where the file system has no handles.
    """
    if distant.is_distant(seen.path):
        return None  # the server decides what its handles mean
    try:
        handle_type, handle = descriptors.file_handle(b"/proc/%d/fd/%d" % (seen.pid, seen.fd))
        fd = paths.by_handle(os.path.dirname(seen.path), handle_type, handle)
    except OSError:
        return None
    try:
        other = os.readlink(b"/proc/self/fd/%d" % fd)
        if not os.path.samestat(os.fstat(fd), seen.stat):
            return None
    finally:
        os.close(fd)
    return (
        handle_type,
        handle,
        other if paths.leads_to(other, seen.stat.st_dev, seen.stat.st_ino) else seen.path,
    )


def _find(regular: files_pb2.RegularFile) -> tuple[int, bool]:
    """(an O_PATH descriptor of the file, whether its path led there); of one whose name was deleted by its handle too."""
    identity = regular.identity
    try:
        return paths.locate(identity), True
    except RestoreConflictError:
        if not regular.handle:
            raise
        try:
            fd = paths.by_handle(os.path.dirname(identity.path), regular.handle_type, regular.handle)
        except OSError:
            fd = -1
        if fd < 0:
            raise
        now = os.fstat(fd)
        if (now.st_dev, now.st_ino, now.st_mode >> 12) != (identity.dev, identity.ino, identity.mode >> 12):
            os.close(fd)
            raise
        return fd, False


KIND = RegularKind()
