"""Roll a job back to a point: read it through the store, have the engine restore it, record where it goes on.

The lock of the job is held meanwhile, so that no take sees a job in the making.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from snapshotter.base.errors import SnapshotterError
from snapshotter.manager import jobs
from snapshotter.manager.ports import Restored
from snapshotter.manager.session import Session
from store import Point


@dataclass(frozen=True, slots=True)
class RollbackReport:
    """What runs now."""

    point: Point
    restored: Restored
    warnings: tuple[str, ...]


def rollback(session: Session, text: str) -> RollbackReport:
    """Bring back the job as it was at the point that `text` names; replaces it if it is alive.

    Raises:
        NoSuchPointError, VerificationError, RestoreConflictError, PermissionDeniedError, LockedError.
    """
    store = session.store()
    point = store.resolve(text)
    with session.locked(point.job, wait_s=session.config.lock_wait_s):
        restored = session.engine.restore(store.reader(point))
        warnings = list(restored.warnings)
        problem = _record(session, point, restored)
        if problem:
            warnings.append(problem)
    return RollbackReport(point, restored, tuple(warnings))


def _record(session: Session, point: Point, restored: Restored) -> str:
    """Write the head; the job runs already, so failing here costs the chain's link and only warns."""
    tasks: dict[int, int] = {}
    boot_id = ""
    for pid in restored.pids:
        try:
            identity = session.engine.identify(pid)
        except SnapshotterError:
            # It was a zombie in the point, or has ended since.
            continue
        boot_id = identity.boot_id
        tasks[pid] = identity.start_time_ticks
    if restored.root_pid not in tasks:
        return f"the job ended right after the rollback (process {restored.root_pid})"
    uptime_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    try:
        jobs.write_head(session.store_path, point.job, jobs.Head(point.id, boot_id, uptime_ns, tasks))
    except SnapshotterError as error:
        return f"the next take starts a new chain: {error}"
    return ""
