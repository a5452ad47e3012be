"""pidfd_open(2): which process. It must be one of the job, which exists again when descriptors are opened.

A pidfd of a process that was reaped stays one: restore makes one of a child that has ended.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from checkpoint.resources.files import kind
from snapshotter.base.errors import Finding, UnsupportedError, wrap_os_error

if TYPE_CHECKING:
    from checkpoint.resources.files.dumping import FilesDump
    from checkpoint.resources.files.kind import Seen
    from checkpoint.resources.files.opening import Opening
    from images import files_pb2


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

    def dump(self, job: FilesDump, seen: Seen, description: files_pb2.Description) -> None:
        pid = seen.info.pid or -1
        if pid < 0:
            description.pidfd.dead = True
        elif pid in job.ctx.processes or os.path.isdir(f"/proc/{seen.pid}/task/{pid}"):
            description.pidfd.pid = pid
        else:
            finding = Finding(
                seen.pid,
                seen.where,
                f"is a pidfd of process {pid}, which is not part of the job",
                "take the point of a parent of both, or close it first",
            )
            raise UnsupportedError(finding.what, where=finding.where, hint=finding.hint, findings=(finding,))

    def open(self, opening: Opening, description: files_pb2.Description) -> int:
        flags = description.flags & (os.O_NONBLOCK | os.O_EXCL)
        if description.pidfd.dead:
            return _of_the_dead(flags)
        try:
            return os.pidfd_open(description.pidfd.pid, flags)
        except OSError as error:
            raise wrap_os_error(error, f"cannot open a pidfd of process {description.pidfd.pid}") from error


def _of_the_dead(flags: int) -> int:
    child = os.posix_spawn("/proc/self/exe", ["true", "-c", ""], {})
    fd = os.pidfd_open(child, flags & os.O_NONBLOCK)
    os.waitpid(child, 0)
    return fd


KIND = PidfdKind()
