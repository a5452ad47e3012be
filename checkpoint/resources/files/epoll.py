"""epoll(7): the interest list.

An entry is a pair (number at the time of EPOLL_CTL_ADD, file description), the events and the user's
data. The description is found by kcmp(KCMP_EPOLL_TFD), for the number may have been closed or reused
meanwhile. Restore adds each entry under its old number from a thread of snap's that has a descriptor
table of its own, so that any number is free; to the kernel it makes no difference which process adds.

Refused: an entry whose description no process of the job has any more under any number.
"""

from __future__ import annotations

import fcntl
import os
import select
from typing import TYPE_CHECKING

from checkpoint.kernel import descriptors
from checkpoint.resources.files import kind
from snapshotter.base.errors import Finding, SnapshotterError, UnsupportedError

if TYPE_CHECKING:
    from checkpoint.resources.files.dumping import FilesDump
    from checkpoint.resources.files.kind import Seen
    from checkpoint.resources.files.looking import Looking
    from checkpoint.resources.files.opening import Opening
    from images import files_pb2


class EpollKind(kind.Kind):
    field = "epoll"

    def claims(self, seen: Seen) -> bool:
        return seen.anonymous(b"eventpoll")

    def look(self, seen: Seen, looking: Looking) -> Finding | None:
        count: dict[int, int] = {}
        for target in seen.info.epoll:
            nth = count.get(target.fd, 0)
            count[target.fd] = nth + 1
            if not looking.may_have_epoll_target(seen, target, nth):
                return _lost(seen, target.fd)
        return None

    def dump(self, job: FilesDump, seen: Seen, description: files_pb2.Description) -> None:
        description.epoll.SetInParent()

    def finish(self, job: FilesDump, seen: Seen, description: files_pb2.Description) -> None:
        count: dict[int, int] = {}
        for target in seen.info.epoll:
            nth = count.get(target.fd, 0)
            count[target.fd] = nth + 1
            found = job.find_epoll_target(seen, target, nth)
            if found is None:
                finding = _lost(seen, target.fd)
                raise UnsupportedError(
                    finding.what, where=finding.where, hint=finding.hint, findings=(finding,)
                )
            description.epoll.entries.add(
                fd=target.fd,
                events=target.events,
                data=target.data,
                target_description=found,
                target_known=True,
            )

    def open(self, opening: Opening, description: files_pb2.Description) -> int:
        instance = select.epoll(flags=select.EPOLL_CLOEXEC)
        try:
            return os.dup(instance.fileno())
        finally:
            instance.close()

    def fill(self, opening: Opening, description: files_pb2.Description, fd: int) -> None:
        entries = list(description.epoll.entries)
        if not entries:
            return
        highest = max([fd, opening.highest_local, *(entry.fd for entry in entries)])
        targets = [opening.fds[entry.target_description] for entry in entries]

        def add_all() -> None:
            high = _above(fd, highest)
            copies = [_above(target, highest) for target in targets]
            for entry, target in zip(entries, copies, strict=True):
                os.dup2(target, entry.fd, inheritable=False)
                descriptors.epoll_add(high, entry.fd, entry.events, entry.data)

        try:
            descriptors.with_private_table(add_all)
        except OSError as error:
            raise SnapshotterError(
                f"cannot put {len(entries)} entries into an epoll instance again: {error.strerror}"
            ) from error


def _lost(seen: Seen, fd: int) -> Finding:
    what = f"watches something that no process of the job has open any more (added as descriptor {fd})"
    return Finding(seen.pid, seen.where, what, "remove it from the epoll instance first")


def _above(fd: int, minimum: int) -> int:
    """A duplicate with a number above `minimum`."""
    return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, minimum + 1)


KIND = EpollKind()
