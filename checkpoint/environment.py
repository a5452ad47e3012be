"""Whether this machine can take a point back: CPU, rights, pids, the old job. Looks and judges; replace.py kills.

Owns the survey of what holds the pids that are needed, the rule for "it is the old job" (same pid, same start time,
same boot; or an identity that the caller vouches for: a restored task has a new start time).
Everything raises RestoreConflictError before anything is touched.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from checkpoint.kernel import features, proc
from checkpoint.resources import credentials, registers
from checkpoint.restore_context import RestoreContext
from images import task_pb2
from snapshotter.base.errors import PermissionDeniedError, RestoreConflictError, SnapshotterError

# Flags of /proc/cpuinfo that name instructions a program may have chosen at its start.
_INSTRUCTIONS = frozenset(
    [
        "sse",
        "sse2",
        "pni",
        "ssse3",
        "sse4_1",
        "sse4_2",
        "sse4a",
        "avx",
        "avx2",
        "avx_vnni",
        "fma",
        "fma4",
        "f16c",
        "xop",
        "tbm",
        "bmi1",
        "bmi2",
        "abm",
        "adx",
        "movbe",
        "popcnt",
        "aes",
        "vaes",
        "pclmulqdq",
        "vpclmulqdq",
        "sha_ni",
        "gfni",
        "rdrand",
        "rdseed",
        "fsgsbase",
        "erms",
        "fsrm",
        "clwb",
        "clflushopt",
        "lahf_lm",
        "cx16",
        "rdpid",
        "rdtscp",
        "xsave",
        "xsaveopt",
        "xsavec",
        "rtm",
        "hle",
        "pku",
        "ospke",
        "waitpkg",
        "serialize",
        "movdiri",
        "movdir64b",
        "cldemote",
        "user_shstk",
        "mmx",
        "3dnow",
    ]
)
_INSTRUCTION_PREFIXES = ("avx512", "amx")
_XGETBV = bytes.fromhex("31c9 0f01d0 48c1e220 4809d0 c3")  # xor ecx,ecx; xgetbv; shl rdx,32; or rax,rdx; ret
_CAP_CHECKPOINT_RESTORE, _CAP_SYS_ADMIN = 1 << 40, 1 << 21
_ID_CAPS = {6: "CAP_SETGID", 7: "CAP_SETUID", 8: "CAP_SETPCAP"}
_POLL_S = 0.005
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Holder:
    """A process (or a thread's) that is there now."""

    pid: int
    ppid: int
    pgid: int
    sid: int
    state: str
    start_time_ticks: int
    comm: str
    tty: int = 0
    """Device number of its controlling terminal as /proc/PID/stat has it, 0: none."""
    front: int = 0
    """The process group in front on that terminal."""

    def __str__(self) -> str:
        return f"task {self.pid} ({self.comm})"


@dataclass(slots=True)
class Survey:
    """What is there now, as far as the restore cares."""

    processes: dict[int, Holder]
    own_sid: int
    own_pgid: int
    old: dict[int, Holder] = field(default_factory=dict)
    """Processes of the old living job, the new children of its tasks included. To be killed."""


def survey(ctx: RestoreContext) -> Survey:
    """Read /proc once and find the old job.

    Raises:
        RestoreConflictError: a needed pid is held by something that is not the job.
    """
    found = Survey(processes(), os.getsid(0), os.getpgid(0))
    same_boot = ctx.manifest.boot_id == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    known: dict[int, set[int]] = {}
    for tasks in ctx.options.known_tasks:
        for pid, ticks in tasks.items():
            known.setdefault(pid, set()).add(ticks)
    for pid, process in ctx.processes.items():
        holder = found.processes.get(pid)
        if holder is None:
            continue
        times = known.get(pid, set()) | ({process.start_time_ticks} if same_boot else set())
        if holder.start_time_ticks in times:
            found.old[pid] = holder
    _add_descendants(found)
    _await_reaped(found, time.monotonic() + ctx.options.reap_timeout_s)
    _check_ids(ctx, found)
    return found


def _await_reaped(found: Survey, deadline: float) -> None:
    """Wait until the dead processes of the old job are reaped by those outside who must do it.

    Raises:
        RestoreConflictError: at the deadline one still is there. The living rest of the job is not killed for nothing.
    """
    for holder in list(found.old.values()):
        if holder.state not in "ZX" or holder.ppid in found.old:
            continue
        while _is_dead(holder):
            with contextlib.suppress(ChildProcessError):
                os.waitpid(holder.pid, os.WNOHANG)
            if time.monotonic() > deadline:
                parent = holder_of(holder.ppid)
                raise RestoreConflictError(
                    f"pid {holder.pid} is still held by a zombie ({holder.comm}) that its parent has not reaped",
                    hint=f"{parent or f'task {holder.ppid}'} must wait for it (or end), then roll back; nothing was touched",
                )
            time.sleep(_POLL_S)
        if holder_of(holder.pid) is None:
            del found.old[holder.pid]


def _is_dead(holder: Holder) -> bool:
    """Whether it is a zombie still: all of it, not only its first thread."""
    now = holder_of(holder.pid)
    if now is None or now.start_time_ticks != holder.start_time_ticks or now.state not in "ZX":
        return False
    try:
        return len(os.listdir(f"/proc/{holder.pid}/task")) == 1
    except OSError:
        return False


def _add_descendants(found: Survey) -> None:
    children: dict[int, list[int]] = {}
    for holder in found.processes.values():
        children.setdefault(holder.ppid, []).append(holder.pid)
    queue = list(found.old)
    for pid in queue:
        for child in children.get(pid, []):
            if child not in found.old:
                found.old[child] = found.processes[child]
                queue.append(child)


def _check_ids(ctx: RestoreContext, found: Survey) -> None:
    if found.old and not ctx.options.replace:
        raise RestoreConflictError("the job is still running", where=str(next(iter(found.old.values()))))
    if os.getpid() in found.old:
        raise RestoreConflictError(
            "snap runs inside the job that it should replace", hint="run it from outside of the job"
        )
    pid_max = int(Path("/proc/sys/kernel/pid_max").read_text())
    ours = ctx.task_ids()
    deadline = time.monotonic() + ctx.options.reap_timeout_s
    for wanted in sorted(ours):
        if wanted >= pid_max:
            raise RestoreConflictError(
                f"pid {wanted} is beyond kernel.pid_max ({pid_max})",
                hint=f"sysctl kernel.pid_max={wanted + 1}",
            )
        holder = _holder_that_stays(wanted, found, deadline)
        if holder is not None:
            raise RestoreConflictError(
                f"pid {wanted} is needed but held by {holder}, which is not the job",
                hint="end it, or wait until it has ended, then roll back",
            )
    # Mostly a zombie that init has not reaped yet.
    await_no_stray(ours, lambda holder: _is_of_old_job(holder, found), deadline)


def _holder_that_stays(pid: int, found: Survey, deadline: float) -> Holder | None:
    """Who has that number and is not the old job; a zombie is given time to be reaped: what a rollback that failed has left."""
    while True:
        holder = holder_of(pid)
        if holder is None or _is_of_old_job(holder, found):
            return None
        if holder.state not in "ZX" or time.monotonic() > deadline:
            return holder
        time.sleep(_POLL_S)


def _is_of_old_job(holder: Holder, found: Survey) -> bool:
    """Whether it was there at the survey or one of those has made it since: a living job goes on making children."""
    at: Holder | None = holder
    while at is not None:
        known = found.old.get(at.pid)
        if known is not None and known.start_time_ticks == at.start_time_ticks:
            return True
        at = holder_of(at.ppid) if at.ppid else None
    return False


def await_no_stray(
    wanted: set[int], spared: Callable[[Holder], bool], deadline: float, *, living_only: bool = False
) -> None:
    """Wait until no session and no process group has a wanted number any more, those of `spared` processes left out.

    The kernel keeps the number of a dead task as long as anything is in its session or group, a zombie too: the last
    short-lived child of the job, mostly. Zombies that are ours are reaped.

    Raises:
        RestoreConflictError: at the deadline one is still there; it is named.
    """
    while stray := _stray(spared, wanted, living_only):
        kind, number, holder = stray
        with contextlib.suppress(ChildProcessError):
            os.waitpid(holder.pid, os.WNOHANG)
        if time.monotonic() > deadline:
            dead = holder.state in "ZX"
            raise RestoreConflictError(
                f"pid {number} is needed but is still the {kind} of {holder}, "
                + ("a zombie that its parent has not reaped" if dead else "which is not in the job's tree"),
                hint=f"{holder_of(holder.ppid) or f'task {holder.ppid}'} must wait for it (or end), then roll back"
                if dead
                else "it was left behind by the job: end it, then roll back",
            )
        time.sleep(_POLL_S)


def _stray(
    spared: Callable[[Holder], bool], wanted: set[int], living_only: bool
) -> tuple[str, int, Holder] | None:
    """A process whose session or group has a wanted number."""
    for holder in processes().values():
        if living_only and holder.state in "ZX":
            continue
        for kind, number in (("session", holder.sid), ("process group", holder.pgid)):
            if number in wanted and not spared(holder):
                return kind, number, holder
    return None


def check_free(pids: Iterable[int], found: Survey) -> None:
    """Numbers that helpers need (dead leaders of sessions and groups) must be free or the old job's.

    Raises:
        RestoreConflictError: one is held.
    """
    for pid in pids:
        holder = holder_of(pid)
        users = [
            other
            for other in found.processes.values()
            if pid in {other.sid, other.pgid} and other.pid not in found.old
        ]
        if holder is not None and holder.pid not in found.old:
            users.append(holder)
        if users:
            raise RestoreConflictError(
                f"number {pid} is needed for a session or process group of the job but {users[0]} uses it",
                hint="end it, then roll back",
            )


def check_machine(ctx: RestoreContext) -> None:
    """Machine and CPU have what the image uses, and its ids mean the same here. Warns of what no longer confines it.

    Raises:
        RestoreConflictError: they lack something; it is named.
    """
    manifest = ctx.manifest
    machine = os.uname().machine
    if manifest.machine and manifest.machine != machine:
        raise RestoreConflictError(f"the point is of a {manifest.machine} machine, this is {machine}")
    if manifest.id_maps != proc.id_maps():
        raise RestoreConflictError(
            "the point was taken in another user namespace: its user and group ids, and what root may do, mean something else here",
            hint="roll back in a user namespace with the same uid_map and gid_map",
        )
    for text in manifest.unconfined:
        ctx.warn(text)
    wanted = manifest.xfeatures
    for process in ctx.processes.values():
        for thread in process.threads:
            wanted |= registers.xfeatures(thread.xstate)
    missing = wanted & ~own_xfeatures()
    if missing:
        raise RestoreConflictError(
            f"the point uses CPU state components {missing:#x} that this CPU (or its hypervisor) does not have",
            hint="restore on a machine with the same or newer CPU",
        )
    lost = sorted(flag for flag in set(manifest.cpu_flags) - cpu_flags() if _is_instruction(flag))
    if lost:
        raise RestoreConflictError(
            f"the job may use CPU instructions that are missing here: {' '.join(lost)}",
            hint="restore on a machine with the same or newer CPU",
        )


def check_children() -> None:
    """Whether we can wait for our own children: probes, the finisher, tasks that are being built.

    Raises:
        SnapshotterError: SIGCHLD is ignored, so the kernel forgets them when they end (waitpid(2)). The command line sees to that
            by itself; a program that uses this as a library has to decide.
    """
    if signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN:
        raise SnapshotterError(
            "SIGCHLD is ignored here, so that no child can be waited for",
            where="this process",
            hint="signal.signal(signal.SIGCHLD, signal.SIG_DFL) first; nothing was touched",
        )


def may_restore() -> bool:
    """Whether this process has the capability that makes processes with their old pids."""
    return bool(proc.read_status(os.getpid()).cap_effective & (_CAP_CHECKPOINT_RESTORE | _CAP_SYS_ADMIN))


def check_rights(ctx: RestoreContext) -> None:
    """Whether snap may do here what building the job takes, found out before the old one is killed for it.

    Raises:
        PermissionDeniedError: names the right that is missing.
    """
    if not may_restore():
        raise PermissionDeniedError(
            "snap may not make tasks with their old pids, nor set their executable (clone3 set_tid, PR_SET_MM_MAP)",
            where="this process",
            hint="run as root, or with CAP_CHECKPOINT_RESTORE; nothing was touched",
        )
    for name in ("clone3_set_tid", "set_mm_map", "pidfd_getfd"):
        feature = features.probe(name)
        if not feature.ok:
            raise PermissionDeniedError(
                f"this system does not allow {name}: {feature.note}",
                where="this process",
                hint="run as root of the pid namespace, or with CAP_CHECKPOINT_RESTORE; nothing was touched",
            )
    lacking = [
        name for bit, name in _ID_CAPS.items() if not proc.read_status(os.getpid()).cap_effective >> bit & 1
    ]
    if not lacking:
        return
    own = credentials.own()
    for process in ctx.processes.values():
        if process.state == task_pb2.Process.ZOMBIE:
            continue
        for thread in process.threads:
            if thread.credentials != own:
                raise PermissionDeniedError(
                    f"it has other ids or capabilities (user {thread.credentials.euid}) than snap (user {own.euid}), "
                    f"which lacks {', '.join(lacking)} to give them back",
                    where=f"task {thread.tid}",
                    hint="run as root, or as the user of the job; nothing was touched",
                )


def cpu_flags() -> set[str]:
    """The flags line of /proc/cpuinfo."""
    with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
        for line in file:
            if line.startswith("flags"):
                return set(line.partition(":")[2].split())
    return set()


def own_xfeatures() -> int:
    """XCR0 of this CPU, by the xgetbv instruction; x87 and SSE only where xsave is off."""
    if "osxsave" not in cpu_flags() and "xsave" not in cpu_flags():
        return 3
    with mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC) as page:
        page.write(_XGETBV)
        start = ctypes.c_char.from_buffer(page)
        value = int(ctypes.CFUNCTYPE(ctypes.c_uint64)(ctypes.addressof(start))())
        del start
    return value


def _is_instruction(flag: str) -> bool:
    return flag in _INSTRUCTIONS or flag.startswith(_INSTRUCTION_PREFIXES)


def until_free(pid: int, timeout_s: float, make: Callable[[], T]) -> T:
    """Make a task with a certain pid, again and again while the kernel still keeps the number of a dead one.

    A task leaves /proc some instructions before its number is free, and under load (SCHED_IDLE) those take long.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return make()
        except RestoreConflictError as error:
            holder = holder_of(pid)
            if holder is not None:
                raise RestoreConflictError(
                    f"pid {pid} was taken by {holder} while the job was being replaced",
                    hint="run the rollback again when it has ended",
                ) from error
            if time.monotonic() > deadline:
                raise
        time.sleep(_POLL_S)


# -- /proc ------------------------------------------------------------------------------------------------------


def processes() -> dict[int, Holder]:
    """Everything in /proc."""
    found = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            holder = _parse(int(name))
            if holder is not None:
                found[holder.pid] = holder
    return found


def holder_of(tid: int) -> Holder | None:
    """The process that `tid` is, or is a thread of."""
    try:
        with open(f"/proc/{tid}/status", encoding="utf-8", errors="replace") as file:
            tgid = next(int(line.split()[1]) for line in file if line.startswith("Tgid:"))
    except (OSError, StopIteration):
        return None
    return _parse(tgid)


def _parse(pid: int) -> Holder | None:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            data = file.read()
    except OSError:
        return None
    head, _, tail = data.rpartition(b")")
    fields = tail.split()
    return Holder(
        pid,
        int(fields[1]),
        int(fields[2]),
        int(fields[3]),
        fields[0].decode(),
        int(fields[19]),
        os.fsdecode(head.partition(b"(")[2]),
        int(fields[4]) & 0xFFFFFFFF,
        int(fields[5]),
    )
