"""Which job a pid file means, for periodic takes.

A pid file is read long after it was written, so its pid may belong to somebody else by now. The process
counts as the job if a point or a rollback of the job says so, or else if it started before the pid
file was written. Everything else is doubt, and doubt never takes a stranger's memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from snapshotter.base.errors import UsageError, wrap_os_error
from snapshotter.manager.ports import Identity

CLOCK_SLACK_S = 2.0
"""Start times have 10 ms ticks, and the wall clock may have been slewed since."""


@dataclass(frozen=True, slots=True)
class PidFile:
    """The pid in the file and when the file was written (wall clock seconds)."""

    path: Path
    pid: int
    written_at: float


def read(path: Path) -> PidFile | None:
    """None when there is no such file: the job has ended and tidied up, or has not started."""
    try:
        with path.open("rb") as file:
            text = file.read(64).strip()
            written_at = path.stat().st_mtime
    except FileNotFoundError:
        return None
    except OSError as error:
        raise wrap_os_error(error, "cannot read the pid file", where=str(path)) from error
    try:
        pid = int(text.split()[0])
    except (ValueError, IndexError) as error:
        raise UsageError(
            f"no pid in it (found {text.decode(errors='replace')!r})",
            where=str(path),
            hint="the first word of a pid file is the number of the job's first process",
        ) from error
    if not 0 < pid < 1 << 22:
        raise UsageError(f"{pid} is no pid", where=str(path))
    return PidFile(path, pid, written_at)


def could_mean(pidfile: PidFile, identity: Identity) -> bool:
    """Whether the process is old enough to be the one that the file was written for."""
    return identity.started_at <= pidfile.written_at + CLOCK_SLACK_S
