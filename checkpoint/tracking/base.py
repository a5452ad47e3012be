"""What every tracker of written pages offers: probe, session, collect, confirm.

A *tracker* tells which pages of a task were written since an instant. A session of it serves one take:

    with tracker.session(root_pid, tasks, parent_nonce) as session:
        written = session.collect(pid, vmas)     # since the parent's dump, or None: unknown, all of it
        ...                                      # read the pages, as often as wanted
        written = session.collect(pid, vmas, frozen=process)   # since the last collect
        ...                                      # thaw, commit
        session.confirm(nonce)                   # the next take may build on this one

Invariants:

- collect() is destructive (read and reset in one). So the old nonce is made invalid before the first one, and the
  new nonce is set by confirm(), after the commit. A take that dies in between costs the next one a full dump.
- Doubt is told as "written": a VMA that was not watched all the time comes back as written from end to end, and a
  task that was not watched as None.
"""

from __future__ import annotations

import secrets
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from checkpoint.context import FrozenProcess

Runs = NDArray[np.int64]
"""(n, 2): rows [first page, end page), ascending; as checkpoint.model.pageplan has them."""

EMPTY: Runs = np.zeros((0, 2), dtype=np.int64)


@dataclass(frozen=True, slots=True)
class Probe:
    """Whether a tracker works on this kernel, and why not."""

    name: str
    ok: bool
    note: str = ""


class Session(ABC):
    """One take's use of a tracker. A context manager: leaving it without confirm() leaves the nonce invalid."""

    nonce: str = ""
    """The name of this take's instant; "" when the tracker can tell nothing."""

    @abstractmethod
    def tracks(self, pid: int) -> bool:
        """Whether a later collect() of this process tells what was written since the last one."""

    @abstractmethod
    def collect(
        self, pid: int, vmas: Sequence[tuple[int, int]], *, frozen: FrozenProcess | None = None
    ) -> Runs | None:
        """Pages of `pid` written since the last collect (the first time: since the parent's dump), and reset.

        Args:
            pid: a process of the job.
            vmas: its private mappings as [start, end) in bytes, ascending.
            frozen: the process, when it is stopped already; else it is stopped for an instant where needed.

        Returns:
            Rows of pages, or None: not known, all pages count as written; from now on it is watched if it can be.
        """

    def add(self, pid: int, start_time_ticks: int) -> None:  # noqa: B027 - nothing to do for who knows no tasks
        """A process of the job that was found only in the frozen window."""

    def forget(self, pid: int) -> None:  # noqa: B027
        """A process that has ended during the take."""

    @abstractmethod
    def distrust(self, pid: int) -> None:
        """What is written to this process from now on may go unseen: the next take reads it as a whole."""

    @abstractmethod
    def confirm(self) -> None:
        """The take is committed: from now on `nonce` names the instant of the last collect."""

    @abstractmethod
    def close(self) -> None:
        """Give back descriptors. Watching goes on only after a confirm()."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Tracker(ABC):
    """A way to find written pages."""

    name: ClassVar[str]

    @classmethod
    @abstractmethod
    def probe(cls) -> Probe:
        """Try it for real, on memory of our own; cached."""

    @abstractmethod
    def session(self, root_pid: int, tasks: Mapping[int, int], parent_nonce: str) -> Session:
        """Begin a take.

        Args:
            root_pid: of the job.
            tasks: pid -> start time in ticks of the processes of the job, as seen before the freeze.
            parent_nonce: of the parent point; "" when there is none, or none that may be used.
        """


def new_nonce() -> str:
    """32 hex digits that were never used before."""
    return secrets.token_hex(16)


def pages_of(vmas: Sequence[tuple[int, int]]) -> Runs:
    """[start, end) in bytes -> rows of pages."""
    return np.asarray(vmas, dtype=np.int64).reshape(-1, 2) >> 12
