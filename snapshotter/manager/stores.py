"""The real store as the manager uses it: the only module that names the `store` package's classes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, cast

from snapshotter.manager.ports import Dumped, StoreLike

if TYPE_CHECKING:
    from store import PointMeta


def open_store(path: Path, create: bool) -> StoreLike:
    """Open (and with `create` make) the store. Raises NoStoreError, PermissionDeniedError, StoreError."""
    from store import Store

    return cast("StoreLike", Store.open(path, create=create))


def point_meta(dumped: Dumped, started_ns: int) -> PointMeta:
    """What the catalog is to know of a dump."""
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
    )
