"""`snap forget POINT..`: remove points."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from snapshotter.base.errors import UsageError
from snapshotter.base.units import plural
from snapshotter.cli.options import App, common
from snapshotter.cli.output import local, short, write_error

if TYPE_CHECKING:
    from snapshotter.manager.upkeep import Selection


@click.command("forget")
@click.argument("points", metavar="[POINT|A..B|JOB]...", nargs=-1)
@click.option(
    "--keep-last", type=click.IntRange(min=1), metavar="N", help="Forget all but the job's N youngest."
)
@click.option("--job", metavar="NAME", help="The job of --keep-last.")
@click.option("-n", "--dry-run", is_flag=True, help="Only say which points would go.")
@click.option(
    "-y", "--yes", is_flag=True, help="Forget all points of a JOB or of a range without a question."
)
@common
def command(
    app: App, points: tuple[str, ...], keep_last: int | None, job: str | None, dry_run: bool, yes: bool
) -> int:
    """Remove points; those that remain stay whole. `snap prune` then frees the space.

    A JOB means all of its points, A..B all points from A to B. Both are asked about on a terminal and need --yes
    elsewhere. If one of the names means no point, nothing is removed.
    """
    from snapshotter.manager.upkeep import forget, forget_all_but, select

    if (keep_last is None) == (not points):
        raise UsageError("name the points to forget, or use --keep-last N --job NAME", hint="snap list")
    if (keep_last is None) != (job is None):
        raise UsageError("--keep-last and --job belong together")
    with app.session() as session:
        if keep_last is not None and job is not None:
            gone = forget_all_but(session, job, keep_last, dry_run=dry_run)
        else:
            selected = select(session, points)
            gone = list(selected.points)
            if not dry_run:
                if selected.wide and not yes and not _agreed(selected):
                    write_error("snap: nothing was forgotten")
                    return 1
                forget(session, gone)
    verb = "would forget" if dry_run else "forgot"
    lines = [f"{verb} {short(point.id)}  {point.job}  {local(point.taken_at)}" for point in gone]
    app.out.result(
        {"forgotten": [point.id for point in gone], "dry_run": dry_run},
        lines or [f"nothing to forget ({plural(0, 'point')})"],
        brief=[point.id for point in gone],
    )
    return 0


def _agreed(selected: Selection) -> bool:
    """The user's answer to a question on the terminal. UsageError where there is none."""
    names = ", ".join(selected.wide)
    jobs = ", ".join(sorted({point.job for point in selected.points}))
    what = f"{names} means {plural(len(selected.points), 'point')} of {jobs}"
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise UsageError(
            f"{what}; nothing was forgotten",
            hint="add --yes to forget them all (--dry-run shows them); JOB~0 is the newest point alone",
        )
    oldest, newest = selected.points[0], selected.points[-1]
    write_error(f"snap: {what}, {local(oldest.taken_at)} to {local(newest.taken_at)}")
    return click.confirm("Forget them?", default=False, err=True)
