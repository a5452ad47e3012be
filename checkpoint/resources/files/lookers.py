"""Descriptors of /proc/PID/...: whether they still show their process, and whether those who have them may look at it.

What shows memory (mem, maps, environ, ...) is bound at open to the address space that the process had. After an exec it shows nothing,
and a descriptor opened for the new one would show what it must not: that of a set-uid program, say. So each is judged at the look, and
again in the frozen window, those in flight in sockets too:

- One that shows nothing any more comes back as one that shows nothing (ProcEntry.dead). That is found out by reading a duplicate.
- One that shows an address space which is neither dead nor that of its process is refused.
- Of any other, those of the system (/proc, /sys) too, every task that can get at it must be able to open it with its own ids and capabilities (model/access.py); else it
  is refused. A rollback gives the tasks of the job the rights that they had, so that this holds then, too. What is about a process
  outside is judged once more by `check`.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from checkpoint.kernel import proc
from checkpoint.kernel import sys as ksys
from checkpoint.model import access
from checkpoint.model.access import Subject
from checkpoint.resources import paths
from checkpoint.resources.files import kind
from images import files_pb2, task_pb2
from snapshotter.base.errors import Finding, RestoreConflictError, TargetGoneError, UnsupportedError

if TYPE_CHECKING:
    from checkpoint.context import DumpContext
    from checkpoint.resources.files.dumping import FilesDump
    from checkpoint.resources.files.kind import Seen
    from checkpoint.restore_context import RestoreContext

_MEMORY_MAPS = frozenset({b"maps", b"numa_maps", b"smaps", b"smaps_rollup"})
_OF_MEMORY = _MEMORY_MAPS | {b"auxv", b"environ", b"mem", b"pagemap"}
_PAGE = 4096
_SAMPLE_BYTES = 64
_FOREIGN = "shows the memory of another process"
_OTHER = "shows memory that its process had before it executed another program, and that something still uses"
_CLOSED = "is about process {}, which {} may not look into by its own rights"


def process_of(link: bytes) -> int:
    """The PID of a path /proc/PID/...; 0 of any other."""
    parts = link.split(b"/", 3)
    if len(parts) < 3 or parts[:2] != [b"", b"proc"]:
        return 0
    number = parts[2].removesuffix(kind.DELETED)
    return int(number) if number.isdigit() else 0


# -- look -------------------------------------------------------------------------------------------------------


def look_job(pids: Sequence[int], entries: Iterable[Seen], report: list[Finding]) -> None:
    """Adds what is refused. The job may be running; nothing is changed by reading a duplicate of a descriptor."""
    for seen in entries:
        try:
            found = _refusal(seen, pids, _fetched, [_subject(seen.pid)])
        except (OSError, TargetGoneError):
            continue  # it, or its process, went away: the dump sees the frozen one
        if isinstance(found, Finding):
            report.append(found)


def _fetched(seen: Seen) -> int:
    flags = 0 if proc.read_status(seen.pid).tgid == seen.pid else ksys.PIDFD_THREAD
    pidfd = os.pidfd_open(seen.pid, flags)
    try:
        return ksys.pidfd_getfd(pidfd, seen.fd)
    finally:
        os.close(pidfd)


def _subject(tid: int) -> Subject:
    """A task as it is now."""
    return _of_status(proc.read_status(tid))


def _of_status(status: proc.Status) -> Subject:
    return Subject(
        status.tgid,
        status.uids,
        status.gids,
        status.cap_permitted,
        status.cap_effective,
        _is_dumpable(status),
    )


def _is_dumpable(status: proc.Status) -> bool:
    """By who owns its files: root, where it is not (task_dump_owner in the kernel's fs/proc/base.c). Of a process of root's that does
    not tell, and it counts as not dumpable.
    """
    return status.uids[1] != 0 and os.stat(f"/proc/{status.tgid}/maps").st_uid == status.uids[1]


# -- dump -------------------------------------------------------------------------------------------------------


def judge(job: FilesDump) -> None:
    """All descriptions of the frozen job, its tables and queues being read.

    Raises:
        UnsupportedError: one of them is refused.
    """
    findings: list[Finding] = []
    carried: set[int] | None = None
    for description in job.image.descriptions:
        entry = _entry_in(description)
        if entry is None or entry.namespace or entry.dead:
            continue
        if carried is None:
            carried = {
                number
                for one in job.image.descriptions
                for message in one.unix.queue
                for number in message.descriptions
            }
        seen = job.examples[description.id]
        who = _everybody(job.ctx) if description.id in carried else _holders(job, description.id)
        found = _refusal(seen, list(job.ctx.processes), lambda one: _borrowed(job, one), who)
        if isinstance(found, Finding):
            findings.append(found)
        elif found:
            entry.dead = True
            job.ctx.warn(
                f"task {seen.pid}, {seen.where}: shows nothing since its process has executed another program, and comes back as one "
                "of a process that has ended"
            )
    if findings:
        raise UnsupportedError.of(findings, job.ctx.root_pid)


def _borrowed(job: FilesDump, seen: Seen) -> int:
    with job.borrow(seen) as fd:
        return os.dup(fd)


def _everybody(ctx: DumpContext) -> Iterator[Subject]:
    """In flight: whoever has the socket can take it, and pass it on."""
    for process in ctx.living():
        for task in process.threads:
            yield _of_status(task.facts.status)


def _holders(job: FilesDump, number: int) -> Iterator[Subject]:
    """All threads of each process that has it in a descriptor table."""
    tables = {task for task, table in job.tables.items() if number in table.values()}
    for process in job.ctx.living():
        own = {job.shared.files[one.tid] for one in process.threads if one.tid in job.shared.files}
        if own & tables:
            yield from (_of_status(task.facts.status) for task in process.threads)


def _entry_in(description: files_pb2.Description) -> files_pb2.ProcEntry | None:
    for field in ("regular", "directory"):
        if description.HasField(field):
            place = getattr(description, field)
            return place.proc if place.HasField("proc") else None
    return None


# -- the judgement ----------------------------------------------------------------------------------------------


def _refusal(
    seen: Seen, pids: Sequence[int], fetch: Callable[[Seen], int], who: Iterable[Subject]
) -> Finding | bool:
    """Why it is refused; True: it shows nothing any more; False: all is well."""
    pid, name = process_of(seen.link), os.path.basename(seen.link)
    if seen.link.endswith(kind.DELETED) or seen.path_only:
        return False
    if not pid:
        return _refusal_of_system(seen, who) or False
    if name in _OF_MEMORY:
        if pid not in pids:
            return Finding(seen.pid, seen.where, _FOREIGN, "close it first")
        fd = fetch(seen)
        try:
            state = shows(fd, pid, name)
        finally:
            os.close(fd)
        if state != "same":
            return True if state == "nothing" else Finding(seen.pid, seen.where, _OTHER, "close it first")
    elif _is_for_all(seen.stat.st_mode, seen.info.access):
        return False
    target = _subject(pid)
    for caller in who:
        if not access.may_look(caller, target):
            what = _CLOSED.format(pid, f"task {caller.pid} (user {caller.uids[3]})")
            return Finding(seen.pid, seen.where, what, "close it first")
    return False


def _refusal_of_system(seen: Seen, who: Iterable[Subject]) -> Finding | None:
    """Of a file of the kernel's that is about no process: as its mode says who may open it."""
    if _is_for_all(seen.stat.st_mode, seen.info.access):
        return None
    wanted = {os.O_RDONLY: 4, os.O_WRONLY: 2}.get(seen.info.access, 6) | stat.S_ISDIR(seen.stat.st_mode)
    for caller in who:
        if not access.may_open(caller, seen.stat, wanted):
            what = f"is a file that task {caller.pid} (user {caller.uids[3]}) may not open by its own rights"
            return Finding(seen.pid, seen.where, what, "close it first")
    return None


def _is_for_all(mode: int, how: int) -> bool:
    """Whether anybody may open it so, by its mode."""
    wanted = 0o5 if stat.S_ISDIR(mode) else 0o4
    return how == os.O_RDONLY and mode & wanted == wanted


def shows(fd: int, pid: int, name: bytes) -> str:
    """What a descriptor of /proc/PID/NAME shows: "same" (what the process has now), "nothing", or "other"."""
    with open(f"/proc/{pid}/{os.fsdecode(name)}", "rb", buffering=0) as fresh:
        at, length = 0, _PAGE
        if name in {b"mem", b"pagemap"}:
            at, length = proc.read_stat(pid).start_stack & -16, _SAMPLE_BYTES
        if name == b"pagemap":
            at, length = at // _PAGE * 8, 8
        then, now = _read(fd, length, at), _read(fresh.fileno(), length, at)
    if name == b"pagemap":  # entries are alike everywhere, and their frames are shown to root alone
        return "same" if then or not now else "nothing"
    if name in _MEMORY_MAPS:  # the first mapping: later ones may have changed between the two
        then, now = then.partition(b" ")[0], now.partition(b" ")[0]
    if then == now:
        return "same" if now else "nothing"
    return "other" if then else "nothing"


def _read(fd: int, length: int, at: int) -> bytes:
    try:
        return os.pread(fd, length, at)
    except OSError:  # ESRCH: the process has ended; EIO: it is not mapped there
        return b""


# -- restore ----------------------------------------------------------------------------------------------------


def check(ctx: RestoreContext, entry: files_pb2.ProcEntry, path: bytes, access_mode: int) -> None:
    """Of a process outside the job: all of the job must be able to look at it now.

    Raises:
        RestoreConflictError: no.
    """
    try:
        if _is_for_all(os.stat(path).st_mode, access_mode):
            return
        target = _subject(entry.pid)
    except (OSError, TargetGoneError):
        return  # it has ended: then it is one of a dead process
    for process in ctx.processes.values():
        if process.state == task_pb2.Process.ZOMBIE:
            continue
        for thread in process.threads:
            if not access.may_look(access.of_image(process, thread.credentials), target):
                raise RestoreConflictError(
                    f"is about process {entry.pid}, which user {thread.credentials.fsuid} may not look into now",
                    where=paths.shown(path),
                    hint="roll back when that process has ended, or to another point",
                )
