"""What every kind of descriptor has in common: the interface, and what is seen of one descriptor.

Owns the base class that the kind modules implement (one module per kind, dump and restore side by
side), `Seen` (one descriptor of one process as /proc shows it) and `identity_of`. The table of kinds
is in kinds.py; who calls what, and when, in dumping.py and opening.py.
"""

from __future__ import annotations

import os
import stat
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from checkpoint.kernel import distant
from checkpoint.kernel.descriptors import shown
from checkpoint.kernel.fdinfo import O_PATH, FdInfo, parse_fdinfo
from checkpoint.resources import proof
from images import common_pb2
from snapshotter.base.errors import Finding

if TYPE_CHECKING:
    from checkpoint.resources.files.dumping import FilesDump
    from checkpoint.resources.files.looking import Looking
    from checkpoint.resources.files.opening import Opening
    from images import files_pb2

DELETED = b" (deleted)"
_ONE_READ_BYTES = 3500
"""A file of /proc gives whole records up to a page per read: less than this was all of it."""


@dataclass(frozen=True, slots=True)
class Seen:
    """One descriptor of one process. `pid` may be snap's own: a descriptor found in a socket's queue."""

    pid: int
    fd: int
    link: bytes
    stat: os.stat_result
    info: FdInfo
    systems: dict[int, int] | None = None
    """st_dev -> type of the file system, of what the frozen job has open: asked once for each."""

    @property
    def where(self) -> str:
        """For messages: the descriptor and what it leads to."""
        return f"descriptor {self.fd} ({self.link.decode('utf-8', 'replace')})"

    @property
    def format(self) -> int:
        """The type bits of st_mode."""
        return stat.S_IFMT(self.stat.st_mode)

    @property
    def path_only(self) -> bool:
        return bool(self.info.flags & O_PATH)

    @property
    def path(self) -> bytes:
        """The link without the kernel's " (deleted)"."""
        return self.link.removesuffix(DELETED)

    def anonymous(self, name: bytes) -> bool:
        """Whether it is the anonymous inode `name`."""
        return self.link in {b"anon_inode:[" + name + b"]", b"anon_inode:" + name}


def see(pid: int, fd: int) -> Seen | None:
    """Reads one descriptor; None when it was closed meanwhile (only possible while the job runs)."""
    base = f"/proc/{pid}/fd/{fd}"
    try:
        link = os.readlink(os.fsencode(base))
        state = distant.stat(base, link)
        data = _read(f"/proc/{pid}/fdinfo/{fd}")
    except (FileNotFoundError, ProcessLookupError):
        return None
    return Seen(pid, fd, link, state, parse_fdinfo(data))


def see_all(pid: int, systems: dict[int, int]) -> list[Seen | None]:
    """All descriptors of a frozen task, read in one go; None: one was closed meanwhile, which cannot be."""
    found: list[Seen | None] = []
    for one in shown(pid, descriptors(pid), distant.mounts()):
        if one is None:
            found.append(None)
            continue
        state = one.stat
        if state is None:  # its file server may not answer: another process asks
            state = distant.stat(f"/proc/{pid}/fd/{one.fd}", one.link)
        found.append(Seen(pid, one.fd, one.link, state, parse_fdinfo(one.info), systems))
    return found


def _read(path: str) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        data = os.read(fd, 1 << 16)
        if len(data) < _ONE_READ_BYTES:
            return data
        while more := os.read(fd, 1 << 16):
            data += more
        return data
    finally:
        os.close(fd)


def started_ns(start_time_ticks: int) -> int:
    """When a process was started, as files' times count; a second early, for start times are cut off."""
    ago = time.clock_gettime(time.CLOCK_BOOTTIME) - start_time_ticks / os.sysconf("SC_CLK_TCK")
    return time.time_ns() - int((ago + 1) * 1e9)


def descriptors(pid: int) -> list[int]:
    """The numbers in the descriptor table of a task, sorted. Empty for a zombie."""
    try:
        return sorted(int(name) for name in os.listdir(f"/proc/{pid}/fd"))
    except FileNotFoundError:
        return []


def identity_of(seen: Seen) -> common_pb2.FileIdentity:
    """The file behind a descriptor, as the restore will look for it."""
    deleted = seen.stat.st_nlink == 0
    identity = common_pb2.FileIdentity(
        path=seen.path,
        dev=seen.stat.st_dev,
        ino=seen.stat.st_ino,
        mode=seen.stat.st_mode,
        size_bytes=seen.stat.st_size,
        mtime_ns=seen.stat.st_mtime_ns,
        deleted=deleted,
        uid=seen.stat.st_uid,
        gid=seen.stat.st_gid,
    )
    if not deleted:
        proof.record(identity, seen.stat, f"/proc/{seen.pid}/fd/{seen.fd}")
    return identity


class Kind:
    """One kind of descriptor. Subclasses are stateless; the state of a run is in FilesDump or Opening."""

    field: str
    """The member of Description's oneof that it fills."""

    def claims(self, seen: Seen) -> bool:
        """Whether this descriptor is of this kind."""
        raise NotImplementedError

    def refusal(self, seen: Seen) -> Finding | None:
        """Why this descriptor cannot be dumped, if so. Reads /proc at most; the job may be running."""
        return None

    def look(self, seen: Seen, looking: Looking) -> Finding | None:
        """The same for what takes all of the job to judge (looking.py asks some kinds only)."""
        return None

    def dump(self, job: FilesDump, seen: Seen, description: files_pb2.Description) -> None:
        """Fill in the description. The job is frozen."""
        raise NotImplementedError

    def finish(self, job: FilesDump, seen: Seen, description: files_pb2.Description) -> None:
        """Second pass, when all descriptors of the job are known: contents, targets."""

    def check(self, opening: Opening, description: files_pb2.Description) -> None:
        """Before anything is touched: raise RestoreConflictError if it cannot be opened again."""

    def open(self, opening: Opening, description: files_pb2.Description) -> int:
        """Make the description in snap; returns a descriptor of it (close-on-exec)."""
        raise NotImplementedError

    def fill(self, opening: Opening, description: files_pb2.Description, fd: int) -> None:
        """Second pass, when every description is open: queued data, interest lists."""
