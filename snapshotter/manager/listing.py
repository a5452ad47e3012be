"""Which points there are and what one holds: for `snap list`, `snap show` and everything that names points."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from snapshotter.base.errors import NoSuchPointError, SnapshotterError, UsageError
from snapshotter.manager.session import Session
from store import FileRecord, Point


def list_points(session: Session, job: str | None = None) -> list[Point]:
    """Every point (of one job) in the order of the commits: a clock that was set back changes nothing.

    Raises:
        NoStoreError: there is no store. A mistyped --store must not look like an empty one.
        NoSuchPointError: `job` has no points. A mistyped name must not look like a job without points.
    """
    store = session.store()
    points = list(store.points(job))
    if job is not None and not points:
        raise NoSuchPointError(
            f"no job is called {job!r}", where=str(session.store_path), hint="`snap list` shows all points"
        )
    return points


def resolve_many(session: Session, texts: Sequence[str]) -> list[Point]:
    """Points by id, `latest`, `JOB~N`, by ranges A..B (both ends, one job, by commits), or all of a JOB; without doubles.

    Everything is resolved before anything is returned, so that one wrong name stops the command.
    """
    store = session.store()
    found: dict[str, Point] = {}
    for text in texts:
        first, dots, last = text.partition("..")
        if not dots:
            for point in store.points(text) or [store.resolve(text)]:
                found[point.id] = point
            continue
        if not first or not last:
            raise UsageError(f"range {text!r} lacks an end", hint="write FIRST..LAST")
        for point in _between(session, store.resolve(first), store.resolve(last), text):
            found[point.id] = point
    return list(found.values())


def _between(session: Session, first: Point, last: Point, text: str) -> list[Point]:
    if first.job != last.job:
        raise UsageError(f"range {text!r} spans two jobs, {first.job} and {last.job}")
    points = list_points(session, first.job)
    ids = [point.id for point in points]
    start, end = ids.index(first.id), ids.index(last.id)
    if start > end:
        raise UsageError(f"range {text!r} is backwards", hint="the older point comes first")
    return points[start : end + 1]


@dataclass(frozen=True, slots=True)
class Details:
    """A point and its images, decoded."""

    point: Point
    manifest: dict[str, Any]
    processes: list[dict[str, Any]]
    memory: dict[str, dict[str, Any]]
    files: dict[str, Any]
    file_identities: tuple[FileRecord, ...]
    """Files outside the store that a rollback needs again, as they were at the dump."""
    children: tuple[str, ...]
    """Points whose parent it is."""


def show(session: Session, text: str) -> Details:
    """Everything a point says of itself. Raises NoSuchPointError, VerificationError."""
    from images.show import show as decode

    store = session.store()
    point = store.resolve(text)
    reader = store.reader(point)
    decoded: dict[str, dict[str, Any]] = {}
    for name in reader.image_names():
        decoded[name] = decode(name, reader.image(name))
    return Details(
        point=point,
        manifest=decoded.get("manifest", {}),
        processes=[image for name, image in decoded.items() if name.startswith("process/")],
        memory={name: image for name, image in decoded.items() if name.startswith(("mm/", "shmem/"))},
        files={name: image for name, image in decoded.items() if name.startswith(("files", "fdtable/"))},
        file_identities=tuple(store.files(point)),
        children=tuple(other.id for other in store.points(point.job) if other.parent == point.id),
    )


def image_json(session: Session, text: str, name: str) -> dict[str, Any]:
    """One image of a point, decoded. Raises SnapshotterError naming the images that there are."""
    from images.show import show as decode

    store = session.store()
    reader = store.reader(store.resolve(text))
    names = list(reader.image_names())
    if name not in names:
        raise SnapshotterError(f"the point has no image {name!r}", hint=f"it has {', '.join(sorted(names))}")
    return decode(name, reader.image(name))
