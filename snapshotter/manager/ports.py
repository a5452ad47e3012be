"""What the manager needs of the engine and of the store, as Protocols, and the reports it gives back.

The real ones are `checkpoint` (through `manager.engine`) and `store`; tests hand in fakes. Nothing
here is imported for its side effects and nothing here touches the kernel or a file.
"""
# ruff: noqa: D102 (methods of Protocols are documented where they are implemented)

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Protocol

from snapshotter.base.errors import Finding
from snapshotter.base.pages import PageSink, PageSource
from store import FileRecord, Point


class ReaderLike(PageSource, Protocol):
    """Images and pages of one point."""

    def image(self, name: str) -> bytes: ...
    def image_names(self) -> Sequence[str]: ...


class StoreLike(Protocol):
    """An open store."""

    def points(self, job: str | None = None) -> Sequence[Point]: ...
    def resolve(self, text: str) -> Point: ...
    def lock_job(self, job: str, wait_s: float = ...) -> AbstractContextManager[Any]: ...
    def writer(self, job: str, parent: Any = None) -> AbstractContextManager[Any]: ...
    def reader(self, point: Any) -> Any: ...
    def verify(self, points: Any = None) -> Any: ...
    def files(self, point: Any) -> Sequence[FileRecord]: ...
    def forget(self, points: Any, *, wait_s: float = 10.0) -> Any: ...
    def prune(self, *, dry_run: bool = False, wait_s: float = 10.0) -> Any: ...
    def stats(self) -> Any: ...
    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Identity:
    """Which process a pid means just now: the pid alone is not enough, it can be reused."""

    pid: int
    start_time_ticks: int
    boot_id: str
    comm: str
    started_uptime_s: float
    """When it started, on CLOCK_BOOTTIME."""
    uptime_s: float
    """CLOCK_BOOTTIME when it was identified, and"""
    seen_at: float
    """the wall clock at the same instant."""
    uids: frozenset[int] = frozenset()
    """The users that it acts as: real, effective, saved and of the file system."""


@dataclass(frozen=True, slots=True)
class ParentInfo:
    """The parent point as the engine sees it."""

    boot_id: str
    dump_uptime_ns: int
    tasks: Mapping[int, int]
    nonce: str
    images: Callable[[str], bytes]
    has_space: Callable[[str], bool]
    tracker: str = ""
    pages: PageSource | None = None


@dataclass(frozen=True, slots=True)
class Dumped:
    """What the engine hands over when everything of a point was read."""

    images: Mapping[str, bytes]
    pid: int
    boot_id: str
    dump_uptime_ns: int
    taken_at: datetime
    tracker: str
    nonce: str
    tasks: Mapping[int, int]
    nr_tasks: int
    frozen_us: int
    pages_dirty: int
    warnings: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Restored:
    """What the engine says of a finished restore."""

    root_pid: int
    pids: Sequence[int]
    duration_us: int
    pages_written: int
    warnings: Sequence[str] = ()
    tasks: Mapping[int, int] = field(default_factory=dict)
    """tid -> start time in ticks, of the tasks that run now."""
    plan_text: str = ""
    """The plan for people, a step a line, and"""
    plan: Mapping[str, object] = field(default_factory=dict)
    """for programs."""


@dataclass(frozen=True, slots=True)
class Checked:
    """The engine's look at a running job."""

    pid: int
    nr_tasks: int
    findings: Sequence[Finding] = ()
    pids: Sequence[int] = ()
    warnings: Sequence[str] = ()
    """What a point of it would lack."""
    unseen: Sequence[str] = ()
    """What a take would refuse and no look from outside can see."""


class EngineLike(Protocol):
    """The engine as the manager uses it."""

    def load(self) -> None: ...
    def identify(self, pid: int) -> Identity: ...
    def boot_id(self) -> str: ...
    def may_restore(self) -> bool: ...
    def program(self, pid: int) -> object: ...
    def program_at(self, reader: ReaderLike, pid: int) -> object: ...
    def dump(
        self,
        pid: int,
        sink: PageSink,
        parent: ParentInfo | None,
        after: str,
        commit: Callable[[Dumped], None],
    ) -> Sequence[str]: ...
    def check(self, pid: int) -> Checked: ...
    def restore(
        self,
        reader: ReaderLike,
        known_tasks: Sequence[Mapping[int, int]],
        *,
        dry_run: bool,
        leave_stopped: bool,
        terminal: str = "auto",
        allow: frozenset[str] = frozenset(),
        record: Callable[[Mapping[int, int]], None],
    ) -> Restored: ...
    def features(self) -> Sequence[Mapping[str, object]]: ...
    def keepers(self) -> Sequence[int]: ...


@dataclass(frozen=True, slots=True)
class Skipped:
    """A periodic take that had nothing to do, and why. Not an error."""

    job: str
    reason: str
    """"busy" or "ended"."""
    message: str
    said_before: bool = False
    """This end of the job was reported by an earlier run: only the status needs to say it."""
