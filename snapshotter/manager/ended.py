"""Whether somebody was told already that a job has ended, so that cron does not say it every ten minutes.

The mark is one small JSON file per job in the store's `heads/` (store/FORMAT.md, "Heads"). It names the job's newest point and last
rollback: once there is a newer one, the job ran again, and its next end is said again. Without the file the end is said once more.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from snapshotter.base.errors import SnapshotterError
from snapshotter.manager.jobs import Head
from store import Point
from store.files import make_dir, publish, wrapped


def first_time(store: Path, job: str, points: Sequence[Point], head: Head | None) -> bool:
    """Whether this end of the job has not been reported yet; from now on it counts as reported.

    Args:
        store: The store's directory.
        job: A job that has points.
        points: All of them, in the order of the commits.
        head: Its last rollback, if there was one.
    """
    text = json.dumps(
        {"point": points[-1].id, "restored_uptime_ns": 0 if head is None else head.restored_uptime_ns}
    )
    path = store / "heads" / f"{job}.ended"
    try:
        if path.read_text() == text:
            return False
    except (OSError, ValueError):
        pass
    try:
        with wrapped("cannot record that the job has ended", path):
            make_dir(path.parent)
            publish(path.parent, path.name, text.encode())
    except SnapshotterError:
        return True  # a full or read-only disk: better to say it twice than never
    return True
