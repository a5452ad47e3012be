"""Credentials: user and group ids, supplementary groups, the five capability sets, securebits, no_new_privs.

Per thread, as the kernel has them. Restored late: everything before needs root. The order is forced:
SECBIT_NO_SETUID_FIXUP first, so that changing ids takes no capability; then groups, gids, uids; the bounding set;
inheritable and ambient while everything is still permitted; the final securebits while CAP_SETPCAP is there; then the
final permitted and effective sets; no_new_privs last. Setting ids resets dumpable and pdeath_signal, so those come after.
"""

from __future__ import annotations

import ctypes
import os
import struct
from functools import lru_cache
from typing import TYPE_CHECKING

from checkpoint.kernel import proc
from checkpoint.kernel.proc import Status
from checkpoint.resources import prctl
from images import task_pb2

if TYPE_CHECKING:
    from checkpoint.parasite import Batch

_HEADER = struct.pack("<Ii", 0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, ourselves
_SETS = struct.Struct("<IIIIII")
_SECBIT_NO_SETUID_FIXUP = 1 << 2
_SECBIT_KEEP_CAPS = 1 << 4


def dump(status: Status, securebits: int) -> task_pb2.Credentials:
    """From /proc/PID/task/TID/status and PR_GET_SECUREBITS."""
    ruid, euid, suid, fsuid = status.uids
    rgid, egid, sgid, fsgid = status.gids
    return task_pb2.Credentials(
        ruid=ruid,
        euid=euid,
        suid=suid,
        fsuid=fsuid,
        rgid=rgid,
        egid=egid,
        sgid=sgid,
        fsgid=fsgid,
        groups=status.groups,
        cap_inheritable=status.cap_inheritable,
        cap_permitted=status.cap_permitted,
        cap_effective=status.cap_effective,
        cap_bounding=status.cap_bounding,
        cap_ambient=status.cap_ambient,
        securebits=securebits,
        no_new_privs=bool(status.no_new_privs),
    )


@lru_cache(maxsize=1)
def own() -> task_pb2.Credentials:
    """What the stubs start with: snap's own. Cached; snap never changes its ids."""
    return dump(proc.read_status(os.getpid()), ctypes.CDLL(None).prctl(prctl.GET_SECUREBITS, 0, 0, 0, 0))


def restore(batch: Batch, wanted: task_pb2.Credentials, current: task_pb2.Credentials) -> list[str]:
    """Make the calling thread's credentials `wanted`; returns warnings. Adds nothing if they are so already."""
    if wanted == current:
        return []
    warnings = []
    batch.call(
        "prctl",
        prctl.SET_SECUREBITS,
        current.securebits | _SECBIT_NO_SETUID_FIXUP | _SECBIT_KEEP_CAPS,
        0,
        0,
        0,
    )
    groups = list(wanted.groups)
    batch.call("setgroups", len(groups), struct.pack(f"<{len(groups)}I", *groups) if groups else 0)
    batch.call("setresgid", wanted.rgid, wanted.egid, wanted.sgid)
    batch.call("setfsgid", wanted.fsgid, check=False)
    batch.call("setresuid", wanted.ruid, wanted.euid, wanted.suid)
    batch.call("setfsuid", wanted.fsuid, check=False)
    for cap in range(64):
        if current.cap_bounding & ~wanted.cap_bounding & (1 << cap):
            batch.call("prctl", prctl.CAPBSET_DROP, cap, 0, 0, 0)
    missing = (wanted.cap_permitted | wanted.cap_bounding) & ~(current.cap_permitted | current.cap_bounding)
    permitted = wanted.cap_permitted & current.cap_permitted
    effective = wanted.cap_effective & permitted
    inheritable = wanted.cap_inheritable & (current.cap_bounding | current.cap_inheritable)
    ambient = wanted.cap_ambient & permitted & inheritable
    if missing:
        warnings.append(f"capabilities {missing:#x} cannot be given back: snap itself lacks them")
    _capset(batch, current.cap_permitted, current.cap_permitted, inheritable)
    if ambient or current.cap_ambient:
        batch.call("prctl", prctl.CAP_AMBIENT, prctl.CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
        for cap in range(64):
            if ambient & (1 << cap):
                batch.call("prctl", prctl.CAP_AMBIENT, prctl.CAP_AMBIENT_RAISE, cap, 0, 0)
    batch.call("prctl", prctl.SET_SECUREBITS, wanted.securebits, 0, 0, 0)
    _capset(batch, effective, permitted, inheritable)
    if wanted.no_new_privs and not current.no_new_privs:
        batch.call("prctl", prctl.SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    return warnings


def _capset(batch: Batch, effective: int, permitted: int, inheritable: int) -> None:
    low = [value & 0xFFFFFFFF for value in (effective, permitted, inheritable)]
    high = [value >> 32 for value in (effective, permitted, inheritable)]
    batch.call("capset", _HEADER, _SETS.pack(*low, *high))
