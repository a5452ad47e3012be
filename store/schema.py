"""The catalog's tables (SQLAlchemy Core). migrations/ makes them; a test holds the two together.

Small rows only: never one per page. Ids of packs and frames point into the pack files, which
the catalog does not know otherwise.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Column,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
)

SCHEMA_REVISION = "0001"
"""The newest revision in migrations/versions; a catalog that has it is used without importing Alembic."""

metadata = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "ix": "ix_%(table_name)s_%(column_0_name)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
    }
)

alembic_version = Table("alembic_version", MetaData(), Column("version_num", String(32), primary_key=True))
"""Alembic's own table, for reading; not part of `metadata`, Alembic makes it."""

jobs = Table(
    "jobs",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("name", Text, nullable=False, unique=True),
)

points = Table(
    "points",
    metadata,
    Column("seq", Integer, primary_key=True),  # order of commits
    Column("id", String(32), nullable=False, unique=True),
    Column("parent", String(32)),  # re-linked, not cascaded, when the parent is forgotten
    Column("job_id", ForeignKey("jobs.id"), nullable=False),
    Column("pid", Integer, nullable=False),
    Column("taken_at_us", BigInteger, nullable=False),  # since the epoch, UTC
    Column("dump_uptime_ns", BigInteger, nullable=False),
    Column("boot_id", String(36), nullable=False),
    Column("tracker", String(32), nullable=False),
    Column("nonce", Text, nullable=False),
    Column("nr_tasks", Integer, nullable=False),
    Column("frozen_us", BigInteger, nullable=False),
    Column("duration_us", BigInteger, nullable=False),
    Column("pages_dirty", BigInteger, nullable=False),
    Column("pages_new", BigInteger, nullable=False),
    Column("pages_total", BigInteger, nullable=False),
    Column("bytes_logical", BigInteger, nullable=False),
    Column("bytes_stored", BigInteger, nullable=False),
    Column("warnings", Text, nullable=False),  # JSON list
    Column("images_pack", BigInteger, nullable=False),
    Column("images_frame", Integer, nullable=False),
    Index("ix_points_job_id", "job_id"),
)

page_maps = Table(
    "page_maps",
    metadata,
    Column("point_seq", ForeignKey("points.seq", ondelete="CASCADE"), primary_key=True),
    Column("pack", BigInteger, nullable=False),
    Column("frame", Integer, nullable=False),
    Column("chain", Integer, nullable=False),  # deltas since the keyframe, 0: this is one
    Column("keyframe_bytes", BigInteger, nullable=False),
    Column("delta_bytes", BigInteger, nullable=False),  # of the deltas since, this one included
)

tasks = Table(
    "tasks",
    metadata,
    Column("point_seq", ForeignKey("points.seq", ondelete="CASCADE"), primary_key=True),
    Column("pid", Integer, primary_key=True),
    Column("start_ticks", BigInteger, nullable=False),
    sqlite_with_rowid=False,
)

packs = Table(
    "packs",
    metadata,
    Column("id", BigInteger, primary_key=True, autoincrement=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("nr_pages", BigInteger, nullable=False),
)

file_identities = Table(
    "file_identities",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("path", Text, nullable=False),
    Column("dev", Text, nullable=False),  # decimal: 64 unsigned bits do not fit everywhere
    Column("ino", Text, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("mtime_ns", BigInteger, nullable=False),
    Column("build_id", LargeBinary, nullable=False),
    UniqueConstraint("path", "dev", "ino", "size_bytes", "mtime_ns", "build_id"),
)

point_files = Table(
    "point_files",
    metadata,
    Column("point_seq", ForeignKey("points.seq", ondelete="CASCADE"), primary_key=True),
    Column("file_id", ForeignKey("file_identities.id"), primary_key=True),
    sqlite_with_rowid=False,
)
