"""Scheduling of a thread: policy, nice, priorities, affinity, timer slack, I/O priority.

Dumped from outside; restored by the thread itself (while it is still root), except affinity, which snap sets from
outside so that a mask with CPUs that are gone becomes a warning.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from typing import TYPE_CHECKING

from checkpoint.resources import prctl
from images import task_pb2
from snapshotter.base.errors import wrap_os_error

if TYPE_CHECKING:
    from checkpoint.kernel.threads import ThreadFacts
    from checkpoint.parasite import Batch

_ATTR = struct.Struct("<IIQiIQQQ")  # sched_attr, first version: size .. sched_period
_NR_IOPRIO_GET = 252
_IOPRIO_WHO_PROCESS = 1
_POLICY_FIFO, _POLICY_RR, _POLICY_DEADLINE = 1, 2, 6
_RESET_ON_FORK = 1
_libc = ctypes.CDLL(None, use_errno=True)


def dump(facts: ThreadFacts) -> task_pb2.Scheduling:
    """Everything but the timer slack, which only the thread itself can read."""
    _, policy, flags, nice, priority, runtime, deadline, period = _ATTR.unpack(facts.scheduling)
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
    )


def restore(batch: Batch, wanted: task_pb2.Scheduling) -> None:
    """Policy, nice, slack, I/O priority of the calling thread."""
    deadline = wanted.policy == _POLICY_DEADLINE
    attr = _ATTR.pack(
        _ATTR.size,
        wanted.policy,
        wanted.flags if deadline else wanted.flags & _RESET_ON_FORK,
        wanted.nice,
        wanted.rt_priority,
        wanted.dl_runtime_ns if deadline else 0,
        wanted.dl_deadline_ns if deadline else 0,
        wanted.dl_period_ns if deadline else 0,
    )
    batch.call("sched_setattr", 0, attr, 0)
    if wanted.timer_slack_ns and wanted.policy not in {_POLICY_FIFO, _POLICY_RR, _POLICY_DEADLINE}:
        batch.call("prctl", prctl.SET_TIMERSLACK, wanted.timer_slack_ns, 0, 0, 0)
    # A task that never set one shows the kernel's default, as snap does: setting it would tie it down.
    if wanted.io_priority != max(_libc.syscall(_NR_IOPRIO_GET, _IOPRIO_WHO_PROCESS, 0), 0):
        batch.call("ioprio_set", _IOPRIO_WHO_PROCESS, 0, wanted.io_priority)


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
