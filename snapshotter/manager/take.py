"""Take a point: find the job and its parent point, run the engine into the store, commit.

Owns which point is the parent: the job's youngest point (by uptime) whose boot id, root pid and root start
time are those of the living process; a rollback of the job counts as such a point. Any other case
starts a new chain. After a rollback nothing is known of which pages changed, so everything is read
and the store finds what it has already.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from snapshotter.base.errors import (
    LockedError,
    MissingPagesError,
    NoStoreError,
    NoSuchPointError,
    OtherProgramError,
    PermissionDeniedError,
    SnapshotterError,
    TargetGoneError,
    UnsupportedError,
    UsageError,
    VerificationError,
)
from snapshotter.manager import ended, jobs, pidfile
from snapshotter.manager.ports import Dumped, Identity, ParentInfo, Skipped, StoreLike
from snapshotter.manager.session import Session
from store import Point

AFTER = ("run", "stop", "kill")


@dataclass(frozen=True, slots=True)
class Parent:
    """The point that the next one is chained to."""

    point: Point
    rolled_back: bool
    """The job was rolled back to it: the chain goes on, but every page is read."""


def take(
    session: Session, pid: int, *, job: str | None = None, after: str = "run", other_program: bool = False
) -> Point:
    """Take a point of the process tree below `pid`.

    Args:
        session: Settings, store and engine.
        pid: The root of the job.
        job: Its name; by default from the command's name and the pid.
        after: "run" lets the job go on, "stop" leaves it stopped, "kill" ends it once the point is safe.
        other_program: The job's name may go to a process that is not a restart of it.

    Raises:
        OtherProgramError: without `other_program`: it is not.
        TargetGoneError, UnsupportedError, PermissionDeniedError, LockedError, StoreError.
    """
    if after not in AFTER:
        raise UsageError(f"after={after!r}: must be one of {', '.join(AFTER)}")
    if job is not None:
        jobs.check_name(job)
    identity = session.engine.identify(pid)
    name = job or jobs.default_name(identity)
    _refuse_before_a_store_is_made(session, pid)
    with session.locked(name, create=True):
        if not other_program:
            _require_restart(session, name, identity)
        return _take_locked(session, name, identity, after)


def take_periodic(
    session: Session,
    path: Path,
    *,
    job: str,
    after: str = "run",
    max_points: int | None = None,
    other_program: bool = False,
) -> Point | Skipped:
    """Take a point of the process that a pid file names, for cron: what is ordinary is not an error.

    Skips while an earlier take of the job still runs, and once the job has ended.

    Raises:
        TargetGoneError: there is no such process, and the job has no points either: a mistake in the command line.
        SnapshotterError: the pid file is missing while the job still runs.
    """
    jobs.check_name(job)
    found = pidfile.read(path)
    if found is None:
        return _ended(session, job, f"there is no pid file {path}", pidfile_missing=True)
    try:
        identity = session.engine.identify(found.pid)
        pidfile.require_right(found, identity)
        _check_is_job(session, job, found, identity)
        _refuse_before_a_store_is_made(session, found.pid)
        with session.locked(job, create=True):
            if not other_program:
                _require_restart(session, job, identity)
            point = _take_locked(session, job, identity, after)
    except LockedError as error:
        return Skipped(job, "busy", f"job {job}: skipped, {error.what}")
    except TargetGoneError as error:
        if isinstance(error, StrangerError):
            raise
        return _ended(session, job, f"process {found.pid} of {path} is gone")
    if max_points is None:
        return point
    return _with_warnings(point, _keep_last(session, job, max_points))


def _require_restart(session: Session, job: str, identity: Identity) -> None:
    """Raise OtherProgramError unless the job has no points, or the process is the job or a restart of it.

    Else two programs would share one chain, and --keep-last would forget points of the one for those of the other.
    """
    points = _known_points(session, job)
    head = jobs.read_head(session.store_path, job)
    if not points or any(_is_of(point, identity) for point in points) or (head and head.is_of(identity)):
        return
    hint = (
        f"choose another --job, or add --other-program if job {job} is to go on with process {identity.pid}"
    )
    running = _living(session, points, head)
    if running is not None:
        raise OtherProgramError(
            f"job {job} still runs as process {running.pid}; process {identity.pid} is another one", hint=hint
        )
    newest = points[-1]
    try:
        before = session.engine.program_at(session.store().reader(newest), newest.pid)
    except VerificationError as error:
        raise OtherProgramError(
            f"whether process {identity.pid} is a restart of job {job} cannot be known: its point {newest.id[:8]} is damaged",
            hint=hint,
        ) from error
    now = session.engine.program(identity.pid)
    if now != before:
        raise OtherProgramError(
            f"process {identity.pid} is no restart of job {job}: it runs {now}, the job ran {before}",
            hint=hint,
        )


def _refuse_before_a_store_is_made(session: Session, pid: int) -> None:
    """What the dump's own look would refuse leaves no empty store behind."""
    if not session.store_exists():
        findings = session.engine.check(pid).findings
        if findings:
            raise UnsupportedError.of(findings, pid)


class StrangerError(TargetGoneError):
    """The pid file's pid belongs to a process that the file was not, or maybe not, written for."""


def _keep_last(session: Session, job: str, count: int) -> Sequence[str]:
    """Forget older points. The new point is safe already, so a failure is but a warning of its take."""
    from snapshotter.manager.upkeep import forget_all_but

    try:
        forget_all_but(session, job, count)
    except SnapshotterError as error:
        return [f"older points were not forgotten: {error}"]
    return []


def _with_warnings(point: Point, texts: Sequence[str]) -> Point:
    """The point with warnings that came after its commit: whoever took it is told, the store is not."""
    return dataclasses.replace(point, warnings=(*point.warnings, *texts)) if texts else point


def _ended(session: Session, job: str, why: str, *, pidfile_missing: bool = False) -> Skipped:
    """The job has ended, unless nothing speaks for it: then it is a mistake, and an error."""
    points = _known_points(session, job)
    if not points:
        raise TargetGoneError(
            f"{why}, and no point of a job {job!r} was ever taken",
            hint="check --pidfile, --job and --store; the job may not have started yet",
        )
    head = jobs.read_head(session.store_path, job)
    running = _living(session, points, head)
    if pidfile_missing and running is not None:
        raise SnapshotterError(
            f"{why}, but process {running.pid} of job {job} runs",
            hint="check --pidfile, or write the file again",
        )
    new = ended.first_time(session.store_path, job, points, head)
    message = f"job {job}: nothing to take, it has ended ({why})"
    return Skipped(job, "ended", message, said_before=not new)


def _living(session: Session, points: Sequence[Point], head: jobs.Head | None) -> Identity | None:
    """The root process of the job, if it runs now."""
    for pid in {point.pid for point in points}:
        with contextlib.suppress(TargetGoneError):
            identity = session.engine.identify(pid)
            if any(_is_of(point, identity) for point in points) or (
                head is not None and head.is_of(identity)
            ):
                return identity
    return None


def _check_is_job(session: Session, job: str, found: pidfile.PidFile, identity: Identity) -> None:
    """Raise TargetGoneError unless the process is the one that the pid file was written for."""
    points = _known_points(session, job)
    head = jobs.read_head(session.store_path, job)
    if any(_is_of(point, identity) for point in points) or (head is not None and head.is_of(identity)):
        return
    verdict = pidfile.judge(found, identity, points)
    if verdict == "job":
        return
    if verdict == "ended":
        raise TargetGoneError(f"process {found.pid} ended; its pid is {identity.comm!r} now")
    why = (
        "started after this pid file was written, so it is another one"
        if verdict == "stranger"
        else "may or may not be the one that this pid file was written for: the clock was set since"
    )
    raise StrangerError(
        f"process {found.pid} ({identity.comm}) {why}",
        where=str(found.path),
        hint=f"if it is the job, write the pid file anew, or name it once: snap take {found.pid} --job {job}",
    )


def _known_points(session: Session, job: str) -> Sequence[Point]:
    try:
        return session.store().points(job)
    except NoStoreError:
        return ()  # made by the take, if there is one


def _is_of(point: Point, identity: Identity) -> bool:
    """Whether the point is of this very process, by what cannot be set or reused."""
    return (
        point.boot_id == identity.boot_id
        and point.pid == identity.pid
        and point.tasks.get(identity.pid) == identity.start_time_ticks
    )


def find_parent(store: StoreLike, store_path: Path, job: str, identity: Identity) -> Parent | None:
    """The point that a take of this process now would be chained to; None starts a new chain."""
    points = store.points(job)
    same = [point for point in points if _is_of(point, identity)]
    latest = max(same, key=lambda point: point.dump_uptime_ns, default=None)
    head = jobs.read_head(store_path, job)
    if head is not None and head.is_of(identity):
        newer = latest is None or latest.dump_uptime_ns < head.restored_uptime_ns
        target = next((point for point in points if point.id == head.point), None)
        if newer and target is not None:
            return Parent(target, rolled_back=True)
    return None if latest is None else Parent(latest, rolled_back=False)


def _parent_info(store: StoreLike, parent: Parent | None) -> ParentInfo | None:
    if parent is None or parent.rolled_back:
        return None
    point = parent.point
    reader = store.reader(point)
    names = frozenset(reader.image_names())
    return ParentInfo(
        boot_id=point.boot_id,
        dump_uptime_ns=point.dump_uptime_ns,
        tasks=point.tasks,
        nonce=point.nonce,
        images=reader.image,
        has_space=lambda name: name in names,
        tracker=point.tracker,
        pages=reader,
    )


def _rollback_needs(session: Session, after: str) -> list[str]:
    """A warning for a user who may take what only somebody else can bring back; with --kill that is refused."""
    if session.engine.may_restore():
        return []
    owner = f"snap rollback POINT --store {session.store_path} --store-owner {os.geteuid()}"
    if after == "kill":
        raise PermissionDeniedError(
            "you may take this job but not bring it back, so it is not killed",
            hint=f"run as root, or without --kill; root brings it back with: {owner}",
        )
    return [f"you may not roll this job back; root may: {owner}"]


def _take_locked(session: Session, job: str, identity: Identity, after: str) -> Point:
    store = session.store(create=True)
    parent = find_parent(store, session.store_path, job, identity)
    notes = _rollback_needs(session, after)
    while True:
        try:
            return _dump_into(session, job, identity, after, parent, notes)
        except (MissingPagesError, VerificationError) as error:
            if parent is None:
                raise
            # Nothing was committed and the job runs on. Whatever the tracker missed, reading everything does not, and
            # a damaged parent hurts nothing that is not built upon it; it costs time, and the point says why.
            where = f"{error.where}: " if error.where else ""
            if isinstance(error, MissingPagesError) and not parent.rolled_back:
                text = "the parent point could not be built upon, so everything was read"
                parent = Parent(parent.point, rolled_back=True)
            else:
                text = f"the parent point {parent.point.id[:8]} is damaged, so a new chain begins"
                parent = None
            notes.append(f"{text} ({where}{error.what})")


def _dump_into(
    session: Session, job: str, identity: Identity, after: str, parent: Parent | None, notes: Sequence[str]
) -> Point:
    from snapshotter.manager.stores import load_writer, point_meta

    load_writer()
    session.engine.load()
    store = session.store()
    started = time.monotonic_ns()
    committed: list[Point] = []
    with store.writer(job, None if parent is None else parent.point) as writer:

        def commit(dumped: Dumped) -> None:
            if dumped.tasks.get(identity.pid) != identity.start_time_ticks:
                # What was judged has ended, and its pid is another process's by now: that one is left alone.
                raise TargetGoneError(f"process {identity.pid} ended while the point was being taken")
            if notes:
                dumped = dataclasses.replace(dumped, warnings=[*dumped.warnings, *notes])
            writer.add_images(dumped.images)
            committed.append(writer.commit(point_meta(dumped, started)))

        try:
            late = session.engine.dump(identity.pid, writer, _parent_info(store, parent), after, commit)
        except NoSuchPointError as error:
            raise SnapshotterError(
                f"the parent point was removed during the take: {error.what}", hint="take again"
            ) from error
    if not committed:
        raise SnapshotterError(f"the engine ended without a point of job {job}")
    return _with_warnings(committed[0], late)
