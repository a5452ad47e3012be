"""The plan of a restore: decoded images, what is replaced, the tree's steps. Computed first, printable, pure data.

Owns decoding and the consistency checks across images (what one image alone can say is images/validate.py's).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from checkpoint.environment import Holder, Survey
from checkpoint.model import tree
from checkpoint.model.sharing import MakeThread, SharingError, plan_threads
from checkpoint.resources import sharing
from checkpoint.restore_context import RestoreContext, RestoreOptions
from images import codec, files_pb2, manifest_pb2, task_pb2
from snapshotter.base.errors import UnsupportedError, VerificationError
from snapshotter.base.obstacles import Obstacle
from snapshotter.base.pages import PageSource
from snapshotter.base.text import visible
from snapshotter.base.units import plural

_HINT = "the point is damaged; run `snap verify`"


@dataclass(frozen=True, slots=True)
class RestorePlan:
    """What a restore will do."""

    root_pid: int
    tree: tree.TreePlan
    threads: dict[int, list[MakeThread]]
    """pid -> how all threads but the first are made."""
    nr_processes: int
    nr_threads: int
    replaces: tuple[Holder, ...]
    """Processes that are killed first."""
    obstacles: tuple[Obstacle, ...] = ()
    """What killing them does to others, and was allowed."""

    def __str__(self) -> str:
        processes = plural(self.nr_processes, "process", "processes")
        lines = [f"restore task {self.root_pid}: {processes}, {plural(self.nr_threads, 'thread')}"]
        lines += [f"kill {visible(str(holder))}" for holder in self.replaces]
        lines += str(self.tree).splitlines()
        for steps in self.threads.values():
            lines += [str(step) for step in steps if not (step.files and step.fs)]
        return "\n".join(lines)

    def as_dict(self) -> dict[str, object]:
        """For --json; checkpoint/DESIGN.md, "The plan in JSON", describes each field."""
        return {
            "nr_processes": self.nr_processes,
            "nr_threads": self.nr_threads,
            "kill": [{"pid": holder.pid, "comm": holder.comm} for holder in self.replaces],
            "obstacles": [one.as_dict() for one in self.obstacles],
            "steps": [_step_dict(step) for step in self.tree.steps],
            "threads": [_step_dict(step) for steps in self.threads.values() for step in steps],
        }


def _step_dict(step: tree.Step | MakeThread) -> dict[str, object]:
    name = re.sub(r"(?<!^)(?=[A-Z])", "_", type(step).__name__).lower()
    return {"do": name, **dataclasses.asdict(step)}


def decode(
    images: Callable[[str], bytes], names: Sequence[str], source: PageSource, options: RestoreOptions
) -> RestoreContext:
    """Parse and validate everything that does not need the machine.

    Raises:
        VerificationError: an image is damaged, missing or contradicts another.
        UnsupportedError: it holds what this version cannot restore.
    """
    if "manifest" not in names:
        raise VerificationError("has no manifest", where="the point", hint=_HINT)
    manifest = codec.parse_as("manifest", images("manifest"), manifest_pb2.Manifest)
    processes: dict[int, task_pb2.Process] = {}
    for pid in manifest.pids:
        name = f"process/{pid}"
        if name not in names:
            raise VerificationError("is missing", where=f"image {name!r}", hint=_HINT)
        process = codec.parse_as(name, images(name), task_pb2.Process)
        if process.pid != pid:
            raise VerificationError(f"is of task {process.pid}", where=f"image {name!r}", hint=_HINT)
        processes[pid] = process
    ctx = RestoreContext(images, source, options, manifest, processes, tuple(names))
    _check_tasks(ctx)
    ctx.parse_all()
    _check_files(ctx)
    return ctx


def _check_tasks(ctx: RestoreContext) -> None:
    if ctx.manifest.root_pid not in ctx.processes:
        raise VerificationError("lists no root process", where="image 'manifest'", hint=_HINT)
    seen: set[int] = set()
    spaces: dict[str, int] = {}
    users = {process.files: 0 for process in ctx.processes.values()}
    for pid, process in ctx.processes.items():
        where = f"image 'process/{pid}'"
        if not process.threads or process.threads[0].tid != pid:
            raise VerificationError("does not begin with its first thread", where=where, hint=_HINT)
        for thread in process.threads:
            if thread.tid in seen:
                raise VerificationError(f"thread {thread.tid} is there twice", where=where, hint=_HINT)
            seen.add(thread.tid)
        if process.state == task_pb2.Process.ZOMBIE:
            continue
        for name in filter(None, (process.mm, process.files, *(one.files for one in process.threads))):
            if name not in ctx.names:
                raise VerificationError(
                    f"refers to image {name!r}, which is missing", where=where, hint=_HINT
                )
        if not all(thread.regs and thread.xstate for thread in process.threads):
            raise VerificationError("lacks the registers of a thread", where=where, hint=_HINT)
        first = ctx.processes.get(process.fs_of)
        if process.fs_of and (first is None or first.fs_of or first.state == task_pb2.Process.ZOMBIE):
            raise VerificationError(
                f"shares its directories with task {process.fs_of}, which has none", where=where, hint=_HINT
            )
        for thread in process.threads:
            if thread.files and users.setdefault(thread.files, pid) != pid:
                raise VerificationError(
                    f"thread {thread.tid} shares descriptors with another process", where=where, hint=_HINT
                )
        tids = {thread.tid for thread in process.threads}
        for timer in process.posix_timers:
            if timer.notify_tid and timer.notify_tid not in tids:
                raise UnsupportedError(
                    f"has a POSIX timer for thread {timer.notify_tid}, which has ended",
                    where=f"task {pid}",
                    hint="let the program delete that timer, and take another point",
                )
        if not process.mm:
            raise VerificationError("has no address space", where=where, hint=_HINT)
        if process.mm in spaces:
            raise UnsupportedError(
                f"shares its address space with task {spaces[process.mm]} (vfork or CLONE_VM)",
                where=f"task {pid}",
                hint="such a process cannot be made again exactly",
            )
        spaces[process.mm] = pid


def _check_files(ctx: RestoreContext) -> None:
    """Descriptors, descriptions and what those refer to (inside one image it is images/validate.py's)."""
    tables = [name for _, _, name in ctx.tables()]
    if "files" not in ctx.names:
        if tables:
            raise VerificationError("is missing", where="image 'files'", hint=_HINT)
        return
    files = ctx.image("files", files_pb2.Files)
    known = {description.id for description in files.descriptions}
    for name in tables:
        for entry in ctx.image(name, files_pb2.FdTable).entries:
            if entry.description not in known:
                raise VerificationError(
                    f"descriptor {entry.fd} is of file description {entry.description}, which the point lacks",
                    where=f"image {name!r}",
                    hint=_HINT,
                )
    for description in files.descriptions:
        for shmem in (description.regular.shmem, description.regular.kept):
            if shmem and shmem not in ctx.names:
                raise VerificationError(
                    f"file description {description.id} has its content in {shmem!r}, which the point lacks",
                    where="image 'files'",
                    hint=_HINT,
                )


def make_plan(ctx: RestoreContext, found: Survey) -> RestorePlan:
    """Order the tree and decide sessions; adds the warnings to the context."""
    root_pid = ctx.manifest.root_pid
    classes = sharing.process_classes(ctx.processes)
    processes = [
        tree.TreeProcess(
            process.pid,
            process.ppid,
            process.pgid,
            process.sid,
            process.state == task_pb2.Process.ZOMBIE,
            process.exit_signal,
            process.child_subreaper,
            *classes[process.pid],
        )
        for process in ctx.processes.values()
    ]
    root = ctx.processes[root_pid]
    # A session can only be inherited: the root can be in an outside one only if snap is in it.
    keep_sid = root.sid == found.own_sid and root.sid not in ctx.processes
    keep_pgid = keep_sid and any(
        holder.pgid == root.pgid and holder.sid == root.sid and holder.pid not in found.old
        for holder in found.processes.values()
    )
    processes, warnings = tree.map_outside(processes, root_pid, keep_sid=keep_sid, keep_pgid=keep_pgid)
    try:
        steps = tree.plan_tree(
            processes,
            root_pid,
            root_sid=found.own_sid if keep_sid else 0,
            root_pgid=found.own_pgid if keep_sid else 0,
        )
        threads = {
            pid: plan_threads(pid, sharing.thread_plan(process)) for pid, process in ctx.processes.items()
        }
    except SharingError as error:
        raise UnsupportedError(
            f"what its tasks share cannot be made again: {error}",
            where=f"task {root_pid}",
            hint="take another point",
        ) from error
    except tree.TreeError as error:
        raise VerificationError(
            f"the processes do not fit together: {error}", where="the point", hint=_HINT
        ) from error
    for text in (*warnings, *steps.warnings):
        ctx.warn(text)
    return RestorePlan(
        root_pid,
        steps,
        threads,
        len(ctx.processes),
        sum(len(process.threads) for process in ctx.processes.values()),
        tuple(found.old.values()),
        ctx.accepted,
    )
