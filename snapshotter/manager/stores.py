"""The real store as the manager uses it: the only module that names the `store` package's classes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, cast

from snapshotter.base.errors import NoStoreError
from snapshotter.manager.ports import Dumped, StoreLike

if TYPE_CHECKING:
    from store import PointMeta


def open_store(path: Path, create: bool, *, upgrade: bool = True, owner: int | None = None) -> StoreLike:
    """Open (and with `create` make) the store. Raises NoStoreError, PermissionDeniedError, StoreError.

    A store of another `owner` is opened only when told so. With `upgrade` the schema of an older one is brought up to date, else OutdatedStoreError is raised.
    """
    from store import Store

    wrong = not_a_directory(path)
    if wrong is not None:
        raise NoStoreError("not a directory", where=str(wrong), hint="name another with --store")
    return cast("StoreLike", Store.open(path, create=create, upgrade=upgrade, owner=owner))


def not_a_directory(path: Path) -> Path | None:
    """What stands where `path` or a directory above it should be: a file, a dangling link. None: nothing does."""
    existing = next(part for part in (path, *path.parents) if os.path.lexists(part))
    return None if existing.is_dir() else existing


def load_writer() -> None:
    """Import what writing a point needs, see RealEngine.load."""
    from store import writer  # noqa: F401


def point_meta(dumped: Dumped, started_ns: int) -> PointMeta:
    """What the catalog is to know of a dump."""
    from snapshotter.manager import identities
    from store import PointMeta

    return PointMeta(
        pid=dumped.pid,
        boot_id=dumped.boot_id,
        dump_uptime_ns=dumped.dump_uptime_ns,
        tracker=dumped.tracker,
        nonce=dumped.nonce,
        nr_tasks=dumped.nr_tasks,
        frozen_us=dumped.frozen_us,
        started_ns=started_ns,
        pages_dirty=dumped.pages_dirty,
        taken_at=dumped.taken_at,
        warnings=tuple(dumped.warnings),
        tasks=dict(dumped.tasks),
        files=identities.of_images(dumped.images),
    )
