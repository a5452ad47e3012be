"""The catalog: which points there are, and where their blobs lie. SQLAlchemy Core on SQLite by default.

One commit point: `add_point` is the transaction that makes a take exist. SQLite runs with a rollback
journal, not a WAL: a store is then one file at rest, can be read on a read-only file system, and an idle point
costs no journal on disk; synchronous=EXTRA makes the journal's removal, which is the commit, durable. The file
names are the other copy of nothing: a pack that is not in here does not exist.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from snapshotter.base.errors import NoStoreError, PermissionDeniedError, SnapshotterError, StoreError
from store import schema
from store.files import NoSpaceError, make_dir, open_new, wrapped
from store.types import FileRecord, Point

FrameRef = tuple[int, int]
_IDS_AT_A_TIME = 1000
_EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)


@dataclass(frozen=True, slots=True)
class BlobRefs:
    """Where a point's images and page map lie, and what the keyframe rule needs to know of the latter."""

    images: FrameRef
    maps: FrameRef
    chain: int
    keyframe_bytes: int
    delta_bytes: int


@dataclass(frozen=True, slots=True)
class PackRow:
    """One pack of the catalog."""

    id: int
    size_bytes: int
    nr_pages: int


def _sqlite_setup(connection: Any, _record: object) -> None:
    connection.isolation_level = None  # transactions are ours (see _sqlite_begin), not the driver's guess
    for pragma in ("foreign_keys=ON", "synchronous=EXTRA", "journal_mode=DELETE", "busy_timeout=20000"):
        connection.execute(f"PRAGMA {pragma}")


def _database_error(error: sa.exc.SQLAlchemyError, where: str) -> SnapshotterError:
    original = getattr(error, "orig", None)
    text = str(original or error).splitlines()[0]
    low = text.lower()
    if "readonly" in low or "read-only" in low or "permission" in low:
        return PermissionDeniedError(
            f"the catalog cannot be written: {text}", where=where, hint="is the file system read-only?"
        )
    if "full" in low:
        return NoSpaceError(
            f"the catalog cannot be written: {text}",
            where=where,
            hint="free some space, or run `snap forget` and `snap prune`; the points that exist are whole",
        )
    if "locked" in low:
        return StoreError(f"the catalog is busy: {text}", where=where, hint="try again")
    return StoreError(f"the catalog failed: {text}", where=where, hint="run `snap verify`")


def _some_at_a_time(ids: Sequence[str] | None) -> Iterator[sa.ColumnElement[bool]]:
    """Conditions on points that together name each of `ids` once; None: one condition that all points meet."""
    if ids is None:
        yield sa.true()
        return
    unique = list(dict.fromkeys(ids))
    for at in range(0, len(unique), _IDS_AT_A_TIME):
        yield schema.points.c.id.in_(unique[at : at + _IDS_AT_A_TIME])


class Catalog:
    """Queries and transactions on one catalog. Any thread."""

    def __init__(self, url: str, where: str) -> None:
        self._where = where
        self._engine = sa.create_engine(url, poolclass=sa.pool.NullPool if url.startswith("sqlite") else None)
        if self._engine.dialect.name == "sqlite":
            sa.event.listen(self._engine, "connect", _sqlite_setup)

    @classmethod
    def at(cls, path: Path, *, create: bool) -> Catalog:
        """The SQLite catalog in a file, made 0600 first (SQLite gives its journals the same mode)."""
        if create and not path.exists():
            make_dir(path.parent)
            with wrapped("cannot make the catalog", path), contextlib.suppress(FileExistsError):
                import os

                os.close(open_new(path))
        if not path.exists():
            raise NoStoreError("the store has no catalog", where=str(path), hint="restore it from a backup")
        return cls(f"sqlite:///{path}", str(path))

    @contextlib.contextmanager
    def _read(self) -> Iterator[sa.Connection]:
        try:
            with self._engine.connect() as connection, connection.begin():
                if self._engine.dialect.name == "sqlite":
                    connection.exec_driver_sql("BEGIN")
                yield connection
        except sa.exc.SQLAlchemyError as error:
            raise _database_error(error, self._where) from error

    @contextlib.contextmanager
    def _write(self) -> Iterator[sa.Connection]:
        try:
            with self._engine.connect() as connection, connection.begin():
                if self._engine.dialect.name == "sqlite":
                    connection.exec_driver_sql("BEGIN IMMEDIATE")
                yield connection
        except sa.exc.SQLAlchemyError as error:
            raise _database_error(error, self._where) from error

    def close(self) -> None:
        """Drops pooled connections."""
        self._engine.dispose()

    # -- schema ---------------------------------------------------------------------------------------

    def revision(self) -> str | None:
        """The schema's revision; None: an empty database."""
        with self._read() as connection:
            if not self._engine.dialect.has_table(connection, "alembic_version"):
                return None
            return connection.scalar(sa.select(schema.alembic_version.c.version_num))

    def migrate(self) -> None:
        """Brings the schema to SCHEMA_REVISION. The caller holds the store's exclusive lock."""
        from alembic import command
        from alembic.config import Config
        from alembic.script import ScriptDirectory
        from alembic.util import CommandError

        import migrations

        config = Config()
        config.set_main_option(
            "script_location", str(Path(next(iter(migrations.__path__)))).replace("%", "%%")
        )
        current = self.revision()
        try:
            known = current is None or ScriptDirectory.from_config(config).get_revision(current) is not None
        except CommandError:
            known = False
        if not known:
            raise NoStoreError(
                f"the catalog has schema {current}, which is newer than this snap ({schema.SCHEMA_REVISION})",
                where=self._where,
                hint="use the newer snap that wrote it, or another --store",
            )
        with self._write() as connection:
            config.attributes["connection"] = connection
            command.upgrade(config, schema.SCHEMA_REVISION)

    # -- reading --------------------------------------------------------------------------------------

    def points(self, job: str | None = None, ids: Sequence[str] | None = None) -> list[Point]:
        """Points in the order of their commits."""
        table = schema.points
        query = sa.select(table, schema.jobs.c.name.label("job")).join_from(table, schema.jobs)
        # A join, not a list of points: databases bound how many parameters a statement may have.
        task_query = sa.select(schema.tasks)
        if job is not None or ids is not None:
            task_query = task_query.join_from(schema.tasks, table).join(schema.jobs)
        if job is not None:
            query = query.where(schema.jobs.c.name == job)
            task_query = task_query.where(schema.jobs.c.name == job)
        rows: list[Any] = []
        by_point: dict[int, dict[int, int]] = {}
        with self._read() as connection:
            for some in _some_at_a_time(ids):
                rows += connection.execute(query.where(some)).all()
                for seq, pid, start in connection.execute(task_query.where(some)):
                    by_point.setdefault(seq, {})[pid] = start
        rows.sort(key=lambda row: row.seq)
        return [self._point(row, by_point.get(row.seq, {})) for row in rows]

    @staticmethod
    def _point(row: Any, tasks: dict[int, int]) -> Point:
        names = (
            "id", "parent", "job", "pid", "dump_uptime_ns", "boot_id", "tracker", "nonce", "nr_tasks", "frozen_us",
            "duration_us", "pages_dirty", "pages_new", "pages_total", "bytes_logical", "bytes_stored",
        )  # fmt: skip
        return Point(
            **{name: getattr(row, name) for name in names},
            taken_at=_EPOCH + dt.timedelta(microseconds=row.taken_at_us),
            warnings=tuple(json.loads(row.warnings)),
            tasks=tasks,
        )

    def blobs(self, ids: Sequence[str] | None = None) -> dict[str, BlobRefs]:
        """Where the blobs of points lie, by id, in the order of commits."""
        maps, table = schema.page_maps, schema.points
        query = sa.select(table.c.id, table.c.images_pack, table.c.images_frame, maps).join_from(table, maps)
        rows: list[Any] = []
        with self._read() as connection:
            for some in _some_at_a_time(ids):
                rows += connection.execute(query.where(some)).all()
        rows.sort(key=lambda row: row.point_seq)
        return {
            row.id: BlobRefs(
                (row.images_pack, row.images_frame), (row.pack, row.frame), row.chain, row.keyframe_bytes,
                row.delta_bytes,
            )
            for row in rows
        }  # fmt: skip

    def packs(self) -> dict[int, PackRow]:
        """Every pack that exists."""
        with self._read() as connection:
            return {row.id: PackRow(*row) for row in connection.execute(sa.select(schema.packs))}

    def job_of_points(self) -> dict[str, str]:
        """Every point's job, by the point's id."""
        query = sa.select(schema.points.c.id, schema.jobs.c.name).join_from(schema.points, schema.jobs)
        with self._read() as connection:
            return {row.id: row.name for row in connection.execute(query)}

    def files(self, point_id: str) -> list[FileRecord]:
        """File identities of a point."""
        table = schema.file_identities
        query = (
            sa.select(table)
            .join_from(table, schema.point_files)
            .join(schema.points, schema.points.c.seq == schema.point_files.c.point_seq)
            .where(schema.points.c.id == point_id)
            .order_by(table.c.path)
        )
        with self._read() as connection:
            return [
                FileRecord(row.path, int(row.dev), int(row.ino), row.size_bytes, row.mtime_ns, row.build_id)
                for row in connection.execute(query)
            ]

    # -- writing --------------------------------------------------------------------------------------

    def add_point(
        self, point: Point, refs: BlobRefs, packs: Iterable[PackRow], files: Iterable[FileRecord] = ()
    ) -> Point:
        """The commit point of a take. Returns the point as it was written (a forgotten parent is dropped)."""
        table = schema.points
        with self._write() as connection:
            if point.parent is not None:
                known = connection.scalar(sa.select(table.c.id).where(table.c.id == point.parent))
                point = replace(point, parent=known)
            job_id = connection.scalar(sa.select(schema.jobs.c.id).where(schema.jobs.c.name == point.job))
            if job_id is None:
                job_id = self._insert(connection, schema.jobs, name=point.job)
            seq = self._insert(
                connection, table, id=point.id, parent=point.parent, job_id=job_id, pid=point.pid,
                taken_at_us=(point.taken_at - _EPOCH) // dt.timedelta(microseconds=1),
                dump_uptime_ns=point.dump_uptime_ns, boot_id=point.boot_id, tracker=point.tracker,
                nonce=point.nonce, nr_tasks=point.nr_tasks, frozen_us=point.frozen_us,
                duration_us=point.duration_us, pages_dirty=point.pages_dirty, pages_new=point.pages_new,
                pages_total=point.pages_total, bytes_logical=point.bytes_logical,
                bytes_stored=point.bytes_stored, warnings=json.dumps(list(point.warnings)),
                images_pack=refs.images[0], images_frame=refs.images[1],
            )  # fmt: skip
            self._insert(connection, schema.page_maps, point_seq=seq, **self._map_columns(refs))
            for pid, start in point.tasks.items():
                self._insert(connection, schema.tasks, point_seq=seq, pid=pid, start_ticks=start)
            self._insert_packs(connection, packs)
            for file_id in sorted({self._file_id(connection, record) for record in files}):
                self._insert(connection, schema.point_files, point_seq=seq, file_id=file_id)
        return point

    @staticmethod
    def _insert(connection: sa.Connection, table: sa.Table, **values: object) -> int:
        key = connection.execute(sa.insert(table).values(**values)).inserted_primary_key
        return int(key[0]) if key else 0

    @staticmethod
    def _map_columns(refs: BlobRefs) -> dict[str, int]:
        return {
            "pack": refs.maps[0],
            "frame": refs.maps[1],
            "chain": refs.chain,
            "keyframe_bytes": refs.keyframe_bytes,
            "delta_bytes": refs.delta_bytes,
        }

    def _insert_packs(self, connection: sa.Connection, packs: Iterable[PackRow]) -> None:
        for pack in packs:
            self._insert(
                connection, schema.packs, id=pack.id, size_bytes=pack.size_bytes, nr_pages=pack.nr_pages
            )

    def _file_id(self, connection: sa.Connection, record: FileRecord) -> int:
        values = {
            "path": record.path,
            "dev": str(record.dev),
            "ino": str(record.ino),
            "size_bytes": record.size_bytes,
            "mtime_ns": record.mtime_ns,
            "build_id": record.build_id,
        }
        table = schema.file_identities
        found = connection.scalar(
            sa.select(table.c.id).where(*(table.c[name] == value for name, value in values.items()))
        )
        return int(found) if found is not None else self._insert(connection, table, **values)

    def set_sizes(self, sizes: Mapping[str, int]) -> None:
        """Bytes that each point takes up, by id; only what differs is written."""
        table = schema.points
        with self._read() as connection:
            known = dict(connection.execute(sa.select(table.c.id, table.c.bytes_stored)).tuples().all())
        changed = {point: size for point, size in sizes.items() if known.get(point, size) != size}
        if not changed:
            return
        with self._write() as connection:
            for point, size in changed.items():
                connection.execute(sa.update(table).where(table.c.id == point).values(bytes_stored=size))

    def forget(self, ids: Sequence[str]) -> list[str]:
        """Removes points; their children get the nearest ancestor that is left. Returns the ids removed."""
        table = schema.points
        removed = []
        with self._write() as connection:
            for point_id in ids:
                row = connection.execute(
                    sa.select(table.c.seq, table.c.parent).where(table.c.id == point_id)
                ).first()
                if row is None:
                    continue
                connection.execute(
                    sa.update(table).where(table.c.parent == point_id).values(parent=row.parent)
                )
                for child in (schema.page_maps, schema.tasks, schema.point_files):
                    connection.execute(sa.delete(child).where(child.c.point_seq == row.seq))
                connection.execute(sa.delete(table).where(table.c.seq == row.seq))
                removed.append(point_id)
        return removed

    def replace_packs(
        self, added: Iterable[PackRow], removed: Iterable[int], moved: dict[str, BlobRefs]
    ) -> None:
        """The commit point of a prune: new packs, new places of blobs, old packs gone, all or nothing."""
        table = schema.points
        with self._write() as connection:
            self._insert_packs(connection, added)
            for point_id, refs in moved.items():
                seq = connection.scalar(sa.select(table.c.seq).where(table.c.id == point_id))
                connection.execute(
                    sa.update(table)
                    .where(table.c.seq == seq)
                    .values(images_pack=refs.images[0], images_frame=refs.images[1])
                )
                connection.execute(
                    sa.update(schema.page_maps)
                    .where(schema.page_maps.c.point_seq == seq)
                    .values(**self._map_columns(refs))
                )
            for pack in removed:
                connection.execute(sa.delete(schema.packs).where(schema.packs.c.id == pack))
            used = sa.select(schema.points.c.job_id)
            connection.execute(sa.delete(schema.jobs).where(schema.jobs.c.id.not_in(used)))
            named = sa.select(schema.point_files.c.file_id)
            connection.execute(
                sa.delete(schema.file_identities).where(schema.file_identities.c.id.not_in(named))
            )
