"""Keeping a store small and whole: forget, prune, verify."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from snapshotter.base.errors import UsageError
from snapshotter.manager.listing import list_points, resolve_many
from snapshotter.manager.session import Session
from store import Point

if TYPE_CHECKING:
    from store import PruneReport, VerifyReport


def forget(session: Session, texts: Sequence[str], *, dry_run: bool = False) -> list[Point]:
    """Take points out of the catalog; `prune` frees what only they needed. Children stay whole.

    Raises NoSuchPointError before anything is removed if one of the names means no point.
    """
    points = resolve_many(session, texts)
    if points and not dry_run:
        session.store().forget(points, wait_s=session.config.lock_wait_s)
    return points


def forget_all_but(session: Session, job: str, keep_last: int, *, dry_run: bool = False) -> list[Point]:
    """Forget all points of a job but the `keep_last` that were committed last, whatever the clock said then."""
    if keep_last < 1:
        raise UsageError("at least one point must be kept", hint="name points to forget them all")
    points = list_points(session, job)
    old = points[:-keep_last]
    if old and not dry_run:
        session.store().forget(old, wait_s=session.config.lock_wait_s)
    return old


def prune(session: Session, *, dry_run: bool = False) -> PruneReport:
    """Delete and repack what no point needs any more."""
    report: PruneReport = session.store().prune(dry_run=dry_run, wait_s=session.config.lock_wait_s)
    return report


def verify(session: Session, texts: Sequence[str]) -> VerifyReport:
    """Read everything that the points (none named: all) need and compare it with its digests."""
    points = resolve_many(session, texts) if texts else None
    report: VerifyReport = session.store().verify(points)
    return report
