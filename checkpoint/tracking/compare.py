"""The tracker that knows nothing: every page is read, and the store's digests find out what is new.

Always right, needs nothing of the kernel and leaves nothing behind; costs the reading and hashing of the whole
job at each take (and not its storing). Used where neither of the others works.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from checkpoint.context import FrozenProcess
from checkpoint.tracking.base import Probe, Runs, Session, Tracker


class CompareSession(Session):
    """Answers "unknown" to everything."""

    def tracks(self, pid: int) -> bool:
        """Never."""
        return False

    def collect(
        self, pid: int, vmas: Sequence[tuple[int, int]], *, frozen: FrozenProcess | None = None
    ) -> Runs | None:
        """None: all of it."""
        return None

    def distrust(self, pid: int) -> None:
        """Nothing was trusted."""

    def confirm(self) -> None:
        """Nothing to remember."""

    def close(self) -> None:
        """Nothing to give back."""


class CompareTracker(Tracker):
    """Reads everything."""

    name: ClassVar[str] = "compare"

    @classmethod
    def probe(cls) -> Probe:
        """Always works."""
        return Probe(cls.name, ok=True)

    def session(self, root_pid: int, tasks: Mapping[int, int], parent_nonce: str) -> CompareSession:
        """Begin a take."""
        return CompareSession()
