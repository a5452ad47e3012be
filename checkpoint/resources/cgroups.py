"""Control groups: in which group of each hierarchy a process is, and back into it.

The groups themselves, with their limits, are the system's and not made again: a process whose group is gone runs in
snap's own, and a warning says so. Source: cgroups(7), Documentation/admin-guide/cgroup-v2.rst.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from checkpoint.kernel import proc
from images import task_pb2

if TYPE_CHECKING:
    from checkpoint.restore_context import RestoreContext

_ESCAPE = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class Mount:
    """Where a hierarchy can be reached."""

    point: str
    root: str
    """The group that is at the mount point."""


def parse(data: bytes) -> dict[str, str]:
    """/proc/PID/cgroup: controllers ("" for version 2) -> path of the group."""
    found = {}
    for line in os.fsdecode(data).splitlines():
        _, controllers, path = line.split(":", 2)
        found[controllers] = path
    return found


def parse_mounts(data: bytes) -> dict[str, Mount]:
    """/proc/PID/mountinfo: controllers ("" for version 2) -> where that hierarchy is mounted."""
    found: dict[str, Mount] = {}
    for line in os.fsdecode(data).splitlines():
        left, _, right = line.partition(" - ")
        head, tail = left.split(" "), right.split(" ")
        if tail[0] == "cgroup2":
            names = [""]
        elif tail[0] == "cgroup":
            # The controllers stand among the options of the file system, in the order of /proc/PID/cgroup.
            names = [",".join(option for option in tail[2].split(",") if option not in {"rw", "ro"})]
        else:
            continue
        root, point = (_ESCAPE.sub(lambda match: chr(int(match[1], 8)), text) for text in head[3:5])
        for name in names:
            found.setdefault(name, Mount(point, root))
    return found


def dump(pid: int, message: task_pb2.Process) -> None:
    """Add the groups of a process."""
    for controllers, path in parse(proc.read_task_file(pid, "cgroup")).items():
        message.cgroups.add(controllers=controllers, path=os.fsencode(path))


def restore(ctx: RestoreContext, process: task_pb2.Process) -> None:
    """Move a stub, before it has any memory to be charged for, into the groups of its process."""
    moves = plan(
        {group.controllers: os.fsdecode(group.path) for group in process.cgroups},
        parse(proc.read_task_file(process.pid, "cgroup")),
        parse_mounts(proc.read_task_file(os.getpid(), "mountinfo")),
    )
    for path, folder in moves:
        try:
            if folder is None:
                raise FileNotFoundError(2, "its hierarchy is not mounted here")
            if _is_frozen(folder):
                raise BlockingIOError(11, "it is frozen")
            with open(f"{folder}/cgroup.procs", "w", encoding="ascii") as file:
                file.write(str(process.pid))
        except OSError as error:
            ctx.warn(
                f"task {process.pid}: not moved into its control group {path} ({error.strerror}); it has the limits of "
                "snap's own"
            )


def _is_frozen(folder: str) -> bool:
    """A stub that stands still could not be filled."""
    for name, frozen in (("cgroup.freeze", b"1"), ("freezer.state", b"F")):
        try:
            with open(f"{folder}/{name}", "rb") as file:
                if file.read().startswith(frozen):
                    return True
        except OSError:
            continue
    return False


def plan(
    wanted: Mapping[str, str], own: Mapping[str, str], mounts: Mapping[str, Mount]
) -> Iterable[tuple[str, str | None]]:
    """Where a process must be moved: (path of the group, its folder or None when it cannot be reached)."""
    for controllers, path in wanted.items():
        if own.get(controllers) == path or controllers not in own:
            continue
        mount = mounts.get(controllers)
        if mount is None or ".." in path.split("/"):
            yield path, None
        elif mount.root == "/":
            yield path, f"{mount.point}/{path.lstrip('/')}"
        elif path == mount.root or path.startswith(f"{mount.root}/"):
            yield path, f"{mount.point}{path[len(mount.root) :]}"
        else:
            yield path, None
