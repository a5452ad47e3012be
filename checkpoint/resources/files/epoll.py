"""epoll(7): the interest list.

An entry is a pair (number at the time of EPOLL_CTL_ADD, file description), the events and the user's
data. The description is found by kcmp(KCMP_EPOLL_TFD), for the number may have been closed or reused
meanwhile. Restore adds each entry under its old number from a thread of snap's that has a descriptor
table of its own, so that any number is free; to the kernel it makes no difference which process adds.

An edge-triggered entry (EPOLLET) that is added reports what is ready, although the job may have been told before. Where
the instance had nothing to report at the point, that report is taken away again. An entry that watches something from
outside the job may have news; it is armed anew and reports if it is ready: better twice than never. So may the end of a
pipe whose other side has gone be reported twice: a child that snap is just starting can hold that side a moment longer.

Refused: an entry whose description no process of the job has any more under any number.
"""

from __future__ import annotations

import fcntl
import os
import select
from collections.abc import Callable, Sequence
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


_EDGE, _ONE_SHOT = 1 << 31, 1 << 30
"""EPOLLET, EPOLLONESHOT."""


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
        if any(entry.events & _EDGE for entry in description.epoll.entries):
            with job.borrow(seen) as fd:
                description.epoll.quiet = not _readable(fd)

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
        _for_each(opening, fd, entries, descriptors.epoll_add)

    def quieten(self, opening: Opening, description: files_pb2.Description, fd: int) -> None:
        """Last pass, when everything that may wake it has its contents: forget what the job was told before the point."""
        if not description.epoll.quiet or not _readable(fd):
            return
        entries = list(description.epoll.entries)
        with select.epoll.fromfd(os.dup(fd)) as instance:
            instance.poll(0, len(entries))
        again = [
            entry
            for entry in entries
            if entry.events & _ONE_SHOT or (entry.events & _EDGE and not _is_inside(opening, entry))
        ]
        if again:
            _for_each(opening, fd, again, descriptors.epoll_modify)


def _readable(fd: int) -> bool:
    state = select.poll()
    state.register(fd, select.POLLIN)
    return bool(state.poll(0))


def _is_inside(opening: Opening, entry: files_pb2.EpollEntry) -> bool:
    """Whether nobody but the job makes what an entry watches ready."""
    target = opening.descriptions[entry.target_description]
    if target.HasField("pipe"):
        buffer = opening.pipes[target.pipe.id]
        return not buffer.is_fifo and not buffer.holders
    return target.HasField("eventfd") or target.HasField("unix")


def _for_each(
    opening: Opening,
    fd: int,
    entries: Sequence[files_pb2.EpollEntry],
    call: Callable[[int, int, int, int], None],
) -> None:
    """Call with (instance, number, events, data) for each entry, each target under the number that the entry is known by."""
    highest = max([fd, opening.highest_local, *(entry.fd for entry in entries)])
    targets = [opening.fds[entry.target_description] for entry in entries]

    def work() -> None:
        high = _above(fd, highest)
        copies = [_above(target, highest) for target in targets]
        for entry, target in zip(entries, copies, strict=True):
            os.dup2(target, entry.fd, inheritable=False)
            call(high, entry.fd, entry.events, entry.data)

    try:
        descriptors.with_private_table(work)
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
