"""The look step alone: what stands in the way of a dump of a job, without touching it.

Owns the refusals that belong to no resource (no such process, ourselves, kernel threads, too many tasks) and the
walk through every resource's look(). Reads /proc only. dump() begins with the same steps.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from checkpoint.kernel import proc
from checkpoint.kernel import sys as ksys
from checkpoint.kernel.tasks import children, task_ids, without_workers
from checkpoint.resources import files, memory, namespaces, policies, sharing, sysv, task_look, unseen
from images import task_pb2
from snapshotter.base.errors import (
    Finding,
    PermissionDeniedError,
    SnapshotterError,
    TargetGoneError,
    UnsupportedError,
)

_KERNEL_THREAD = 0x00200000  # PF_KTHREAD
_VFORK_S = 1.0
_LOOKS_AT_WHOLE = 10
_LOOKS: tuple[Callable[[int, list[Finding]], None], ...] = (task_look.look, memory.look, files.look)


Program = tuple[object, ...]
"""What an exec or a change of rights changes: if it is the same later, what the look decided still holds."""


@dataclass(slots=True)
class CheckReport:
    """What check() saw."""

    root_pid: int
    findings: list[Finding] = field(default_factory=list)
    pids: list[int] = field(default_factory=list)
    """Every process of the job, parents first, zombies included."""
    tasks: dict[int, int] = field(default_factory=dict)
    """pid -> start time in ticks, of the processes that are not zombies."""
    programs: dict[int, Program] = field(default_factory=dict)
    """What each of them ran, and with which rights, before the look at it."""
    nr_tasks: int = 0
    warnings: list[str] = field(default_factory=list)
    """What a point of it would lack, as far as it is seen here."""
    unseen: tuple[str, ...] = ()
    """What would be refused and cannot be seen from outside: only a take can find it."""

    @property
    def ok(self) -> bool:
        """Nothing was found."""
        return not self.findings

    def raise_if_refused(self) -> None:
        """UnsupportedError that names the first finding and carries all."""
        if self.findings:
            raise UnsupportedError.of(self.findings, self.root_pid)


def check(pid: int, *, max_tasks: int = 32768) -> CheckReport:
    """Look at the job below `pid`.

    Args:
        pid: the root process of the job.
        max_tasks: more tasks than this are a finding.

    Raises:
        TargetGoneError: there is no such process.
        PermissionDeniedError: it may not be looked at.
        UnsupportedError: never; what cannot be dumped is in the report.
    """
    ksys.allow_descriptors()
    report = CheckReport(pid)
    _check_root(pid, report)
    if report.findings:
        return report
    _walk(report, max_tasks)
    for one in report.tasks:
        with contextlib.suppress(TargetGoneError):
            report.programs[one] = program_of(proc.read_stat(one), proc.read_status(one))
        policies.warn(_message_of(one), report.warnings.append)
        if not look_at_process(one, report.findings) and one == pid:
            raise TargetGoneError("ended while it was looked at", where=f"task {pid}")
    _look_at_sharing(report)
    _look_at_whole(report, max_tasks)
    sysv.look_job(report.tasks, report.warnings.append)
    report.unseen = unseen.of_job(report.tasks)
    return report


def look_at_process(pid: int, findings: list[Finding]) -> bool:
    """Every resource's look at one process. False: it ended meanwhile."""
    for look in _LOOKS:
        try:
            look(pid, findings)
        except (TargetGoneError, FileNotFoundError, ProcessLookupError):
            return False
    return True


def _message_of(pid: int) -> task_pb2.Process:
    """A process as far as its policies go by: the numbers of its threads."""
    return task_pb2.Process(pid=pid, threads=[task_pb2.Thread(tid=tid) for tid in task_ids(pid)])


def program_of(stat: proc.Stat, status: proc.Status) -> Program:
    """By the places of an address space, which each exec chooses anew; ids, capabilities and what can only be added to them."""
    places = (
        stat.start_code,
        stat.end_code,
        stat.start_data,
        stat.start_brk,
        stat.start_stack,
        stat.arg_start,
        stat.env_start,
    )
    capabilities = (status.cap_permitted, status.cap_inheritable, status.cap_bounding, status.cap_ambient)
    confined = (status.no_new_privs, status.seccomp, status.seccomp_filters, status.fields.get("untag_mask"))
    return (*places, status.uids[:3], status.gids[:3], capabilities, confined)


def _look_at_whole(report: CheckReport, max_tasks: int) -> None:
    """What takes all of the job to judge. A child that was born meanwhile looks like somebody outside: so what is found counts
    only if another look, at all that there are by then, finds the very same.
    """
    before: list[str] = []
    for _ in range(_LOOKS_AT_WHOLE):
        found: list[Finding] = []
        sharing.look_job(report.root_pid, report.tasks, found)
        files.look_job(report.pids, found)
        if not found or list(map(str, found)) == before:
            break
        before = list(map(str, found))
        now = CheckReport(report.root_pid)
        _walk(now, max_tasks)
        for pid, start_time_ticks in now.tasks.items():
            if report.tasks.get(pid) != start_time_ticks:
                with contextlib.suppress(TargetGoneError):
                    report.programs[pid] = program_of(proc.read_stat(pid), proc.read_status(pid))
                look_at_process(pid, report.findings)
        report.pids, report.tasks, report.nr_tasks = now.pids, now.tasks, now.nr_tasks
        if now.findings:
            found = now.findings
            break
    report.findings += found


def _look_at_sharing(report: CheckReport) -> None:
    """memory.look_sharing; a vfork that is under way, mostly over in a moment, is waited for."""
    deadline = time.monotonic() + _VFORK_S
    pause = 0.0005
    while True:
        found: list[Finding] = []
        memory.look_sharing(report.tasks, found)
        if time.monotonic() > deadline or not found:
            report.findings += found
            return
        time.sleep(pause)
        pause = min(0.05, pause * 2)


def _check_root(pid: int, report: CheckReport) -> None:
    owner = _process_of(pid)
    if not owner:
        raise TargetGoneError(
            "no such process", where=f"task {pid}", hint="`ps -e` lists the processes that run"
        )
    if owner != pid:
        raise TargetGoneError(
            f"is a thread of process {owner}, not a process",
            where=f"task {pid}",
            hint=f"name the process: {owner}",
        )
    stat = proc.read_stat(pid)
    if stat.flags & _KERNEL_THREAD:
        report.findings.append(
            Finding(pid, "task", "is a kernel thread", "only programs of user space have a state to take")
        )
        return
    if stat.state in {"Z", "X"}:
        report.findings.append(
            Finding(pid, "task", "has ended (zombie)", f"its parent, task {stat.ppid}, must reap it")
        )
        return
    namespaces.look_root(pid, report.findings)
    if pid in _own_line():
        what = "is snap itself" if pid == os.getpid() else "is an ancestor of snap"
        report.findings.append(
            Finding(
                pid, "task", f"{what}: whoever freezes itself cannot thaw", "run snap from outside of the job"
            )
        )
    if not os.access(f"/proc/{pid}/map_files", os.R_OK):
        raise PermissionDeniedError(
            "may not be looked at", where=f"task {pid}", hint="run as root or as the user of the job"
        )


def _process_of(tid: int) -> int:
    """The process of a thread, 0 when there is no such thread."""
    try:
        return proc.read_status(tid).tgid
    except (OSError, SnapshotterError):
        return 0


def _own_line() -> set[int]:
    """Ourselves and all our ancestors."""
    line: set[int] = set()
    pid = os.getpid()
    while pid > 0 and pid not in line:
        line.add(pid)
        try:
            pid = proc.read_stat(pid).ppid
        except (OSError, SnapshotterError):
            break
    return line


def _walk(report: CheckReport, max_tasks: int) -> None:
    queue = [report.root_pid]
    seen = set(queue)
    own = os.getpid()
    for pid in queue:
        tids = [tid for _, tid in without_workers((pid, tid) for tid in task_ids(pid))]
        try:
            stat = proc.read_stat(pid)
        except (OSError, SnapshotterError):
            continue
        if not tids:
            continue
        if pid == own:
            report.findings.append(
                Finding(pid, "task", "is snap itself, inside the job", "run snap from outside of the job")
            )
            continue
        report.pids.append(pid)
        report.nr_tasks += len(tids)
        if stat.state not in {"Z", "X"}:
            report.tasks[pid] = stat.start_time_ticks
        if report.nr_tasks > max_tasks:
            report.findings.append(
                Finding(report.root_pid, "tasks", f"the job has more than {max_tasks} tasks", "a fork bomb?")
            )
            return
        fresh = [child for child in children(pid, tids) if child not in seen]
        seen.update(fresh)
        queue += fresh
