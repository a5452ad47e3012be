"""Control groups: in which group of each hierarchy a process is, and back into it.

The groups themselves, with their limits, are the system's and not made again: a process whose group is gone runs in
snap's own, and a warning says so. A thread may be in another group than its process (version 1; threaded groups of version 2).
Source: cgroups(7), Documentation/admin-guide/cgroup-v2.rst.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from checkpoint.kernel import proc, threads
from checkpoint.kernel.tasks import task_ids
from images import task_pb2
from snapshotter.base.errors import Finding

if TYPE_CHECKING:
    from checkpoint.restore_context import RestoreContext

_apart: set[int] = set()
"""Processes of which some thread was in another group than the others at the last look. The frozen window reads the groups of each
thread only there.
"""

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


def look(pid: int, report: list[Finding]) -> None:
    """Refuse a process in a frozen group (docker pause), which nothing can run in. Note whether its threads are in one group."""
    for controllers, path in parse(proc.read_task_file(pid, "cgroup")).items():
        if controllers and "freezer" not in controllers.split(","):
            continue
        mount = _own_mounts().get(controllers)
        folder = _folder(mount, path) if mount is not None else None
        if folder is not None and _is_frozen(folder):
            hint = (
                "thaw the group (docker unpause; its cgroup.freeze or freezer.state), and take the point then"
            )
            report.append(Finding(pid, "task", f"stands still in the frozen control group {path}", hint))
    tids = task_ids(pid)
    paths = [f"/proc/{pid}/task/{tid}/cgroup" for tid in tids]
    if len(tids) > 1 and len(set(threads.read_files(paths)) - {None}) > 1:
        _apart.add(pid)
    else:
        _apart.discard(pid)


def dump(pid: int, message: task_pb2.Process) -> None:
    """Add the groups of a process, and of those threads that are in others."""
    whole = proc.read_task_file(pid, "cgroup")
    for controllers, path in parse(whole).items():
        message.cgroups.add(controllers=controllers, path=os.fsencode(path))
    if pid not in _apart:
        return
    paths = [f"/proc/{pid}/task/{thread.tid}/cgroup" for thread in message.threads]
    for thread, data in zip(message.threads, threads.read_files(paths), strict=True):
        if data is not None and data != whole:
            for controllers, path in parse(data).items():
                thread.cgroups.add(controllers=controllers, path=os.fsencode(path))


def restore(ctx: RestoreContext, process: task_pb2.Process) -> None:
    """Move a stub, before it has any memory to be charged for, into the groups of its process."""
    _move(ctx, process.pid, process.cgroups, f"/proc/{process.pid}/cgroup", of_thread=False)


def restore_threads(ctx: RestoreContext, process: task_pb2.Process) -> None:
    """Move those threads that were in other groups than their process."""
    for thread in process.threads:
        if thread.cgroups:
            path = f"/proc/{process.pid}/task/{thread.tid}/cgroup"
            _move(ctx, thread.tid, thread.cgroups, path, of_thread=True)


def _move(
    ctx: RestoreContext, tid: int, groups: Iterable[task_pb2.ControlGroup], own: str, *, of_thread: bool
) -> None:
    wanted = {group.controllers: os.fsdecode(group.path) for group in groups}
    with open(own, "rb") as file:
        now = parse(file.read())
    for controllers, path, folder in plan(
        wanted, now, parse_mounts(proc.read_task_file(os.getpid(), "mountinfo"))
    ):
        try:
            if folder is None:
                raise FileNotFoundError(2, "its hierarchy is not mounted here")
            if _is_frozen(folder):
                raise BlockingIOError(11, "it is frozen")
            name = ("tasks" if controllers else "cgroup.threads") if of_thread else "cgroup.procs"
            with open(f"{folder}/{name}", "w", encoding="ascii") as file:
                file.write(str(tid))
        except OSError as error:
            ctx.warn(
                f"task {tid}: not moved into its control group {path} ({error.strerror}); it has the limits, "
                "and the rules for devices, of snap's own"
            )


@functools.cache
def _own_mounts() -> dict[str, Mount]:
    return parse_mounts(proc.read_task_file(os.getpid(), "mountinfo"))


def _is_frozen(folder: str) -> bool:
    """Whether what is in a group stands still, by itself or because a group above it does."""
    for name, frozen in (("cgroup.events", b"frozen 1"), ("cgroup.freeze", b"1"), ("freezer.state", b"FR")):
        try:
            with open(f"{folder}/{name}", "rb") as file:
                if any(line.startswith(frozen) for line in file):
                    return True
        except OSError:
            continue
    return False


def plan(
    wanted: Mapping[str, str], own: Mapping[str, str], mounts: Mapping[str, Mount]
) -> Iterable[tuple[str, str, str | None]]:
    """Where a task must be moved: (controllers, path of the group, its folder or None when it cannot be reached)."""
    for controllers, path in wanted.items():
        if own.get(controllers) == path or controllers not in own:
            continue
        mount = mounts.get(controllers)
        yield controllers, path, None if mount is None else _folder(mount, path)


def _folder(mount: Mount, path: str) -> str | None:
    if ".." in path.split("/"):
        return None
    if mount.root == "/":
        return f"{mount.point}/{path.lstrip('/')}"
    if path == mount.root or path.startswith(f"{mount.root}/"):
        return f"{mount.point}{path[len(mount.root) :]}"
    return None
