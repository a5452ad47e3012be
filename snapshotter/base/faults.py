"""Named instants at which a test can make `snap` die, fail or stop: fault points.

`SNAP_FAULT="name:action[,name:action...]"` selects them; actions are `kill` (SIGKILL to ourselves, nothing is
cleaned up), `error` (raises FaultInjectedError) and `stop` (SIGSTOP to ourselves, so that a test can look round
and then kill or continue). `name@N:action` acts at the N-th passage only (from 1).

The names are registered here so that a test can go through all of them and a misspelt one is an error at
both ends. A passage costs one dictionary look-up when nothing is selected.
"""

from __future__ import annotations

import os
import signal

from snapshotter.base.errors import SnapshotterError, UsageError

POINTS: dict[str, str] = {
    # engine, dump
    "dump.looked": "the job was looked at, nothing was touched",
    "dump.armed": "the tracker is armed, the nonce not yet valid",
    "transfers.stopped": "one task that might be in a transfer stands, the others run",
    "dump.precopied": "the pages were read while the job ran",
    "freeze.seized": "a task was seized, not yet interrupted",
    "freeze.interrupted": "a task was interrupted",
    "freeze.signal": "a seized task has stopped for a signal of its own, which it has not got yet",
    "dump.frozen": "every task is stopped",
    "dump.infected": "a parasite is in a task",
    "dump.state": "the small state of one process was dumped",
    "dump.collected": "the tracker was read and reset, the nonce is invalid",
    "dump.copied": "the pages written since the pre-copy are in snap's memory",
    "thaw.begin": "everything is dumped, nothing thawed",
    "thaw.detached": "one task was detached",
    "dump.thawed": "the job runs again, nothing is committed",
    "dump.commit": "just before the commit",
    "dump.committed": "the point exists, the tracker does not know yet",
    "track.created": "a userfaultfd was made in the target, not yet closed there",
    "track.keeper": "the keeper runs, its state file is not written",
    "track.described": "the state file is written beside the old one, the old keeper is the one that counts",
    "track.kept": "the new keeper was told to take over, the nonce is not yet valid",
    # engine, parasite
    "parasite.frames": "the fail-safe frames are written, the registers still the task's own",
    "parasite.redirected": "the task would leave through the frames; its signals are not blocked yet",
    "parasite.blocked": "signals are blocked, nothing was called",
    "parasite.mapped_code": "the code page is mapped and empty",
    "parasite.mapped": "code and data are mapped and empty",
    "parasite.loaded": "the blob is in place",
    "parasite.written": "a batch is written, not started",
    "parasite.started": "the registers point into the blob, the batch has not run",
    "parasite.ran": "a batch ran, its results are not read",
    "parasite.leaving": "the area is mapped, the task would leave through the frames",
    "parasite.unmapped": "the area is gone, the task would leave through the frames",
    "parasite.unblocked": "the signal mask is the task's own again, the registers are not",
    "parasite.parked": "the task's registers are its own again",
    # engine, calls that the freeze has cut short
    "parked.frames": "the fail-safe frames of a task to be parked are written, its registers still its own",
    "parked.redirected": "it would sleep and leave through the frames; its signals are not blocked yet",
    "parked.blocked": "it will sleep as soon as it is let go",
    "attend.parked": "the job runs, one task sleeps and has no attendant",
    "attend.started": "one task has its attendant",
    # engine, all or none (`take --stop`, `take --kill`, and a rollback that replaces the job)
    "finish.signalled": "one process of a job that is to be stopped or killed as a whole was told so",
    "stub.spawned": "the first stub exists and is seized, not yet executed",
    # engine, restore
    "restore.planned": "the plan is made, nothing was touched",
    "restore.watched": "the finisher and the watchdog run, the old job was not touched",
    "restore.held": "the old job is frozen and about to be killed",
    "restore.killed": "the old job is gone, no stub yet",
    "restore.root_stub": "the root stub exists",
    "restore.settled": "memory that a process will share with its children is in place, before it makes them",
    "restore.tree": "all stub processes exist",
    "restore.files": "descriptors are installed",
    "restore.memory": "memory of one process is in place",
    "restore.threads": "threads exist",
    "restore.state": "all state is set, nothing detached",
    "restore.unguarding": "one task would outlive snap, the others not yet",
    "restore.unguarded": "every task outlives snap from here on, nothing is detached",
    "restore.detached": "one task was detached",
    # store
    "store.pack_written": "a pack was written, not yet synced",
    "store.pack_synced": "a pack was synced under its temporary name",
    "store.pack_renamed": "a pack has its final name",
    "store.before_commit": "all packs are durable, the catalog does not know them",
    "store.committed": "the catalog transaction ended",
    "store.prune_copied": "prune has written new packs",
    "store.prune_committed": "prune has switched the catalog, old packs are still there",
    "store.prune_deleted": "prune has deleted one old pack",
}
"""Every fault point and what is true at that instant. Add a name here before using it."""


class FaultInjectedError(SnapshotterError):
    """A fault point was told to fail (SNAP_FAULT)."""

    code = "fault_injected"


_selected: dict[str, tuple[int, str]] | None = None
_passed: dict[str, int] = {}


def configure(text: str) -> None:
    """Select fault points; "" selects none. Forgets how often each was passed."""
    global _selected
    selected: dict[str, tuple[int, str]] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, _, action = item.partition(":")
        name, _, count = name.partition("@")
        if name not in POINTS:
            raise UsageError(f"no fault point is called {name!r}", where="SNAP_FAULT")
        if action not in {"kill", "error", "stop"} or (count and not count.isdigit()):
            raise UsageError(f"{item!r} is not name[@N]:kill|error|stop", where="SNAP_FAULT")
        selected[name] = (int(count or 0), action)
    _selected = selected
    _passed.clear()


def selected() -> bool:
    """Whether any fault point is."""
    if _selected is None:
        configure(os.environ.get("SNAP_FAULT", ""))
    return bool(_selected)


def point(name: str) -> None:
    """Pass the fault point `name`: nothing happens unless it was selected."""
    if not selected() or _selected is None:
        return
    if name not in POINTS:
        raise UsageError(
            f"no fault point is called {name!r}", hint="register it in snapshotter/base/faults.py"
        )
    wanted = _selected.get(name)
    if wanted is None:
        return
    _passed[name] = _passed.get(name, 0) + 1
    count, action = wanted
    if count and _passed[name] != count:
        return
    if action == "error":
        raise FaultInjectedError(f"fault point {name} was told to fail")
    os.kill(os.getpid(), signal.SIGKILL if action == "kill" else signal.SIGSTOP)
