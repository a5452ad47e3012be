"""Keeping a store small and whole: forget, prune, verify."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from snapshotter.base.errors import UsageError
from snapshotter.manager.listing import list_points, resolve_many
from snapshotter.manager.session import Session
from store import Point

if TYPE_CHECKING:
    from store import PruneReport, VerifyReport


@dataclass(frozen=True, slots=True)
class Selection:
    """Points that are going to be forgotten."""

    points: tuple[Point, ...]
    wide: tuple[str, ...]
    """Words of the user's that mean more than one point (a job's name, a range): ask before these are forgotten."""


def select(session: Session, texts: Sequence[str]) -> Selection:
    """What `forget` would remove. Changes nothing.

    Raises NoSuchPointError if one of the names means no point.
    """
    points = resolve_many(session, texts)
    jobs = {point.job for point in points}
    return Selection(tuple(points), tuple(text for text in texts if ".." in text or text in jobs))


def forget(session: Session, points: Sequence[Point]) -> None:
    """Take points out of the catalog; `prune` frees what only they needed. Children stay whole."""
    if points:
        session.store().forget(points, wait_s=session.config.lock_wait_s)


def forget_all_but(session: Session, job: str, keep_last: int, *, dry_run: bool = False) -> list[Point]:
    """Forget all points of a job but the `keep_last` that were committed last, whatever the clock said then."""
    if keep_last < 1:
        raise UsageError("at least one point must be kept", hint="name points to forget them all")
    points = list_points(session, job)
    old = points[:-keep_last]
    if not dry_run:
        forget(session, old)
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
