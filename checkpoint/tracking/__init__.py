"""Trackers: which pages of a job were written since an instant. See base.py for the interface.

Chosen by probing: write_protect, then soft_dirty, then compare.
"""

from __future__ import annotations

from checkpoint.tracking.base import EMPTY, Probe, Runs, Session, Tracker
from checkpoint.tracking.compare import CompareTracker
from checkpoint.tracking.soft_dirty import SoftDirtyTracker
from checkpoint.tracking.write_protect import WriteProtectTracker
from snapshotter.base.errors import UsageError

TRACKERS: tuple[type[Tracker], ...] = (WriteProtectTracker, SoftDirtyTracker, CompareTracker)
"""Best first."""


def choose(name: str = "auto") -> Tracker:
    """The tracker of that name, or the best that works here.

    Raises:
        UsageError: no tracker has this name, or it does not work on this kernel.
    """
    for kind in TRACKERS:
        if name in {"auto", kind.name}:
            found = kind.probe()
            if found.ok:
                return kind()
            if name != "auto":
                raise UsageError(
                    f"the tracker {name} does not work here: {found.note}", hint="use auto or compare"
                )
    raise UsageError(
        f"no tracker is called {name!r}", hint="auto, " + ", ".join(kind.name for kind in TRACKERS)
    )


__all__ = ["EMPTY", "TRACKERS", "Probe", "Runs", "Session", "Tracker", "choose"]
