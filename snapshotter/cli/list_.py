"""`snap list`: which points there are."""

from __future__ import annotations

import click

from snapshotter.base.units import format_bytes, format_us
from snapshotter.cli.options import App, common
from snapshotter.cli.output import local, point_json, short, table

HEADS = ("ID", "JOB", "TAKEN", "TASKS", "FROZEN", "MEMORY", "STORED", "PARENT")


@click.command("list")
@click.option("--job", metavar="NAME", help="Only this job's points.")
@common
def command(app: App, job: str | None) -> int:
    """List points, oldest first."""
    from snapshotter.manager.listing import list_points

    with app.session() as session:
        points = list_points(session, job)
        where = session.store_path
    rows = [
        (
            short(point.id),
            point.job,
            local(point.taken_at),
            str(point.nr_tasks),
            format_us(point.frozen_us),
            format_bytes(point.bytes_logical),
            format_bytes(point.bytes_stored),
            short(point.parent),
        )
        for point in points
    ]
    app.out.result(
        {"points": [point_json(point) for point in points]},
        table(HEADS, rows, right=(3, 4, 5, 6)) if rows else [f"no points in {where}"],
        brief=[point.id for point in points],
    )
    return 0
