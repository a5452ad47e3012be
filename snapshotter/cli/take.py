"""`snap take PID`: take a point. With --pidfile it is made for cron."""

from __future__ import annotations

from pathlib import Path

import click

from snapshotter.base.errors import JobEndedError, UsageError
from snapshotter.base.units import format_bytes, format_us, plural
from snapshotter.cli.options import App, common, max_frozen
from snapshotter.cli.output import point_json, short


def _no_empty_path(context: click.Context, param: click.Parameter, value: str | None) -> Path | None:
    """A variable that is not set must not name the current directory, which is what Path("") is."""
    if value == "":
        raise click.BadParameter("the name is empty", context, param)
    return None if value is None else Path(value)


@click.command("take")
@click.argument("pid", type=int, required=False)
@click.option("--job", metavar="NAME", help="Name of the job (default: command's name and pid).")
@click.option("--pidfile", callback=_no_empty_path, help="Read the pid from a file; for cron, see above.")
@click.option(
    "--keep-last", type=click.IntRange(min=1), metavar="N", help="With --pidfile: forget older points."
)
@click.option(
    "--other-program",
    is_flag=True,
    help="Take the point under the job's name although PID is not a restart of the job's program.",
)
@click.option("--stop", is_flag=True, help="Leave the job stopped (SIGSTOP).")
@click.option("--kill", is_flag=True, help="Kill the job once the point is safe on disk.")
@click.option(
    "--tracker",
    type=click.Choice(["auto", "write_protect", "soft_dirty", "compare"]),
    default="auto",
    help="How written pages are found (default: the best that works here). See above.",
)
@max_frozen
@common
def command(
    app: App,
    pid: int | None,
    job: str | None,
    pidfile: Path | None,
    keep_last: int | None,
    other_program: bool,
    tracker: str,
    max_frozen_s: float | None,
    stop: bool,
    kill: bool,
) -> int:
    """Take a point of the process PID and everything below it.

    The job goes on unless --stop or --kill is given. Points of one job form a chain: each stores only
    what is new.

    For cron: `snap take --job sim --pidfile FILE --quiet` skips, with a message and status 0, while an
    earlier take of the job still runs. Once the job has ended the status is 8, and the first run says so.

    A job's name belongs to one program of one user: a restart of it goes on under the name, another
    program is refused.

    A small process called keeper stays beside the job until the job ends. It holds what the kernel knows of
    the pages written since this point, so that the next take need not read everything. Ending it is
    harmless: the next take then reads all memory.

    --tracker write_protect (what auto uses where it works) marks the job's mappings with userfaultfd. A mapping
    that the job makes later does not merge with a marked one, so mremap(2) over both at once fails with EFAULT. Few
    programs do that. For one that does, give --tracker compare at every take: it reads all memory each time, and leaves
    no mark and no keeper on the job. It also ends what an earlier take has left.
    """
    from snapshotter.manager.ports import Skipped
    from snapshotter.manager.take import take, take_periodic

    if stop and kill:
        raise UsageError("--stop and --kill exclude each other", hint="a killed job cannot be left stopped")
    after = "stop" if stop else "kill" if kill else "run"
    with app.session(max_frozen_s=max_frozen_s, tracker=tracker) as session:
        if pidfile is not None:
            if pid is not None:
                raise UsageError("PID and --pidfile exclude each other")
            if job is None:
                raise UsageError(
                    "--pidfile needs --job NAME", hint="the job keeps its name when its pid changes"
                )
            done = take_periodic(
                session, pidfile, job=job, after=after, max_points=keep_last, other_program=other_program
            )
            if isinstance(done, Skipped):
                app.out.result({"skipped": done.reason, "job": done.job, "message": done.message}, ())
                if not done.said_before:
                    app.out.note(done.message)
                return JobEndedError.exit_status if done.reason == "ended" else 0
            point = done
        else:
            if keep_last is not None:
                raise UsageError(
                    "--keep-last needs --pidfile", hint="or use: snap forget --keep-last N --job NAME"
                )
            if pid is None:
                raise UsageError("which process? give its PID or --pidfile", hint="snap take --help")
            point = take(session, pid, job=job, after=after, other_program=other_program)
    parent = f", after {short(point.parent)}" if point.parent else ""
    frozen = f"{plural(point.nr_tasks, 'task')}, frozen {format_us(point.frozen_us)} of {format_us(point.duration_us)}"
    stored = f"{format_bytes(point.bytes_stored)} stored for {format_bytes(point.bytes_logical)}"
    app.out.warnings(point.warnings)
    app.out.result(
        point_json(point),
        [
            f"{short(point.id)}  {point.job}{parent}",
            f"{frozen}, {stored} ({point.tracker})",
        ],
        brief=point.id,
    )
    return 0
