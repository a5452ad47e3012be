"""Who may look into whom: the kernel's rule for ptrace access, as a function of ids and capabilities. Pure.

Source: __ptrace_may_access() in the kernel's kernel/ptrace.c and cap_ptrace_access_check() in security/commoncap.c, for
PTRACE_MODE_READ_FSCREDS, which the files of /proc/PID ask for. Security modules that may deny more are left out.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from images import task_pb2

_CAP_DAC_OVERRIDE, _CAP_DAC_READ_SEARCH, _CAP_SYS_PTRACE = 1 << 1, 1 << 2, 1 << 19


@dataclass(frozen=True, slots=True)
class Subject:
    """A task as that rule sees it."""

    pid: int
    """Of its process."""
    uids: tuple[int, int, int, int]
    """Real, effective, saved, for files."""
    gids: tuple[int, int, int, int]
    cap_permitted: int
    cap_effective: int
    dumpable: bool
    """Whether its memory is its user's to look at (PR_SET_DUMPABLE 1)."""


def may_look(caller: Subject, target: Subject) -> bool:
    """Whether `caller` may open what shows the memory of `target`."""
    if caller.pid == target.pid or caller.cap_effective & _CAP_SYS_PTRACE:
        return True
    same = set(target.uids[:3]) == {caller.uids[3]} and set(target.gids[:3]) == {caller.gids[3]}
    return same and target.dumpable and not target.cap_permitted & ~caller.cap_effective


def may_open(caller: Subject, file: os.stat_result, wanted: int) -> bool:
    """Whether `caller` may open a file of a kernel's file system by its mode (4 read, 2 write, 1 search).

    Supplementary groups are left out: those files belong to root's group.
    """
    override = _CAP_DAC_OVERRIDE | (0 if wanted & 2 else _CAP_DAC_READ_SEARCH)
    if caller.cap_effective & override:
        return True
    shift = 6 if caller.uids[3] == file.st_uid else 3 if caller.gids[3] == file.st_gid else 0
    return file.st_mode >> shift & wanted == wanted


def of_image(process: task_pb2.Process, credentials: task_pb2.Credentials) -> Subject:
    """A thread of an image's process."""
    own = credentials
    return Subject(
        process.pid,
        (own.ruid, own.euid, own.suid, own.fsuid),
        (own.rgid, own.egid, own.sgid, own.fsgid),
        own.cap_permitted,
        own.cap_effective,
        process.dumpable == 1,
    )
