"""`snap forget POINT..`: remove points."""

from __future__ import annotations

import click

from snapshotter.base.errors import UsageError
from snapshotter.base.units import plural
from snapshotter.cli.options import App, common
from snapshotter.cli.output import local, short


@click.command("forget")
@click.argument("points", metavar="[POINT|A..B]...", nargs=-1)
@click.option(
    "--keep-last", type=click.IntRange(min=1), metavar="N", help="Forget all but the job's N youngest."
)
@click.option("--job", metavar="NAME", help="The job of --keep-last.")
@click.option("-n", "--dry-run", is_flag=True, help="Only say which points would go.")
@common
def command(app: App, points: tuple[str, ...], keep_last: int | None, job: str | None, dry_run: bool) -> int:
    """Remove points; those that remain stay whole. `snap prune` then frees the space.

    If one of the names means no point, nothing is removed.
    """
    from snapshotter.manager.upkeep import forget, forget_all_but

    if (keep_last is None) == (not points):
        raise UsageError("name the points to forget, or use --keep-last N --job NAME", hint="snap list")
    if (keep_last is None) != (job is None):
        raise UsageError("--keep-last and --job belong together")
    with app.session() as session:
        if keep_last is not None and job is not None:
            gone = forget_all_but(session, job, keep_last, dry_run=dry_run)
        else:
            gone = forget(session, points, dry_run=dry_run)
    verb = "would forget" if dry_run else "forgot"
    lines = [f"{verb} {short(point.id)}  {point.job}  {local(point.taken_at)}" for point in gone]
    app.out.result(
        {"forgotten": [point.id for point in gone], "dry_run": dry_run},
        lines or [f"nothing to forget ({plural(0, 'point')})"],
        brief=[point.id for point in gone],
    )
    return 0
