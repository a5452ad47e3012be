"""What of the state of a process and its threads stands in the way of a dump: kinds of tasks and of state that are not supported.

Reads /proc only, while the job runs. What cannot be seen from there is refused in the frozen window (task.py).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from checkpoint.kernel import distant, proc
from checkpoint.parasite import attending
from checkpoint.parasite.infection import AREA_SIZE, DATA_SIZE, look_at_code
from checkpoint.resources import cgroups, directories, keyrings, namespaces, sharing, timers
from snapshotter.base.errors import Finding, TargetGoneError

if TYPE_CHECKING:
    from checkpoint.kernel.proc import Status

_NOTHING_UNTAGGED = 2**64 - 1


def look(pid: int, report: list[Finding]) -> None:
    """What of the task state of one process stands in the way of a dump. Reads /proc only.

    Zombies inside a job are fine; that the root is none is the caller's to check.
    """
    status = proc.read_status(pid)
    stat = proc.read_stat(pid)
    if stat.flags & 0x00200000:  # PF_KTHREAD
        report.append(Finding(pid, "task", "is a kernel thread", "only user space can be dumped"))
        return
    if stat.state in "ZX":
        return
    _look_personality(pid, report)
    tids = sorted(map(int, os.listdir(f"/proc/{pid}/task")))
    namespaces.look(pid, tids, report)
    timers.look(pid, proc.read_timers(pid), tids, report)
    look_at_code(pid, report)
    _look_room(pid, status, report)
    directories.look(pid, report)
    cgroups.look(pid, report)
    keyrings.look(status.uids[0])
    for tid in tids:
        try:
            of_thread = status if tid == pid else proc.read_status(pid, tid)
        except TargetGoneError:
            continue
        _look_thread(pid, tid, of_thread, report)
    for tid in sharing.directory_owners(pid):
        directories.look(pid, report, tid)


def _look_thread(pid: int, tid: int, status: Status, report: list[Finding]) -> None:
    where = "task" if tid == pid else f"thread {tid}"
    if status.tracer_pid not in {0, os.getpid()} and not attending.is_attendant(status.tracer_pid):
        tracer = _comm(status.tracer_pid)
        report.append(
            Finding(
                pid,
                where,
                f"is traced by task {status.tracer_pid} ({tracer})",
                "only one tracer can have it: let the debugger detach",
            )
        )
    if status.seccomp:
        report.append(Finding(pid, where, "has seccomp filters", "start the job without its sandbox"))
    if status.shadow_stack:
        report.append(
            Finding(pid, where, "has a user shadow stack (CET)", "start it with GLIBC_TUNABLES without SHSTK")
        )
    if tid == pid and has_tagged_addresses(status):
        report.append(
            Finding(
                pid,
                where,
                "has the kernel ignore bits of addresses (LAM)",
                "start it without tagged addresses",
            )
        )
    if tid == pid and status.state[:1] in {"Z", "X"} and status.threads > 1:
        report.append(
            Finding(
                pid,
                where,
                "its first thread has exited while others run",
                "such a process cannot be made again exactly",
            )
        )


def has_tagged_addresses(status: Status) -> bool:
    """arch_prctl(ARCH_ENABLE_TAGGED_ADDR), which cannot be enabled again once a process has threads."""
    return int(status.fields.get("untag_mask", "-1"), 16) not in {-1, _NOTHING_UNTAGGED}


def _look_personality(pid: int, report: list[Finding]) -> None:
    try:
        link = os.fsencode(os.readlink(f"/proc/{pid}/exe"))
        with distant.opened(f"/proc/{pid}/exe", link) as read:
            head = read(0, 20)
    except OSError:
        return  # the memory resource names what is wrong with an executable
    if head[:4] == b"\x7fELF" and (head[4] != 2 or head[18:20] != b"\x3e\x00"):
        report.append(
            Finding(pid, "task", "is not an x86-64 program (32-bit)", "only 64-bit tasks can be dumped")
        )


_ROOMS = (
    (b"Max address space", "VmSize", AREA_SIZE, "address space", "as"),
    (b"Max data size", "VmData", DATA_SIZE, "data size", "data"),
)
"""Limits that mapping the parasite runs into (mmap(2), ENOMEM): the line of /proc/PID/limits, that of /proc/PID/status which counts
what is used, how many bytes it takes, the name, prlimit(1)'s option.
"""


def _look_room(pid: int, status: Status, report: list[Finding]) -> None:
    """Limits of memory (ulimit -v, ulimit -d) must leave room for the parasite."""
    with open(f"/proc/{pid}/limits", "rb") as file:
        lines = file.readlines()
    for line, used, need_bytes, name, option in _ROOMS:
        words = next((one for one in lines if one.startswith(line)), b"").split()
        if len(words) < 5 or not words[3].isdigit():
            continue
        left = int(words[3]) - int(status.fields.get(used, "0 kB").split()[0]) * 1024
        if left >= need_bytes:
            continue
        enough = int(words[3]) + need_bytes - min(left, 0)
        report.append(
            Finding(
                pid,
                "task",
                f"has {max(left, 0) // 1024} KiB of {name} left to its limit, and snap needs {need_bytes // 1024}",
                f"raise it: prlimit --pid {pid} --{option}={enough}:",
            )
        )


def _comm(pid: int) -> str:
    try:
        return os.fsdecode(Path(f"/proc/{pid}/comm").read_bytes().removesuffix(b"\n"))
    except OSError:
        return "?"
