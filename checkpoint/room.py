"""Whether this machine has room for a job: descriptors, tasks, memory. Asked before a living job is killed for a point that then does not fit.

What is counted is what the job needs at least; what others take meanwhile cannot be known.
"""

from __future__ import annotations

import contextlib
import os
import resource
from pathlib import Path

from checkpoint.environment import Survey
from checkpoint.kernel import proc
from checkpoint.resources import files
from checkpoint.restore_context import RestoreContext
from images import files_pb2
from snapshotter.base.errors import RestoreConflictError, SnapshotterError
from snapshotter.base.obstacles import Obstacle
from snapshotter.base.pages import PAGE_SIZE
from snapshotter.base.units import format_bytes

LITTLE_MEMORY = "little-memory"
_SPARE_DESCRIPTORS = 64
_CAP_SYS_RESOURCE = 1 << 24


def check(ctx: RestoreContext, found: Survey) -> None:
    """Descriptors and tasks.

    Raises:
        RestoreConflictError: a limit of the system's, or of snap's, is too low for the job.
    """
    _check_descriptors(ctx)
    _check_tasks(ctx, found)


def _check_descriptors(ctx: RestoreContext) -> None:
    soft, hard = _own_limits()
    most = int(Path("/proc/sys/fs/nr_open").read_text())
    number = files.highest_fd(ctx) + 1 + _SPARE_DESCRIPTORS
    if number > most:
        raise RestoreConflictError(
            f"the job has a descriptor {number - 1 - _SPARE_DESCRIPTORS}, and fs.nr_open is {most}",
            hint=f"sysctl fs.nr_open={number + 1}",
        )
    may_raise = proc.read_status(os.getpid()).cap_effective & _CAP_SYS_RESOURCE
    if hard != resource.RLIM_INFINITY and number > hard and not may_raise:
        raise RestoreConflictError(
            f"the job has a descriptor {number - 1 - _SPARE_DESCRIPTORS}, and snap may only give {hard} (RLIMIT_NOFILE)",
            hint="raise ulimit -Hn for snap, then roll back",
        )
    if "files" not in ctx.names or soft == resource.RLIM_INFINITY:
        return
    opened = len(ctx.image("files", files_pb2.Files).descriptions) + len(os.listdir("/proc/self/fd"))
    if opened + _SPARE_DESCRIPTORS > soft:
        raise RestoreConflictError(
            f"snap must have {opened + _SPARE_DESCRIPTORS} descriptors open at once, and may have {soft} (RLIMIT_NOFILE)",
            hint="raise ulimit -Hn for snap, then roll back",
        )


def _own_limits() -> tuple[int, int]:
    return resource.getrlimit(resource.RLIMIT_NOFILE)


def _check_tasks(ctx: RestoreContext, found: Survey) -> None:
    wanted = len(ctx.task_ids())
    freed = sum(_nr_threads(pid) for pid in found.old)
    most = int(Path("/proc/sys/kernel/threads-max").read_text())
    there = int(Path("/proc/loadavg").read_text().split()[3].partition("/")[2])
    if there - freed + wanted > most:
        raise RestoreConflictError(
            f"the job has {wanted} tasks; {there - freed} others are there, and kernel.threads-max is {most}",
            hint=f"sysctl kernel.threads-max={there - freed + wanted + 100}",
        )


def _nr_threads(pid: int) -> int:
    with contextlib.suppress(OSError):
        return len(os.listdir(f"/proc/{pid}/task"))
    return 0


def memory(ctx: RestoreContext, found: Survey) -> list[Obstacle]:
    """An obstacle where the job's greatest address space alone, with its shared memory, is more than is free. Others may share pages."""
    spaces = [_nr_pages(ctx, process.mm) for process in ctx.processes.values() if process.mm]
    shared = sum(_nr_pages(ctx, name) for name in ctx.names if name.startswith("shmem/"))
    needed = (max(spaces, default=0) + shared) * PAGE_SIZE
    free = _free_bytes() + sum(_resident_bytes(pid) for pid in found.old)
    if needed <= free:
        return []
    return [
        Obstacle(
            "memory",
            ctx.manifest.root_pid,
            f"the job has up to {format_bytes(needed)} of memory, and {format_bytes(free)} are free (the old job's included): "
            "killed for the rollback, it might not fit again",
            f"make room, or roll back with --{LITTLE_MEMORY} (pages of zeros, which take none, are counted too)",
            LITTLE_MEMORY,
        )
    ]


def _nr_pages(ctx: RestoreContext, space: str) -> int:
    return sum(int(count) for _, count in ctx.source.runs(space))


def _free_bytes() -> int:
    with open("/proc/meminfo", encoding="ascii") as file:
        fields = {line.partition(":")[0]: line.split()[1] for line in file}
    return (int(fields["MemAvailable"]) + int(fields["SwapFree"])) * 1024


def _resident_bytes(pid: int) -> int:
    try:
        return proc.read_stat(pid).rss_pages * PAGE_SIZE
    except (OSError, SnapshotterError):
        return 0
