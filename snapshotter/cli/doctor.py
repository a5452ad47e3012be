"""`snap doctor`: whether this machine is fit."""

from __future__ import annotations

import click

from snapshotter.cli.options import App, common
from snapshotter.cli.output import table


@click.command("doctor")
@common
def command(app: App) -> int:
    """Try what the kernel can do, and look at permissions and the store. Changes nothing.

    Status 0 if jobs can be taken and rolled back here, 1 if something is in the way.
    """
    from snapshotter.manager.doctor import doctor

    with app.session() as session:
        report = doctor(session)
    features = [
        (str(item["name"]), "yes" if item["ok"] else "no", str(item["note"] or ""))
        for item in report.features
    ]
    notes = [
        f"{note.level:8} {note.subject}: {note.text}" + (f" ({note.hint})" if note.hint else "")
        for note in report.notes
    ]
    app.out.result(
        {
            "ok": report.ok,
            "kernel": report.kernel,
            "features": [dict(item) for item in report.features],
            "notes": [note.as_dict() for note in report.notes],
            "store": dict(report.store),
        },
        [f"Linux {report.kernel}", *table(("FEATURE", "", "NOTE"), features), "", *notes],
        brief=[text for text in notes if not text.startswith("ok")],
    )
    return 0 if report.ok else 1
