"""What the store hands to its callers: points, reports, and what a point is committed with.

Plain frozen dataclasses, no I/O and no heavy imports, so that `from store import Point` costs nothing.
"""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class FileRecord:
    """A file that a point needs again: kept in the catalog so that it can be asked for without the images."""

    path: str
    dev: int
    ino: int
    size_bytes: int
    mtime_ns: int
    build_id: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class PointMeta:
    """What the engine knows about a dump; `PointWriter.commit` adds id, parent, job and the page counts."""

    pid: int
    boot_id: str
    dump_uptime_ns: int
    tracker: str
    nonce: str = ""
    nr_tasks: int = 1
    frozen_us: int = 0
    started_ns: int = 0
    """When the take began (CLOCK_MONOTONIC), Python and its modules being there: the point's duration_us lasts until everything of it is on disk. 0: now."""
    pages_dirty: int = 0
    taken_at: dt.datetime | None = None
    """Aware. None: the time of the commit."""
    warnings: tuple[str, ...] = ()
    tasks: dict[int, int] = field(default_factory=dict)
    """pid -> start time in clock ticks since boot."""
    files: tuple[FileRecord, ...] = ()
    point_id: str | None = None
    """32 hex digits to use; None: a fresh random one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One consistent dump of a whole job, as the catalog knows it."""

    id: str
    parent: str | None
    job: str
    pid: int
    taken_at: dt.datetime
    dump_uptime_ns: int
    boot_id: str
    tracker: str
    nonce: str
    nr_tasks: int
    frozen_us: int
    duration_us: int
    pages_dirty: int
    pages_new: int
    """Pages that no earlier point of this store had."""
    pages_total: int
    """Pages of all spaces, all-zero ones included."""
    bytes_logical: int
    """pages_total * 4096 plus the images."""
    bytes_stored: int
    """What the packs hold for this point and no older one (store/sizes.py): as of its take, or of the last prune since."""
    warnings: tuple[str, ...] = ()
    tasks: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Damage:
    """One thing that is wrong in the store, and the points that it hurts (ids, may be empty)."""

    where: str
    what: str
    points: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """`ok` when nothing that the points need is damaged."""

    points: tuple[str, ...]
    nr_frames: int
    nr_pages: int
    nr_packs: int
    bytes_read: int
    damage: tuple[Damage, ...] = ()

    @property
    def ok(self) -> bool:
        """True when no damage was found."""
        return not self.damage

    @property
    def points_hurt(self) -> tuple[str, ...]:
        """Ids of the points that cannot be restored whole, sorted."""
        return tuple(sorted({point for item in self.damage for point in item.points}))


@dataclass(frozen=True, slots=True)
class PruneReport:
    """What a prune removed (or, with dry_run, would remove)."""

    packs_removed: int
    packs_repacked: int
    garbage_removed: int
    bytes_freed: int
    bytes_kept: int
    dry_run: bool = False
    warnings: tuple[str, ...] = ()
    """What was left for another time, and why."""


@dataclass(frozen=True, slots=True)
class StoreStats:
    """Sizes of the whole store, in bytes unless named otherwise."""

    nr_points: int
    nr_jobs: int
    nr_packs: int
    nr_pages: int
    bytes_logical: int
    bytes_packs: int
    bytes_index: int
    bytes_catalog: int

    @property
    def bytes_on_disk(self) -> int:
        """Packs, indexes and catalog."""
        return self.bytes_packs + self.bytes_index + self.bytes_catalog


@dataclass(frozen=True, slots=True)
class WriterStats:
    """A writer's counters so far."""

    pages_put: int
    pages_new: int
    pages_zero: int
    bytes_stored: int
