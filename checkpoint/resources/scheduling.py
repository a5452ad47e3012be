"""Scheduling of a thread: policy, nice, priorities, affinity, timer slack, I/O priority, time slice, utilization clamps; and the
niceness of its session (autogroup).

Dumped from outside; restored by the thread itself (while it is still root), except affinity, which snap sets from
outside so that a mask with CPUs that are gone becomes a warning. The kernel does not say whether a slice or a clamp was asked for:
one that differs from its default was. Sources: sched(7), sched_setattr(2), Documentation/scheduler/sched-util-clamp.rst.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import re
import struct
import threading
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from checkpoint.kernel import sys as ksys
from checkpoint.resources import prctl
from images import task_pb2
from snapshotter.base.errors import wrap_os_error

if TYPE_CHECKING:
    from checkpoint.kernel.threads import ThreadFacts
    from checkpoint.parasite import Batch, StubTask

_ATTR = struct.Struct("<IIQiIQQQII")  # sched_attr: size .. sched_period, sched_util_min, sched_util_max
_NR_IOPRIO_GET = 252
_IOPRIO_WHO_PROCESS = 1
_POLICY_OTHER, _POLICY_FIFO, _POLICY_RR, _POLICY_BATCH, _POLICY_DEADLINE = 0, 1, 2, 3, 6
_RESET_ON_FORK = 1
_KEEP_POLICY, _KEEP_PARAMS, _CLAMP_MIN, _CLAMP_MAX = 0x08, 0x10, 0x20, 0x40
_CLAMP_NONE = 0xFFFFFFFF
"""Takes a clamp away (Linux 5.11)."""
_CLAMP_MOST = 1024
_AUTOGROUP = re.compile(rb"nice (-?\d+)")
_libc = ctypes.CDLL(None, use_errno=True)


def dump(facts: ThreadFacts) -> task_pb2.Scheduling:
    """Everything but the timer slack, which only the thread itself can read."""
    _, policy, flags, nice, priority, runtime, deadline, period, low, high = _ATTR.unpack(facts.scheduling)
    util_min, util_max = _clamps(policy, low, high)
    return task_pb2.Scheduling(
        policy=policy,
        nice=nice,
        rt_priority=priority,
        flags=flags,
        dl_runtime_ns=runtime,
        dl_deadline_ns=deadline,
        dl_period_ns=period,
        affinity=facts.affinity.rstrip(b"\0") or b"\0",
        io_priority=facts.raw.io_priority,
        util_min=util_min,
        util_max=util_max,
        slice_ns=runtime if policy in {_POLICY_OTHER, _POLICY_BATCH} and runtime != default_slice_ns() else 0,
    )


def _clamps(policy: int, low: int, high: int) -> tuple[int, int]:
    """What was asked for, as in the image. Without clamps in the kernel (CONFIG_UCLAMP_TASK) both are 0, else the upper one never is by itself."""
    if not low and not high:
        return 0, 0
    least = _realtime_least() if policy in {_POLICY_FIFO, _POLICY_RR} else 0
    return (0 if low == least else low + 1), (0 if high == _CLAMP_MOST else high + 1)


def _realtime_least() -> int:
    try:
        with open("/proc/sys/kernel/sched_util_clamp_min_rt_default", encoding="ascii") as file:
            return int(file.read())
    except OSError:
        return _CLAMP_MOST


@functools.cache
def default_slice_ns() -> int:
    """The time slice of who has not asked for one; 0 where the kernel knows none of a thread's own (before Linux 6.12)."""
    found = [0]

    def ask() -> None:
        # Ours may have another one; this thread ends at once.
        attr = ctypes.create_string_buffer(_ATTR.size)
        try:
            nice = os.getpriority(os.PRIO_PROCESS, 0)
            plain = _ATTR.pack(_ATTR.size, _POLICY_OTHER, 0, nice, 0, 0, 0, 0, 0, 0)
            ksys.syscall("sched_setattr", 0, plain, 0)
            ksys.syscall("sched_getattr", 0, attr, _ATTR.size, 0)
        except OSError:
            return
        found[0] = _ATTR.unpack(attr.raw)[5]

    asking = threading.Thread(target=ask)
    asking.start()
    asking.join()
    return found[0]


def restore(batch: Batch, wanted: task_pb2.Scheduling) -> None:
    """Policy, nice, slack, I/O priority of the calling thread."""
    deadline = wanted.policy == _POLICY_DEADLINE
    attr = _ATTR.pack(
        _ATTR.size,
        wanted.policy,
        wanted.flags if deadline else wanted.flags & _RESET_ON_FORK,
        wanted.nice,
        wanted.rt_priority,
        wanted.dl_runtime_ns if deadline else wanted.slice_ns,
        wanted.dl_deadline_ns if deadline else 0,
        wanted.dl_period_ns if deadline else 0,
        0,
        0,
    )
    batch.call("sched_setattr", 0, attr, 0)
    if wanted.timer_slack_ns and wanted.policy not in {_POLICY_FIFO, _POLICY_RR, _POLICY_DEADLINE}:
        batch.call("prctl", prctl.SET_TIMERSLACK, wanted.timer_slack_ns, 0, 0, 0)
    # A task that never set one shows the kernel's default, as snap does: setting it would tie it down.
    if wanted.io_priority != max(_libc.syscall(_NR_IOPRIO_GET, _IOPRIO_WHO_PROCESS, 0), 0):
        batch.call("ioprio_set", _IOPRIO_WHO_PROCESS, 0, wanted.io_priority)


def check(processes: Iterable[task_pb2.Process]) -> None:
    """Whether snap may give the job's threads their policy and priority: tried, each kind once, by threads of snap's that end at once.

    Not deadlines: the old job may have the bandwidth that is to be given back.

    Raises PermissionDeniedError, SnapshotterError.
    """
    kinds = {
        (one.policy, one.nice, one.rt_priority): thread.tid
        for process in processes
        for thread in process.threads
        if (one := thread.scheduling).policy != _POLICY_DEADLINE
    }
    failed: list[tuple[int, OSError]] = []

    def attempt(tid: int, attr: bytes) -> None:
        try:
            ksys.syscall("sched_setattr", 0, attr, 0)
        except OSError as error:
            failed.append((tid, error))

    for (policy, nice, priority), tid in kinds.items():
        if policy == _POLICY_OTHER and nice >= os.getpriority(os.PRIO_PROCESS, 0):
            continue
        attr = _ATTR.pack(_ATTR.size, policy, 0, nice, priority, 0, 0, 0, 0, 0)
        trying = threading.Thread(target=attempt, args=(tid, attr))
        trying.start()
        trying.join()
    for tid, error in failed:
        raise wrap_os_error(
            error,
            "its scheduling policy or priority cannot be given back",
            where=f"task {tid}",
            hint="run as root with CAP_SYS_NICE; nothing was touched",
        ) from error


def restore_affinity(tid: int, wanted: task_pb2.Scheduling) -> str:
    """Set from outside; returns a warning or ""."""
    cpus = int.from_bytes(wanted.affinity, "little")
    mask = {cpu for cpu in range(cpus.bit_length()) if cpus >> cpu & 1}
    if not mask or mask == os.sched_getaffinity(tid):
        return ""
    try:
        os.sched_setaffinity(tid, mask)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise wrap_os_error(error, "cannot set the CPU affinity", where=f"task {tid}") from error
        return f"task {tid}: none of its CPUs {sorted(mask)} is here; it may run on any"
    if os.sched_getaffinity(tid) != mask:
        return f"task {tid}: some of its CPUs {sorted(mask)} are not here"
    return ""


def restore_clamps(stub: StubTask, thread: task_pb2.Thread, warn: Callable[[str], None]) -> None:
    """Utilization clamps, by the thread itself. What it has from snap goes away, too. And whether this kernel took its slice."""
    wanted = thread.scheduling
    if wanted.slice_ns and not default_slice_ns():
        warn(
            f"task {thread.tid}: its time slice of {wanted.slice_ns} ns is not set: this kernel has none for a thread"
        )
    if not wanted.util_min and not wanted.util_max and own_clamps() == (0, 0):
        return  # the first clamp of all makes every switch of tasks a little slower
    low, high = (value - 1 if value else _CLAMP_NONE for value in (wanted.util_min, wanted.util_max))
    flags = _KEEP_POLICY | _KEEP_PARAMS | _CLAMP_MIN | _CLAMP_MAX
    attr = _ATTR.pack(_ATTR.size, 0, flags, 0, 0, 0, 0, 0, low, high)
    batch = stub.batch()
    result = batch.call("sched_setattr", 0, attr, 0, check=False)
    error = -min(stub.run(batch)[result], 0)
    if error and (wanted.util_min or wanted.util_max):
        text = (
            "this kernel has none (CONFIG_UCLAMP_TASK)" if error == errno.EOPNOTSUPP else os.strerror(error)
        )
        warn(f"task {thread.tid}: its utilization clamps could not be set again: {text}")


@functools.cache
def own_clamps() -> tuple[int, int]:
    """Those of this thread of ours, which the stubs have inherited; as in the image."""
    attr = ctypes.create_string_buffer(_ATTR.size)
    ksys.syscall("sched_getattr", 0, attr, _ATTR.size, 0)
    fields = _ATTR.unpack(attr.raw)
    return _clamps(fields[1], fields[8], fields[9])


def autogroup_nice(pid: int) -> int:
    """The niceness of the session's group of a process; 0 too where the kernel has no such groups."""
    try:
        with open(f"/proc/{pid}/autogroup", "rb", buffering=0) as file:
            found = _AUTOGROUP.search(file.read(256))
    except OSError:
        return 0
    return int(found[1]) if found else 0


def restore_autogroup(pid: int, nice: int) -> str:
    """Set from outside; returns a warning or ""."""
    if nice == autogroup_nice(pid):
        return ""
    try:
        with open(f"/proc/{pid}/autogroup", "w", encoding="ascii") as file:
            file.write(str(nice))
    except OSError as error:
        return f"task {pid}: niceness {nice} of its session (autogroup) is not set: {error.strerror}"
    return ""
