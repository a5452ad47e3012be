"""Which job a pid file means, for periodic takes.

A pid file is read long after it was written, so its pid may belong to somebody else by now. What a point or a
rollback says of a process (boot id, pid, start time) needs no clock and settles it. Else times must: a process is the
one that the file was written for only if it is older than the file. The start of a process is known on CLOCK_BOOTTIME,
which nobody sets; the file's time stamp is of the wall clock, which may have been set since. So the stamp is
translated by every offset between the two clocks that is known: today's, and those at the points of this boot. Where
they disagree, or the stamp lies in the future, the clock was set and there is no telling: that is doubt, and doubt is
said aloud, neither taking a stranger's memory nor calling a living job ended.

Whoever can write a pid file chooses what root takes, and with --kill what root kills. So the file, and every directory
where somebody could put another one in its place, belongs to root, to the caller, or to the one user whose process
it names; nobody else may write them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from snapshotter.base import trust
from snapshotter.base.errors import PermissionDeniedError, UsageError, wrap_os_error
from snapshotter.manager.ports import Identity
from store import Point

CLOCK_SLACK_S = 2.0
"""Start times have 10 ms ticks, file systems coarse stamps, and leap seconds are steps too."""

_MAX_BYTES = 4096
_PID_DIGITS = 20
_OWNER_HINT = "let root own the pid file and its directory, or name the process: snap take PID --job NAME"

Verdict = Literal["job", "ended", "stranger", "doubt"]


@dataclass(frozen=True, slots=True)
class PidFile:
    """The pid in the file and when the file was written (wall clock seconds)."""

    path: Path
    pid: int
    written_at: float
    owners: frozenset[int] = frozenset()
    """Users besides root and the caller who could have written it."""


def read(path: Path) -> PidFile | None:
    """None when there is no such file: the job has ended and tidied up, or has not started."""
    try:
        found = trust.read(path, trust.callers(), limit=_MAX_BYTES, hint=_OWNER_HINT, tolerant=True)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise wrap_os_error(error, "cannot read the pid file", where=str(path)) from error
    # Errors never quote the content: who names the file need not have the right to read it.
    words = found.data.split()
    pid = int(words[0]) if words and len(words[0]) < _PID_DIGITS and words[0].isdigit() else 0
    if not 0 < pid < 1 << 22:
        raise UsageError(
            "there is no pid in it",
            where=str(path),
            hint="the first word of a pid file is the number of the job's first process",
        )
    return PidFile(path, pid, found.status.st_mtime, found.strangers)


def require_right(pidfile: PidFile, identity: Identity) -> None:
    """Raise PermissionDeniedError unless whoever could have written the file owns the process that it names."""
    if pidfile.owners and pidfile.owners != identity.uids:
        uids = ", ".join(str(uid) for uid in sorted(pidfile.owners))
        runs_as = ", ".join(str(uid) for uid in sorted(identity.uids))
        raise PermissionDeniedError(
            f"uid {uids} can write this pid file, and process {identity.pid} ({identity.comm}) runs as uid {runs_as}: "
            "a user's pid file may only name that user's processes",
            where=str(pidfile.path),
            hint=_OWNER_HINT,
        )


def judge(pidfile: PidFile, identity: Identity, points: Iterable[Point]) -> Verdict:
    """Whether a process that no point of the job knows is the one that the file was written for.

    Args:
        pidfile: What the file says.
        identity: The process that has the file's pid now.
        points: The job's. None of them may be of this very process.

    Returns:
        "job"; "stranger" (it is younger than the file); "ended" (the same, and the file was written for a process that a
        point knows, which is gone); "doubt" (the clock was set meanwhile).
    """
    points = list(points)
    known = [point for point in points if point.boot_id == identity.boot_id]
    if pidfile.written_at > identity.seen_at + CLOCK_SLACK_S:
        return "doubt"  # the clock was set back since, or the stamp is made up
    now_s = identity.seen_at - identity.uptime_s
    older = {
        identity.started_uptime_s <= pidfile.written_at - offset_s + CLOCK_SLACK_S
        for offset_s in [now_s, *map(_offset_s, known)]
    }
    if len(older) > 1:
        return "doubt"
    if older == {True}:
        return "job"
    return "ended" if any(_was_written_for(pidfile, point) for point in points) else "stranger"


def _offset_s(point: Point) -> float:
    """Wall clock minus CLOCK_BOOTTIME when the point was taken."""
    return point.taken_at.timestamp() - point.dump_uptime_ns / 1e9


def _was_written_for(pidfile: PidFile, point: Point) -> bool:
    """Whether the file, as it is now, was there when the point was taken and meant the point's root.

    The lower bound keeps a file of a machine without a battery-backed clock, which wakes up in the past, from passing
    for one that an earlier boot left behind.
    """
    if point.pid != pidfile.pid or point.pid not in point.tasks:
        return False
    started_at = _offset_s(point) + point.tasks[point.pid] / os.sysconf("SC_CLK_TCK")
    return started_at - CLOCK_SLACK_S <= pidfile.written_at <= point.taken_at.timestamp() + CLOCK_SLACK_S
