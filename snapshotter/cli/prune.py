"""`snap prune`: free space."""

from __future__ import annotations

import dataclasses

import click

from snapshotter.base.units import format_bytes, plural
from snapshotter.cli.options import App, common


@click.command("prune")
@click.option("-n", "--dry-run", is_flag=True, help="Only say what would be freed.")
@common
def command(app: App, dry_run: bool) -> int:
    """Free the space that no point needs any more: forgotten points, takes that were interrupted."""
    from snapshotter.manager.upkeep import prune

    with app.session() as session:
        report = prune(session, dry_run=dry_run)
    verb = "would free" if dry_run else "freed"
    app.out.result(
        dataclasses.asdict(report),
        f"{verb} {format_bytes(report.bytes_freed)} ({plural(report.packs_removed, 'pack')} removed, "
        f"{report.packs_repacked} repacked, {plural(report.garbage_removed, 'stray file')}); "
        f"{format_bytes(report.bytes_kept)} kept",
    )
    app.out.warnings(report.warnings)
    return 0
