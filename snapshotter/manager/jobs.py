"""Names of jobs, and where a rolled-back job goes on.

A *head* records that a job was rolled back: which point it now continues from and under which start
times its tasks run. It is one small JSON file per job in the store's `heads/` (store/FORMAT.md, "Heads"), replaced atomically.
It is a hint: without it the next take starts a new chain (a full dump), never a wrong one, because the
start times in it must match the living task's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from snapshotter.base.errors import UsageError
from snapshotter.manager.ports import Identity
from store.files import make_dir, publish, wrapped

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+:-]{0,63}")
_NOT_NAME = re.compile(r"[^A-Za-z0-9._+:-]+")
_LOOKS_LIKE_ID = re.compile(r"[0-9a-f]{4,32}")


def check_name(name: str) -> str:
    """The name, if a job may be called so: it must not read as a point's id nor leave a directory."""
    if not _NAME.fullmatch(name) or ".." in name or name == "latest":
        raise UsageError(
            f"{name!r} cannot be a job's name",
            hint="use up to 64 letters, digits and . _ + : - (not `latest`, not starting with a sign)",
        )
    if _LOOKS_LIKE_ID.fullmatch(name):
        raise UsageError(
            f"{name!r} cannot be a job's name: it reads as a point's id", hint=f"for example job-{name}"
        )
    return name


def default_name(identity: Identity) -> str:
    """comm-pid: the same for every take of one process, so that repeated takes make one chain."""
    comm = _NOT_NAME.sub("_", identity.comm).strip("._+:-") or "job"
    return f"{comm.replace('..', '_')}-{identity.pid}"


@dataclass(frozen=True, slots=True)
class Head:
    """A job after a rollback."""

    point: str
    boot_id: str
    restored_uptime_ns: int
    tasks: Mapping[int, int]
    """pid -> start time in clock ticks since boot, of the restored processes."""

    def is_of(self, identity: Identity) -> bool:
        """Whether the living process is the one that this rollback made."""
        return self.boot_id == identity.boot_id and self.tasks.get(identity.pid) == identity.start_time_ticks


def _head_path(store: Path, job: str) -> Path:
    return store / "heads" / f"{job}.json"


def read_head(store: Path, job: str) -> Head | None:
    """The record of the job's last rollback; None if there is none or it cannot be understood."""
    try:
        data = json.loads(_head_path(store, job).read_bytes())
        return Head(
            point=str(data["point"]),
            boot_id=str(data["boot_id"]),
            restored_uptime_ns=int(data["restored_uptime_ns"]),
            tasks={int(pid): int(start) for pid, start in data["tasks"].items()},
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def write_head(store: Path, job: str, head: Head) -> None:
    """Replace the record durably."""
    path = _head_path(store, job)
    text = json.dumps(
        {
            "point": head.point,
            "boot_id": head.boot_id,
            "restored_uptime_ns": head.restored_uptime_ns,
            "tasks": {str(pid): start for pid, start in head.tasks.items()},
        }
    )
    with wrapped("cannot record the rollback", path):
        make_dir(path.parent)  # a store of an earlier snap has none
        publish(path.parent, path.name, text.encode())
