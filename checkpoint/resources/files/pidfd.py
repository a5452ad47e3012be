"""pidfd_open(2): which process. It must be one of the job, which exists again when descriptors are opened.

A pidfd of a process that was reaped stays one: restore makes one of a child that ends in the same way. Several of one process
(the same inode) are of one child again.
"""

from __future__ import annotations

import fcntl
import os
import struct
from typing import TYPE_CHECKING

from checkpoint.resources.files import kind
from snapshotter.base.errors import Finding, UnsupportedError, wrap_os_error

if TYPE_CHECKING:
    from checkpoint.resources.files.dumping import FilesDump
    from checkpoint.resources.files.kind import Seen
    from checkpoint.resources.files.looking import Looking
    from checkpoint.resources.files.opening import Opening
    from images import files_pb2

_GET_INFO, _INFO_EXIT = 0xC040FF0B, 1 << 3
_INFO = struct.Struct("=QQ11Ii")
"""PIDFD_GET_INFO of a struct pidfd_info as it was first: mask, cgroup, eleven ids, exit status."""
_DIE = (
    "import os,resource,signal;resource.setrlimit(resource.RLIMIT_CORE,(0,0));"
    "{0} in (9,19) or signal.signal({0},0);os.kill(os.getpid(),{0})"
)


class PidfdKind(kind.Kind):
    field = "pidfd"

    def claims(self, seen: Seen) -> bool:
        return seen.anonymous(b"pidfd") or seen.link.startswith(b"pidfd:")

    def refusal(self, seen: Seen) -> Finding | None:
        if seen.info.pid is None or seen.info.pid == 0:
            return Finding(
                seen.pid, seen.where, "is a pidfd of a process in another pid namespace", "close it first"
            )
        return None

    def look(self, seen: Seen, looking: Looking) -> Finding | None:
        pid = seen.info.pid or -1
        return None if pid < 0 or looking.has_task(seen, pid) else _outside(seen, pid)

    def dump(self, job: FilesDump, seen: Seen, description: files_pb2.Description) -> None:
        pid = seen.info.pid or -1
        if pid < 0:
            description.pidfd.dead = True
            description.pidfd.ino = seen.stat.st_ino
            with job.borrow(seen) as fd:
                status = _exit_status(fd)
            if status is not None:
                description.pidfd.has_exit_status, description.pidfd.exit_status = True, status
        elif pid in job.ctx.processes or os.path.isdir(f"/proc/{seen.pid}/task/{pid}"):
            description.pidfd.pid = pid
        else:
            finding = _outside(seen, pid)
            raise UnsupportedError(finding.what, where=finding.where, hint=finding.hint, findings=(finding,))

    def open(self, opening: Opening, description: files_pb2.Description) -> int:
        if description.pidfd.dead:
            if description.id not in opening.early:
                _of_the_dead(opening, description.pidfd)
            return opening.early.pop(description.id)
        try:
            return os.pidfd_open(description.pidfd.pid, description.flags & (os.O_NONBLOCK | os.O_EXCL))
        except OSError as error:
            raise wrap_os_error(error, f"cannot open a pidfd of process {description.pidfd.pid}") from error


def _outside(seen: Seen, pid: int) -> Finding:
    what = f"is a pidfd of process {pid}, which is not part of the job"
    return Finding(seen.pid, seen.where, what, "take the point of a parent of both, or close it first")


def _exit_status(fd: int) -> int | None:
    """How a process that was reaped has ended; None where the kernel cannot say (before Linux 6.15) or does not know."""
    info = bytearray(_INFO.pack(_INFO_EXIT, *[0] * 13))
    try:
        fcntl.ioctl(fd, _GET_INFO, info)
    except OSError:
        return None
    mask, *_, status = _INFO.unpack(info)
    return int(status) if mask & _INFO_EXIT else None


def _of_the_dead(opening: Opening, wanted: files_pb2.Pidfd) -> None:
    """Make all pidfds of one dead process, of a child that ends as it did."""
    signo, code = wanted.exit_status & 0x7F, wanted.exit_status >> 8 & 0xFF
    text = _DIE.format(signo) if signo else f"raise SystemExit({code})"
    child = os.posix_spawn("/proc/self/exe", ["python3", "-ISc", text], {})
    try:
        for description in opening.image.descriptions:
            pidfd = description.pidfd
            if description.HasField("pidfd") and pidfd.dead and pidfd.ino == wanted.ino:
                opening.early[description.id] = os.pidfd_open(child, description.flags & os.O_NONBLOCK)
    finally:
        os.waitpid(child, 0)


KIND = PidfdKind()
