"""How a process learns that its child has died: what it waits for just now, and what would tell it.

Reads /proc only (proc_pid_syscall(5), proc_pid_fdinfo(5)); judges nothing.
"""

from __future__ import annotations

import os
from typing import Literal

from checkpoint.kernel import proc
from snapshotter.base.errors import SnapshotterError

_WAIT4, _WAITID = 61, 247
_P_ALL, _P_PID = 0, 1
_SIGCHLD_BIT = 1 << 16
_MOST_DESCRIPTORS = 4096

Waits = Literal["", "this", "any"]
Told = Literal["", "handler", "signalfd", "pidfd", "ignored"]


def parse_syscall(text: str, child: int) -> Waits:
    """Whether a line of /proc/PID/task/TID/syscall is a wait for this child: for it alone, or for any child."""
    words = text.split()
    if len(words) < 3 or not words[0].isdigit():
        return ""  # "running", "blocked"
    number, first, second = int(words[0]), int(words[1], 16), int(words[2], 16)
    if number == _WAIT4:
        wanted = first & 0xFFFFFFFF
        if wanted == child:
            return "this"
        # -1 any child; 0 and below -1 those of a process group
        return "any" if not 0 < wanted < 0x80000000 else ""
    if number == _WAITID:
        if first == _P_PID:
            return "this" if second == child else ""
        return "any"  # a group's, or by pidfd
    return ""


def waits_for(parent: int, child: int) -> Waits:
    """What the threads of a process wait for just now. "" too where it may not be seen."""
    found: set[Waits] = set()
    try:
        for tid in os.listdir(f"/proc/{parent}/task"):
            with open(f"/proc/{parent}/task/{tid}/syscall", encoding="ascii") as file:
                found.add(parse_syscall(file.read(), child))
    except OSError:
        pass
    return "this" if "this" in found else "any" if "any" in found else ""


def told_of(parent: int, child: int) -> Told:
    """What tells a process that does not wait: a handler of SIGCHLD, a signalfd, a pidfd of the child; or the kernel reaps for it."""
    try:
        status = proc.read_status(parent)
    except (OSError, SnapshotterError):
        return ""
    if status.sig_ignored & _SIGCHLD_BIT:
        return "ignored"
    if status.sig_caught & _SIGCHLD_BIT:
        return "handler"
    try:
        for fd in os.listdir(f"/proc/{parent}/fdinfo")[:_MOST_DESCRIPTORS]:
            told = _tells(f"/proc/{parent}/fdinfo/{fd}", child)
            if told:
                return told
    except OSError:
        pass
    return ""


def _tells(path: str, child: int) -> Told:
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            for line in file:
                key, _, value = line.partition(":")
                if key == "sigmask" and int(value, 16) & _SIGCHLD_BIT:
                    return "signalfd"
                if key == "Pid" and value.strip() == str(child):
                    return "pidfd"
    except (OSError, ValueError):
        pass
    return ""


def nearest_reaper() -> int:
    """Who gets the orphans of this process, and so becomes the parent of a restored job: the nearest subreaper, or init.

    The kernel shows nobody's PR_SET_CHILD_SUBREAPER, so a grandchild is orphaned and asked.
    """
    read_end, write_end = os.pipe2(os.O_CLOEXEC)
    middle = os.fork()
    if middle == 0:
        try:
            middle = os.getpid()
            if os.fork() == 0:
                _say_new_parent(middle, write_end)
        finally:
            os._exit(0)
    os.close(write_end)
    os.waitpid(middle, 0)
    with os.fdopen(read_end, "rb") as pipe:
        return int(pipe.read() or 0)


def _say_new_parent(middle: int, write_end: int) -> None:
    while os.getppid() == middle:
        os.sched_yield()
    os.write(write_end, str(os.getppid()).encode())
