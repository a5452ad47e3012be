"""`snap verify`: whether points can be read back whole."""

from __future__ import annotations

import click

from snapshotter.base.errors import VerificationError
from snapshotter.base.units import format_bytes, plural
from snapshotter.cli.options import App, common
from snapshotter.cli.output import short


@click.command("verify")
@click.argument("points", metavar="[POINT|A..B]...", nargs=-1)
@common
def command(app: App, points: tuple[str, ...]) -> int:
    """Read everything that POINTs (default: all) need and check it against its digests.

    Names the points that damage hurts, and ends with status 12; the other points still restore.
    """
    from snapshotter.manager.upkeep import verify

    with app.session() as session:
        report = verify(session, points)
    lines = [f"{item.where}: {item.what}" for item in report.damage]
    hurt = report.points_hurt
    summary = f"{plural(len(report.points), 'point')} checked, {format_bytes(report.bytes_read)} read, " + (
        f"{plural(len(hurt), 'point')} hurt" if report.damage else "no damage"
    )
    named = [f"hurt: {' '.join(short(point) for point in hurt)}"] if hurt else []
    app.out.result(
        {
            "ok": report.ok,
            "points": list(report.points),
            "points_hurt": list(hurt),
            "nr_packs": report.nr_packs,
            "nr_frames": report.nr_frames,
            "nr_pages": report.nr_pages,
            "bytes_read": report.bytes_read,
            "damage": [
                {"where": item.where, "what": item.what, "points": list(item.points)}
                for item in report.damage
            ],
        },
        [*lines, *named, summary],
        brief=hurt,
    )
    return 0 if report.ok else VerificationError.exit_status
