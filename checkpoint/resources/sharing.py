"""Which tasks of a job have one descriptor table, or one working directory with root and umask, in common.

Owns finding that out with kcmp(2), the refusals, and the names in the Process and Thread messages. The rule is that
threads of a process share both and processes share neither; clone(CLONE_FILES, CLONE_FS) and unshare make
exceptions. Tables as such are files/dumping.py's and directories.py's, the order in which stubs are made
so that they share again is model/sharing.py's.

Signal actions can only be shared together with the address space (CLONE_SIGHAND needs CLONE_VM), which is
memory.look_sharing's to refuse.

Refused: a table that is shared with a process outside the job; a thread that shares with another process but not with its own;
what no order of clone and unshare gives again.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from checkpoint.kernel import proc, threads
from checkpoint.kernel.sys import KCMP_FILES, KCMP_FS, PIDFD_THREAD
from checkpoint.kernel.tasks import is_dead, task_ids
from checkpoint.model import tree
from checkpoint.model.sharing import SharingError, ThreadTables, plan_threads, shared_only
from checkpoint.resources import directories
from images import task_pb2
from snapshotter.base.errors import Finding, SnapshotterError, UnsupportedError

if TYPE_CHECKING:
    from checkpoint.context import DumpContext

_WHAT = {KCMP_FILES: "descriptor table", KCMP_FS: "working directory, root and umask"}
_FLAG = {KCMP_FILES: "CLONE_FILES", KCMP_FS: "CLONE_FS"}
_HINT = "start the job anew, or take the point of what shares it too"


@dataclass(slots=True)
class Tables:
    """Who has which table: task -> the first task that has the same one, for processes (their first threads) and
    for threads that do not share with their process.
    """

    files: dict[int, int] = field(default_factory=dict)
    fs: dict[int, int] = field(default_factory=dict)
    process_of: dict[int, int] = field(default_factory=dict)
    """thread -> process, of those threads."""

    def of(self, kind: int) -> dict[int, int]:
        """The one or the other (KCMP_*)."""
        return self.files if kind == KCMP_FILES else self.fs

    def owners(self) -> list[int]:
        """The first task of each descriptor table."""
        return [task for task, first in self.files.items() if task == first]


_alone: dict[int, int] = {}
"""pid -> start time of all processes at the last look, if none shared with another. Sharing begins at a birth only, so that the
frozen window need not compare them again."""


def descriptor_tables(pid: int) -> list[int]:
    """One task for each descriptor table of a process, which may be running; its first thread first."""
    return [pid, *dict.fromkeys(_own_tables(pid)[KCMP_FILES].values())]


def directory_owners(pid: int) -> list[int]:
    """The same for threads that have a working directory of their own; without the first thread."""
    return list(dict.fromkeys(_own_tables(pid)[KCMP_FS].values()))


def _own_tables(pid: int) -> dict[int, dict[int, int]]:
    """KCMP_* -> thread of the process that does not share with its first one -> first of them that has the same."""
    tids = task_ids(pid)
    if len(tids) < 2:
        return {kind: {} for kind in _WHAT}
    tids.sort(key=lambda tid: tid != pid)
    found = {kind: threads.same(kind, tids) for kind in _WHAT}
    return {
        kind: {tid: first for tid, first in same.items() if first != pid and not is_dead(pid, tid)}
        for kind, same in found.items()
    }


# -- look -------------------------------------------------------------------------------------------------------


def look_job(root_pid: int, tasks: Mapping[int, int], report: list[Finding]) -> None:
    """Adds what is shared in a way that could not be restored. The job may be running.

    Args:
        root_pid: its root.
        tasks: pid -> start time of its processes that are not zombies.
        report: gets the findings.
    """
    _alone.clear()
    tables = Tables()
    own = {pid: _own_tables(pid) for pid in tasks}
    others = dict.fromkeys(pid for pid in _all_processes() if pid not in tasks)
    alone = True
    for kind, title in _WHAT.items():
        of_threads = {tid: pid for pid, found in own.items() for tid in found[kind]}
        tables.process_of.update(of_threads)
        classes = threads.same(kind, [*tasks, *of_threads, *others])
        shared = shared_only(classes, classes)
        # What has ended meanwhile has no table, and is equal in that to whatever else has ended.
        dead = {task for task in shared if task not in others and is_dead(of_threads.get(task, task), task)}
        for pid in others:
            first = shared.get(pid, pid)
            if first != pid and first not in dead and (first in tasks or first in of_threads):
                what = f"is shared with process {pid}, which is not part of the job ({_FLAG[kind]})"
                report.append(Finding(tables.process_of.get(first, first), title, what, _HINT))
        tables.of(kind).update({task: classes[task] for task in (*tasks, *of_threads) if task not in dead})
        alone = alone and not any(shared.get(pid, pid) != pid for pid in tasks if pid not in dead)
    report += _refusals(root_pid, tables, list(_running(tasks)))
    for task in tables.owners():
        if task in tables.process_of and (finding := _look_at_pidfd(tables.process_of[task], task)):
            report.append(finding)
            break
    if alone:
        _alone.update(tasks)


def _all_processes() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _running(tasks: Iterable[int]) -> Iterator[tree.TreeProcess]:
    for pid in tasks:
        try:
            stat = proc.read_stat(pid)
        except (OSError, SnapshotterError):
            continue
        yield tree.TreeProcess(pid, stat.ppid, stat.pgrp, stat.session, exit_signal=stat.exit_signal & 0xFF)


def _look_at_pidfd(pid: int, tid: int) -> Finding | None:
    """Whether descriptors can be fetched from a thread that has a table of its own."""
    try:
        os.close(os.pidfd_open(tid, PIDFD_THREAD))
    except ProcessLookupError:
        return None
    except OSError as error:
        what = (
            f"has a descriptor table of its own, which this kernel does not let snap see ({error.strerror})"
        )
        return Finding(pid, f"thread {tid}", what, "needs Linux 6.9 (PIDFD_THREAD)")
    return None


def _refusals(root_pid: int, tables: Tables, processes: list[tree.TreeProcess]) -> list[Finding]:
    """What could not be made again."""
    found: list[Finding] = []
    for kind, what in _WHAT.items():
        classes = tables.of(kind)
        first_of: dict[int, int] = {}
        for task, first in classes.items():
            mine = tables.process_of.get(task, task)
            other = first_of.setdefault(first, mine)
            if other != mine and (task in tables.process_of or first in tables.process_of):
                tid, other = (task, other) if task in tables.process_of else (first, mine)
                text = f"shares the {what} with process {other}, but not with its own ({_FLAG[kind]})"
                found.append(Finding(tables.process_of[tid], f"thread {tid}", text, _HINT))
    if found:
        return found
    for pid, steps in _threads_of(tables).items():
        try:
            plan_threads(pid, steps)
        except SharingError as error:
            found.append(Finding(pid, "threads", f"cannot be made again: {error}", _HINT))
    pids = [process.pid for process in processes]
    files, fs = (shared_only(classes, set(pids) & classes.keys()) for classes in (tables.files, tables.fs))
    if files or fs:
        wanted = [replace(one, files=files.get(one.pid, 0), fs=fs.get(one.pid, 0)) for one in processes]
        root = next((one for one in processes if one.pid == root_pid), None)
        outside = root is not None and root.sid not in {one.pid for one in processes}
        try:
            tree.plan_tree(wanted, root_pid, root_sid=root.sid if root is not None and outside else 0)
        except SharingError as error:
            found.append(Finding(root_pid, "processes", f"cannot be made again: {error}", _HINT))
        except tree.TreeError:
            pass  # it changes while it is looked at; the dump sees the frozen one
    return found


def _threads_of(tables: Tables) -> dict[int, list[ThreadTables]]:
    """Process -> its threads that have something of their own."""
    found: dict[int, dict[int, ThreadTables]] = {}
    for tid, pid in tables.process_of.items():
        found.setdefault(pid, {})[tid] = ThreadTables(tid, tables.files.get(tid, 0), tables.fs.get(tid, 0))
    return {pid: list(steps.values()) for pid, steps in found.items()}


# -- dump -------------------------------------------------------------------------------------------------------


def dump(ctx: DumpContext) -> Tables:
    """Who shares what in the frozen job; written into the Process and Thread messages, which are there.

    Raises:
        UnsupportedError: something is shared in a way that could not be restored, and began after the look.
    """
    living = list(ctx.living())
    alone = all(_alone.get(process.pid) == process.start_time_ticks for process in living)
    tables = Tables()
    for kind in _WHAT:
        own: dict[int, int] = {}
        for process in living:
            for task in process.threads:
                if task.facts.raw.own and (task.facts.own_files if kind == KCMP_FILES else task.facts.own_fs):
                    own[task.tid] = process.pid
        tables.process_of.update(own)
        pids = [process.pid for process in living]
        classes = tables.of(kind)
        if alone:
            classes.update({pid: pid for pid in pids})
            for pid in dict.fromkeys(own.values()):
                classes.update(threads.same(kind, [tid for tid in own if own[tid] == pid]))
        else:
            classes.update(threads.same(kind, [*pids, *own]))
    if tables.process_of or any(task != first for kind in _WHAT for task, first in tables.of(kind).items()):
        findings = _refusals(ctx.root_pid, tables, [_frozen(ctx, pid) for pid in ctx.processes])
        if findings:
            raise UnsupportedError.of(findings, ctx.root_pid)
    _write(ctx, tables)
    return tables


def _frozen(ctx: DumpContext, pid: int) -> tree.TreeProcess:
    stat = ctx.processes[pid].stat
    return tree.TreeProcess(
        pid,
        stat.ppid if pid != ctx.root_pid else 0,
        stat.pgrp,
        stat.session,
        ctx.processes[pid].is_zombie,
        stat.exit_signal & 0xFF,
    )


def _write(ctx: DumpContext, tables: Tables) -> None:
    for process in ctx.living():
        message = ctx.images[f"process/{process.pid}"]
        assert isinstance(message, task_pb2.Process)
        message.files = f"fdtable/{tables.files[process.pid]}"
        if tables.fs[process.pid] != process.pid:
            message.fs_of = tables.fs[process.pid]
        if not any(task.facts.raw.own for task in process.threads):
            continue
        for task, thread in zip(process.threads, message.threads, strict=True):
            if task.facts.own_files:
                thread.files = f"fdtable/{tables.files[task.tid]}"
            if task.facts.own_fs:
                thread.fs_of = tables.fs[task.tid]
                if thread.fs_of == task.tid:
                    directories.dump_thread(process.pid, task.tid, task.facts.word(b"Umask", 8), thread.fs)


# -- restore ----------------------------------------------------------------------------------------------------


def thread_plan(process: task_pb2.Process) -> list[ThreadTables]:
    """The threads of a process but the first, with what they share, for model.sharing.plan_threads."""
    numbers: dict[str, int] = {"": 0}
    return [
        ThreadTables(thread.tid, numbers.setdefault(thread.files, len(numbers)), thread.fs_of)
        for thread in process.threads[1:]
    ]


def process_classes(processes: Mapping[int, task_pb2.Process]) -> dict[int, tuple[int, int]]:
    """The classes of its descriptor table and of its directories, by pid, for model.tree; 0: it shares with nobody."""
    numbers: dict[str, int] = {}
    living = [one for one in processes.values() if one.state != task_pb2.Process.ZOMBIE]
    files = {one.pid: numbers.setdefault(one.files, len(numbers) + 1) for one in living if one.files}
    fs = {one.pid: one.fs_of or one.pid for one in living}
    files, fs = shared_only(files, files), shared_only(fs, fs)
    return {pid: (files.get(pid, 0), fs.get(pid, 0)) for pid in processes}
