"""`snap check PID`: whether a job can be taken."""

from __future__ import annotations

import click

from snapshotter.base.errors import UnsupportedError
from snapshotter.base.units import plural
from snapshotter.cli.options import App, common


@click.command("check")
@click.argument("pid", type=int)
@common
def command(app: App, pid: int) -> int:
    """Say whether the job below PID can be taken, and if not, what is in the way and what to do.

    Only looks; the job is not touched. Status 0 if it can be taken, 5 if not.
    """
    with app.session() as session:
        checked = session.engine.check(pid)
    findings = checked.findings
    if findings:
        lines = [f"job {pid} cannot be taken:", *(f"  {finding}" for finding in findings)]
    else:
        lines = [f"job {pid} can be taken: {plural(checked.nr_tasks, 'task')}"]
        if checked.unseen:
            lines.append(f"  only a take can see: {', '.join(checked.unseen)}")
    app.out.result(
        {
            "pid": pid,
            "ok": not findings,
            "nr_tasks": checked.nr_tasks,
            "pids": list(checked.pids),
            "warnings": list(checked.warnings),
            "unseen": list(checked.unseen),
            "findings": [finding.as_dict() for finding in findings],
        },
        lines,
    )
    app.out.warnings(checked.warnings)
    return UnsupportedError.exit_status if findings else 0
