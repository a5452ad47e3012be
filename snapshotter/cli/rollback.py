"""`snap rollback POINT`: bring the job back."""

from __future__ import annotations

import click

from snapshotter.base.units import format_bytes, format_us, plural
from snapshotter.cli.options import App, common, max_frozen
from snapshotter.cli.output import short


@click.command("rollback")
@click.argument("point", metavar="POINT")
@click.option("-n", "--dry-run", is_flag=True, help="Check everything and print the plan; touch nothing.")
@max_frozen
@click.option(
    "--stop", "leave_stopped", is_flag=True, help="Leave the restored job stopped (SIGCONT lets it go)."
)
@click.option(
    "--terminal",
    type=click.Choice(["auto", "null"]),
    default="auto",
    show_default=True,
    help="If the job's terminal is gone: auto refuses, null gives it /dev/null instead.",
)
@click.option(
    "--hang-up",
    is_flag=True,
    help="Kill the job although that hangs its terminal up: the window or connection on it closes.",
)
@click.option(
    "--detach-from-parent",
    is_flag=True,
    help="Kill the job although its parent or supervisor notices: it may go on, or start another one.",
)
@click.option(
    "--little-memory", is_flag=True, help="Try it although the job may not fit into the free memory."
)
@common
def command(
    app: App,
    point: str,
    dry_run: bool,
    max_frozen_s: float | None,
    leave_stopped: bool,
    terminal: str,
    hang_up: bool,
    detach_from_parent: bool,
    little_memory: bool,
) -> int:
    """Bring the job back as it was at POINT, under the same pids, detached.

    If the job is still alive it is replaced, once everything that can be checked has been checked. A
    point can be rolled back to any number of times, in any order.

    A living job is killed only if nothing else depends on it. A shell that leads the session of a terminal,
    a job that its parent waits for and the main process of a service are refused, unless an option allows
    it; nothing is touched then.
    """
    from snapshotter.manager.rollback import rollback

    with app.session(max_frozen_s=max_frozen_s) as session:
        options = {
            "hang-up": hang_up,
            "detach-from-parent": detach_from_parent,
            "little-memory": little_memory,
        }
        report = rollback(
            session,
            point,
            dry_run=dry_run,
            leave_stopped=leave_stopped,
            terminal=terminal,
            allow=frozenset(name for name, given in options.items() if given),
        )
    restored = report.restored
    app.out.warnings(report.warnings)
    if dry_run:
        plan = {
            "id": report.point.id,
            "job": report.point.job,
            "dry_run": True,
            "root_pid": restored.root_pid,
            "pids": list(restored.pids),
        }
        app.out.result(
            plan | {"plan": restored.plan, "warnings": list(report.warnings)},
            restored.plan_text.split("\n"),
        )
        return 0
    app.out.result(
        {
            "id": report.point.id,
            "job": report.point.job,
            "root_pid": restored.root_pid,
            "pids": list(restored.pids),
            "duration_us": restored.duration_us,
            "pages_written": restored.pages_written,
            "warnings": list(report.warnings),
        },
        f"{report.point.job} runs again as it was at {short(report.point.id)}: pid {restored.root_pid}, "
        f"{plural(len(restored.pids), 'process', 'processes')}, "
        f"{format_bytes(restored.pages_written * 4096)} of memory, {format_us(restored.duration_us)}",
        brief=report.point.id,
    )
    return 0
