"""signalfd(2): only a mask. The signals it reads are the reader's own, restored with the tasks."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from checkpoint.kernel import descriptors
from checkpoint.resources.files import kind
from snapshotter.base.errors import Finding

if TYPE_CHECKING:
    from checkpoint.resources.files.dumping import FilesDump
    from checkpoint.resources.files.kind import Seen
    from checkpoint.resources.files.opening import Opening
    from images import files_pb2


class SignalfdKind(kind.Kind):
    field = "signalfd"

    def claims(self, seen: Seen) -> bool:
        return seen.anonymous(b"signalfd")

    def refusal(self, seen: Seen) -> Finding | None:
        if seen.info.sigmask is None:
            return Finding(seen.pid, seen.where, "the kernel does not show this signalfd's mask")
        return None

    def dump(self, job: FilesDump, seen: Seen, description: files_pb2.Description) -> None:
        description.signalfd.mask = seen.info.sigmask or 0

    def open(self, opening: Opening, description: files_pb2.Description) -> int:
        return descriptors.signalfd(description.signalfd.mask, os.O_CLOEXEC | os.O_NONBLOCK)


KIND = SignalfdKind()
