"""io_uring, as libuv uses it: a ring for nothing but batches of epoll_ctl, which are done as soon as they are handed over.

Node, from 24 on, and uvloop have one in each event loop. State: both queues with what stands in them and their counters, which go round; a
ring of the same size is made, does as many empty requests as bring its counters to the same places, and gets the
content. What is mapped of it: memory/rings.py.

Refused: any other ring, for nothing shows what is registered with it or under way: of another size than libuv's, one that the
kernel polls (SQPOLL), with registered files or buffers, one that was used for anything but epoll_ctl, or for one task
alone, and one with a request under way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from checkpoint.kernel import uring
from checkpoint.model.vma import IO_URING_HINT
from checkpoint.resources.files import kind
from checkpoint.resources.memory import rings
from snapshotter.base.errors import Finding, RestoreConflictError, UnsupportedError

if TYPE_CHECKING:
    from checkpoint.resources.files.dumping import FilesDump
    from checkpoint.resources.files.kind import Seen
    from checkpoint.resources.files.opening import Opening
    from images import files_pb2

_LIBUV = {"SqMask": 0xFF, "CqMask": 0x1FF, "SqThread": -1, "UserFiles": 0, "UserBufs": 0}
_COUNTERS = ("SqHead", "SqTail", "CachedSqHead", "CqHead", "CqTail", "CachedCqTail")
_MODULUS = 1 << 32


class UringKind(kind.Kind):
    field = "uring"

    def claims(self, seen: Seen) -> bool:
        return seen.anonymous(b"io_uring")

    def refusal(self, seen: Seen) -> Finding | None:
        shown = {name: _number(seen, name) for name in _LIBUV}
        if shown == _LIBUV:
            return None
        return Finding(
            seen.pid, seen.where, "is an io_uring instance that is not as libuv has them", IO_URING_HINT
        )

    def dump(self, job: FilesDump, seen: Seen, description: files_pb2.Description) -> None:
        counters = {name: _number(seen, name) for name in _COUNTERS}
        under_way = counters["CachedSqHead"] != counters["CachedCqTail"] or any(
            name.startswith("op=") for name in seen.info.extra
        )
        if under_way or any(value < 0 for value in counters.values()):
            raise _refused(seen, "has requests under way", "take the point a moment later")
        image = description.uring
        image.ino = seen.stat.st_ino
        image.sq_entries, image.cq_entries = _LIBUV["SqMask"] + 1, _LIBUV["CqMask"] + 1
        try:
            layout = uring.layout_of(image.sq_entries, image.cq_entries)
            with job.borrow(seen) as fd, uring.mapped(fd, layout) as areas:
                if not uring.is_for_anybody(fd):
                    raise _refused(seen, "can be used by one task alone", IO_URING_HINT)
                image.sqes = areas.sqes[:]
                end = layout.cqes + layout.cq_entries * uring.CQE_BYTES
                image.cqes = areas.queues[layout.cqes : end]
        except (OSError, ValueError) as error:
            raise _refused(seen, f"cannot be looked into: {error}", IO_URING_HINT) from error
        sqes = [image.sqes[at : at + uring.SQE_BYTES] for at in range(0, len(image.sqes), uring.SQE_BYTES)]
        if any(sqe[0] != uring.EPOLL_CTL for sqe in sqes if any(sqe)):
            raise _refused(seen, "is used for more than epoll_ctl", IO_URING_HINT)
        image.sq_head, image.sq_tail = counters["SqHead"], counters["SqTail"]
        image.cq_head, image.cq_tail = counters["CqHead"], counters["CqTail"]

    def check(self, opening: Opening, description: files_pb2.Description) -> None:
        image = description.uring
        try:
            uring.layout_of(image.sq_entries, image.cq_entries)
        except OSError as error:
            raise RestoreConflictError(
                f"the job has an io_uring instance, and here none can be made: {error.strerror}",
                where="io_uring",
                hint="sysctl kernel.io_uring_disabled=0",
            ) from error

    def open(self, opening: Opening, description: files_pb2.Description) -> int:
        image = description.uring
        fd, layout = uring.setup(image.sq_entries, image.cq_entries)
        with uring.mapped(fd, layout) as areas:
            # Whoever has these rings reads the counters in them, so that only the places they lead to matter.
            count = image.sq_head % max(image.sq_entries, image.cq_entries)
            uring.advance(fd, areas, count)
            areas.sqes[:] = image.sqes
            areas.queues[layout.cqes : layout.cqes + len(image.cqes)] = image.cqes
            areas.write(layout.sq_tail, count + (image.sq_tail - image.sq_head) % _MODULUS)
            areas.write(layout.cq_head, count - (image.cq_tail - image.cq_head) % _MODULUS)
        rings.put(opening.ctx, image.ino, fd)
        return fd


def _number(seen: Seen, name: str) -> int:
    """A line of fdinfo; -2 where there is none."""
    try:
        return int(seen.info.extra.get(name, ""), 0)
    except ValueError:
        return -2


def _refused(seen: Seen, what: str, hint: str) -> UnsupportedError:
    what = f"is an io_uring instance that {what}"
    finding = Finding(seen.pid, seen.where, what, hint)
    return UnsupportedError(what, where=f"task {seen.pid}, {seen.where}", hint=hint, findings=(finding,))


KIND = UringKind()
