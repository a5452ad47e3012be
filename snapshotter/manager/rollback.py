"""Roll a job back to a point: read it through the store, have the engine restore it, record where it goes on.

The lock of the job is held meanwhile, so that no take sees a job in the making.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from snapshotter.base.errors import SnapshotterError, VerificationError
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


def rollback(
    session: Session,
    text: str,
    *,
    dry_run: bool = False,
    leave_stopped: bool = False,
    terminal: str = "auto",
    allow: frozenset[str] = frozenset(),
) -> RollbackReport:
    """Bring back the job as it was at the point that `text` names; replaces it if it is alive.

    Args:
        session: Settings, store and engine.
        text: Names the point, as `Store.resolve` takes it.
        dry_run: Check everything and plan (`restored.plan`, `plan_text`); touch nothing.
        leave_stopped: Leave every process stopped, for a look at it; SIGCONT lets it go.
        terminal: What a job whose terminal is gone gets: "auto" nothing (a conflict), "null" /dev/null.
        allow: What killing the living job may do to others: "hang-up" (its terminal), "detach-from-parent".

    Raises:
        NoSuchPointError, VerificationError, RestoreConflictError, PermissionDeniedError, LockedError.
    """
    with _locked_point(session, text) as point:
        known = known_identities(session, point)
        if is_alive(session, point, known):
            require_whole(session, point)
        problems: list[str] = []

        def record(tasks: Mapping[int, int]) -> None:
            problems.extend(_record(session, point, tasks))

        restored = session.engine.restore(
            session.store().reader(point),
            known,
            dry_run=dry_run,
            leave_stopped=leave_stopped,
            terminal=terminal,
            allow=allow,
            record=record,
        )
    return RollbackReport(point, restored, (*restored.warnings, *problems))


@contextlib.contextmanager
def _locked_point(session: Session, text: str) -> Iterator[Point]:
    """The point that `text` names once its job is locked: a take or forget may have changed that while we waited."""
    store = session.store()
    point = store.resolve(text)
    while True:
        with session.locked(point.job, wait_s=session.config.lock_wait_s):
            found = store.resolve(text)
            if found.job == point.job:
                yield found
                return
        point = found  # `latest` is another job's by now


def known_identities(session: Session, point: Point) -> list[Mapping[int, int]]:
    """Start times under which the job may be alive just now besides the point's own: it was rolled back or went on.

    Only what is of this boot and has the same root counts: start times of another boot prove nothing.
    """
    boot_id = session.engine.boot_id()
    known: list[Mapping[int, int]] = [
        other.tasks
        for other in session.store().points(point.job)
        if other.boot_id == boot_id and other.pid == point.pid and other.id != point.id
    ]
    head = jobs.read_head(session.store_path, point.job)
    if head is not None and head.boot_id == boot_id and point.pid in head.tasks:
        known.append(head.tasks)
    return known


def is_alive(session: Session, point: Point, known: Sequence[Mapping[int, int]]) -> bool:
    """Whether the rollback would kill anything: one task of the point is enough, its root may be gone.

    The engine decides for itself what it replaces; this says yes at least whenever that is anything.
    """
    times = [point.tasks, *known]
    for pid in point.tasks:
        with contextlib.suppress(SnapshotterError):
            start = session.engine.identify(pid).start_time_ticks
            if any(tasks.get(pid) == start for tasks in times):
                return True
    return False


def require_whole(session: Session, point: Point) -> None:
    """Raise VerificationError unless all bytes of the point are right.

    A living job is killed only for a point that is known to restore; reading it twice is the price. A job that is
    gone has nothing to lose, and the restore verifies what it reads anyway.
    """
    report = session.store().verify([point])
    if not report.ok:
        first = report.damage[0]
        raise VerificationError(
            f"{first.where}: {first.what}",
            where=f"point {point.id[:8]}",
            hint="the living job was not touched; `snap verify` names the points that are whole",
        )


def _record(session: Session, point: Point, tasks: Mapping[int, int]) -> list[str]:
    """Write the head just before the job runs: if snap dies then, the job is known by it all the same.

    The old job is gone by now, so failing here costs the chain's link and only warns.
    """
    head = jobs.Head(
        point=point.id,
        boot_id=session.engine.boot_id(),
        restored_uptime_ns=time.clock_gettime_ns(time.CLOCK_BOOTTIME),
        tasks=tasks,
    )
    try:
        jobs.write_head(session.store_path, point.job, head)
    except SnapshotterError as error:
        return [f"the next take starts a new chain: {error}"]
    return []
