"""eventfd(2): a counter, and whether it counts down one by one (EFD_SEMAPHORE)."""

from __future__ import annotations

import os
import struct
from typing import TYPE_CHECKING

from checkpoint.resources.files import kind
from snapshotter.base.errors import Finding

if TYPE_CHECKING:
    from checkpoint.resources.files.dumping import FilesDump
    from checkpoint.resources.files.kind import Seen
    from checkpoint.resources.files.opening import Opening
    from images import files_pb2


class EventfdKind(kind.Kind):
    field = "eventfd"

    def claims(self, seen: Seen) -> bool:
        return seen.anonymous(b"eventfd")

    def refusal(self, seen: Seen) -> Finding | None:
        if seen.info.eventfd_count is None:
            return Finding(seen.pid, seen.where, "the kernel does not show this eventfd's counter")
        return None

    def dump(self, job: FilesDump, seen: Seen, description: files_pb2.Description) -> None:
        description.eventfd.count = seen.info.eventfd_count or 0
        description.eventfd.semaphore = bool(seen.info.eventfd_semaphore)
        if seen.info.eventfd_semaphore is None:
            job.ctx.warn(
                f"{seen.where}: this kernel does not tell whether it is a semaphore; taken as a counter"
            )

    def open(self, opening: Opening, description: files_pb2.Description) -> int:
        flags = os.EFD_CLOEXEC | os.EFD_NONBLOCK
        if description.eventfd.semaphore:
            flags |= os.EFD_SEMAPHORE
        fd = os.eventfd(0, flags)
        if description.eventfd.count:
            os.write(fd, struct.pack("=Q", description.eventfd.count))
        return fd


KIND = EventfdKind()
