"""Files and directories of /proc and /sys: opened again by path, for their content is the kernel's own.

What is about one process (/proc/PID/...) is found again when it is of the job, whose processes have their old numbers; who may have it,
lookers.py judges.
Of a process outside the job it is opened again while that process lives; once it has ended, the job gets one
of a process that has ended, as it would have if it had gone on: reading fails with ESRCH. The files of
/proc/PID/ns are those of snap's own namespaces, in which the job is.

Refused: files of single threads (a restore opens files before it makes threads), namespaces that are not the job's,
what is open for writing but for a few (`_WRITABLE`) and /proc/sys, and files of the kernel's other file systems.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

from checkpoint.kernel import capabilities, distant, proc
from checkpoint.kernel.fdinfo import O_PATH
from checkpoint.resources import paths
from checkpoint.resources.files import kind, lookers
from images import files_pb2, task_pb2
from snapshotter.base.errors import Finding, RestoreConflictError, TargetGoneError, wrap_os_error

if TYPE_CHECKING:
    from checkpoint.resources.files.kind import Seen
    from checkpoint.restore_context import RestoreContext
    from images import common_pb2

PROC_MAGIC, NSFS_MAGIC = 0x9FA0, 0x6E736673
_SYSTEMS = {
    PROC_MAGIC: "proc",
    0x62656572: "sysfs",
    0x27E0EB: "cgroup",
    0x63677270: "cgroup2",
    0x64626720: "debugfs",
    0x74726163: "tracefs",
    0xCAFE4A11: "bpf",
    0x73636673: "securityfs",
    0x62656570: "configfs",
    0x19800202: "mqueue",
    NSFS_MAGIC: "nsfs",
}
_WRITABLE = frozenset(
    {b"autogroup", b"comm", b"coredump_filter", b"oom_adj", b"oom_score_adj", b"timerslack_ns"}
)
"""Of /proc/PID: their writes are judged by who writes, not by who opened them, which is snap now."""
_TO_OPEN = capabilities.CAP_DAC_OVERRIDE | capabilities.CAP_DAC_READ_SEARCH | capabilities.CAP_SYS_PTRACE
"""Without which the files of a process that is being made, and is root's yet, could not be opened. Nothing asks for them later."""


def system_of(seen: Seen) -> int:
    """The magic number of the file system that a descriptor is on, if it is one of the kernel's own; else 0."""
    number = None if seen.systems is None else seen.systems.get(seen.stat.st_dev)
    if number is None:
        number = distant.filesystem_type(f"/proc/{seen.pid}/fd/{seen.fd}", seen.link)
        if seen.systems is not None:
            seen.systems[seen.stat.st_dev] = number
    return number if number in _SYSTEMS else 0


def is_pseudo(path: bytes) -> bool:
    """Whether a path is one of /proc or /sys."""
    return path in {b"/proc", b"/sys"} or path.startswith((b"/proc/", b"/sys/"))


def refusal(seen: Seen, system: int) -> Finding | None:
    """Why it cannot be opened again, if so. What takes all of the job to judge is in `look_job`."""
    read_only = seen.info.access == os.O_RDONLY or seen.path_only
    if system == NSFS_MAGIC:
        if _own_namespace(seen):
            return None
        return Finding(seen.pid, seen.where, "is a namespace that is not the job's own", "close it first")
    if system == PROC_MAGIC and lookers.process_of(seen.link):
        parts = seen.path.split(b"/")
        if b"task" in parts[3:4] and parts[4:] and parts[4] != parts[2]:
            what = "is a file of /proc of a single thread"
            return Finding(seen.pid, seen.where, what, "open the one of its process, or close it first")
        if os.stat("/proc").st_dev != seen.stat.st_dev:
            return Finding(seen.pid, seen.where, "is a file of another mount of /proc", "close it first")
        if read_only or parts[-1] in _WRITABLE:
            return None
    elif (
        is_pseudo(seen.link)
        and not seen.link.endswith(kind.DELETED)
        and (read_only or seen.link.startswith(b"/proc/sys/"))
    ):
        return None
    return Finding(
        seen.pid,
        seen.where,
        f"is a file of {_SYSTEMS[system]}, which holds state of the kernel",
        "close it first",
    )


def _own_namespace(seen: Seen) -> str:
    for name in proc.NAMESPACES:
        try:
            own = os.stat(f"/proc/self/ns/{name}")
        except OSError:
            continue
        if os.path.samestat(own, seen.stat):
            return name
    return ""


def entry_of(link: bytes) -> files_pb2.ProcEntry:
    """What a path below /proc/PID is about; empty for any other."""
    entry = files_pb2.ProcEntry(pid=lookers.process_of(link))
    if entry.pid:
        entry.boot_id = _boot_id()
        try:
            entry.dead = link.endswith(kind.DELETED)
            if not entry.dead:
                entry.start_time_ticks = proc.read_stat(entry.pid).start_time_ticks
        except TargetGoneError:
            entry.dead = True
    return entry


def namespace_entry(seen: Seen) -> files_pb2.ProcEntry:
    """A descriptor of one of the job's namespaces."""
    return files_pb2.ProcEntry(namespace=_own_namespace(seen))


# -- restore ----------------------------------------------------------------------------------------------------


def check(
    ctx: RestoreContext, identity: common_pb2.FileIdentity, entry: files_pb2.ProcEntry, flags: int = O_PATH
) -> None:
    """Whether it is there, as far as that can be told while the job is not, and may be opened again.

    Raises:
        RestoreConflictError: it is gone, or is something else.
    """
    if entry.namespace:
        if entry.namespace not in proc.NAMESPACES:
            raise RestoreConflictError(f"a namespace of an unknown kind ({entry.namespace})", where="files")
    elif entry.pid or lookers.process_of(identity.path):
        if entry.pid != lookers.process_of(identity.path):
            raise RestoreConflictError(f"is not of process {entry.pid}", where=paths.shown(identity.path))
        if not entry.dead and entry.pid not in ctx.processes:
            if not _lives(entry):
                ctx.warn(f"{paths.shown(identity.path)}: process {entry.pid}, outside the job, has ended")
            elif not flags & O_PATH:
                lookers.check(ctx, entry, identity.path, flags & os.O_ACCMODE)
    else:
        os.close(paths.locate(identity, same_inode=False))


def reopen(
    ctx: RestoreContext, identity: common_pb2.FileIdentity, entry: files_pb2.ProcEntry, flags: int
) -> int:
    """A new description of it. The processes of the job must exist."""
    where = paths.shown(identity.path)
    if entry.namespace:
        return os.open(f"/proc/self/ns/{entry.namespace}", flags & (O_PATH | os.O_NONBLOCK) | os.O_CLOEXEC)
    alive = not entry.pid or (not entry.dead and (entry.pid in ctx.processes or _lives(entry)))
    path = identity.path
    child = 0
    if not alive:
        child = os.posix_spawn("/proc/self/exe", ["true", "-c", ""], {})
        path = path.removesuffix(kind.DELETED).replace(b"/%d" % entry.pid, b"/%d" % child)
    try:
        found = paths.find(path)
        try:
            # What is opened remembers who did: no more shows than to the task of the job with the fewest capabilities.
            return capabilities.with_at_most(
                _fewest(ctx) | _TO_OPEN, lambda: paths.reopen(found, flags & ~os.O_NOFOLLOW, where)
            )
        finally:
            os.close(found)
    except OSError as error:
        raise wrap_os_error(error, "cannot open it again", where=where) from error
    finally:
        if child:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def _fewest(ctx: RestoreContext) -> int:
    """The capabilities that every task of the job has."""
    common = -1
    for process in ctx.processes.values():
        if process.state != task_pb2.Process.ZOMBIE:
            for thread in process.threads:
                common &= thread.credentials.cap_effective
    return common


def _lives(entry: files_pb2.ProcEntry) -> bool:
    try:
        return (
            entry.boot_id == _boot_id()
            and proc.read_stat(entry.pid).start_time_ticks == entry.start_time_ticks
        )
    except TargetGoneError:
        return False


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
