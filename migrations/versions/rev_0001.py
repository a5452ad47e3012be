"""Jobs, points with their tasks and page maps, packs, file identities.

Revision ID: 0001
Revises: nothing: the first.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def _big(name: str) -> sa.Column[int]:
    return sa.Column(name, sa.BigInteger(), nullable=False)


def _int(name: str) -> sa.Column[int]:
    return sa.Column(name, sa.Integer(), nullable=False)


def _point_seq(table: str) -> sa.Column[int]:
    key = sa.ForeignKey("points.seq", name=f"fk_{table}_point_seq", ondelete="CASCADE")
    return sa.Column("point_seq", sa.Integer(), key, nullable=False)


def upgrade() -> None:
    """Makes every table of the first schema."""
    op.create_table(
        "jobs",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_jobs"),
        sa.UniqueConstraint("name", name="uq_jobs_name"),
    )
    op.create_table(
        "points",
        sa.Column("seq", sa.Integer(), nullable=False),
        sa.Column("id", sa.String(32), nullable=False),
        sa.Column("parent", sa.String(32)),
        sa.Column("job_id", sa.Integer(), sa.ForeignKey("jobs.id", name="fk_points_job_id"), nullable=False),
        _int("pid"),
        _big("taken_at_us"),
        _big("dump_uptime_ns"),
        sa.Column("boot_id", sa.String(36), nullable=False),
        sa.Column("tracker", sa.String(32), nullable=False),
        sa.Column("nonce", sa.Text(), nullable=False),
        _int("nr_tasks"),
        _big("frozen_us"),
        _big("duration_us"),
        _big("pages_dirty"),
        _big("pages_new"),
        _big("pages_total"),
        _big("bytes_logical"),
        _big("bytes_stored"),
        sa.Column("warnings", sa.Text(), nullable=False),
        _big("images_pack"),
        _int("images_frame"),
        sa.PrimaryKeyConstraint("seq", name="pk_points"),
        sa.UniqueConstraint("id", name="uq_points_id"),
    )
    op.create_index("ix_points_job_id", "points", ["job_id"])
    op.create_table(
        "page_maps",
        _point_seq("page_maps"),
        _big("pack"),
        _int("frame"),
        _int("chain"),
        _big("keyframe_bytes"),
        _big("delta_bytes"),
        sa.PrimaryKeyConstraint("point_seq", name="pk_page_maps"),
    )
    op.create_table(
        "tasks",
        _point_seq("tasks"),
        _int("pid"),
        _big("start_ticks"),
        sa.PrimaryKeyConstraint("point_seq", "pid", name="pk_tasks"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "packs",
        sa.Column("id", sa.BigInteger(), autoincrement=False, nullable=False),
        _big("size_bytes"),
        _big("nr_pages"),
        sa.PrimaryKeyConstraint("id", name="pk_packs"),
    )
    op.create_table(
        "file_identities",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("path", sa.Text(), nullable=False),
        sa.Column("dev", sa.Text(), nullable=False),
        sa.Column("ino", sa.Text(), nullable=False),
        _big("size_bytes"),
        _big("mtime_ns"),
        sa.Column("build_id", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_file_identities"),
        sa.UniqueConstraint(
            "path", "dev", "ino", "size_bytes", "mtime_ns", "build_id", name="uq_file_identities_path"
        ),
    )
    op.create_table(
        "point_files",
        _point_seq("point_files"),
        sa.Column(
            "file_id",
            sa.Integer(),
            sa.ForeignKey("file_identities.id", name="fk_point_files_file_id"),
            nullable=False,
        ),
        sa.PrimaryKeyConstraint("point_seq", "file_id", name="pk_point_files"),
        sqlite_with_rowid=False,
    )
