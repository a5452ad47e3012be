"""Interval timers and POSIX timers.

Dump: remaining times are read inside the frozen task, so all of a job's timers are read at the instant of the
point. /proc/PID/timers tells ids, signals and clocks; the rest is timer_gettime's.

Restore: ids are part of the job's memory, so they must come back exactly: PR_TIMER_CREATE_RESTORE_IDS where the
kernel has it (6.15), else timers are made and deleted until the id comes up. Timers are armed last of all.

Not kept: the overrun count of a signal that is already pending, and the id that the next timer_create(2) gives. No
interface shows that id; after a rollback it is one above the highest id in use.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from checkpoint.kernel import features
from checkpoint.kernel.proc import TimerEntry
from checkpoint.resources import prctl
from images import task_pb2
from snapshotter.base.errors import Finding, UnsupportedError

if TYPE_CHECKING:
    from checkpoint.parasite import Batch, Buffer, RemoteTask, Results

_ITIMERVAL = struct.Struct("<qqqq")  # it_interval sec, usec; it_value sec, usec
_ITIMERSPEC = struct.Struct("<qqqq")  # the same with nanoseconds
_SIGEVENT = struct.Struct("<Qiii44x")  # sigev_value, sigev_signo, sigev_notify, sigev_notify_thread_id
_TIMER_ID = struct.Struct("<i")
_SIGEV_THREAD_ID = 4
_NOTIFY = {"signal": 0, "none": 1, "thread": 2}
_MAX_ID_SEARCH = 1 << 16
ITIMERS = (0, 1, 2)
SECOND_NS = 1_000_000_000


@dataclass(slots=True)
class Asked:
    """Buffers of one process's timers in a batch."""

    itimers: list[Buffer]
    posix: list[tuple[task_pb2.PosixTimer, Buffer]]


def describe(entries: Iterable[TimerEntry]) -> list[task_pb2.PosixTimer]:
    """What /proc/PID/timers tells; the times are still missing."""
    return [
        task_pb2.PosixTimer(
            id=entry.id,
            clock_id=entry.clock_id,
            signo=entry.signo,
            sigval=entry.sigval,
            notify=_NOTIFY.get(entry.notify, 0) | (_SIGEV_THREAD_ID if entry.notify_kind == "tid" else 0),
            notify_tid=entry.notify_id if entry.notify_kind == "tid" else 0,
        )
        for entry in entries
    ]


def look(pid: int, entries: Iterable[TimerEntry], tids: Collection[int], report: list[Finding]) -> None:
    """Adds a timer whose thread has ended: nobody could make it again."""
    for entry in entries:
        if entry.notify_kind == "tid" and entry.notify_id not in tids:
            what = f"is for thread {entry.notify_id}, which has ended"
            report.append(Finding(pid, f"POSIX timer {entry.id}", what, "let the program delete that timer"))


def ask(batch: Batch, timers: Sequence[task_pb2.PosixTimer]) -> Asked:
    """Add getitimer and timer_gettime calls."""
    itimers = []
    for which in ITIMERS:
        buffer = batch.buffer(_ITIMERVAL.size)
        batch.call("getitimer", which, buffer)
        itimers.append(buffer)
    posix = []
    for timer in timers:
        buffer = batch.buffer(_ITIMERSPEC.size)
        batch.call("timer_gettime", timer.id, buffer)
        posix.append((timer, buffer))
    return Asked(itimers, posix)


def answer(results: Results, asked: Asked, process: task_pb2.Process) -> None:
    """Fill itimers (those that run) and posix_timers (all)."""
    for which, buffer in zip(ITIMERS, asked.itimers, strict=True):
        i_sec, i_usec, v_sec, v_usec = _ITIMERVAL.unpack(results.bytes(buffer)[: _ITIMERVAL.size])
        if v_sec or v_usec or i_sec or i_usec:
            process.itimers.add(
                which=which, interval_us=i_sec * 1000000 + i_usec, value_us=v_sec * 1000000 + v_usec
            )
    for timer, buffer in asked.posix:
        i_sec, i_nsec, v_sec, v_nsec = _ITIMERSPEC.unpack(results.bytes(buffer)[: _ITIMERSPEC.size])
        timer.interval_ns = i_sec * SECOND_NS + i_nsec
        timer.value_ns = v_sec * SECOND_NS + v_nsec
        process.posix_timers.append(timer)


def check(process: task_pb2.Process) -> None:
    """Whether this kernel can give every timer its id. Touches nothing.

    Raises:
        UnsupportedError: it cannot count up to one of them.
    """
    highest = max((timer.id for timer in process.posix_timers), default=0)
    if highest >= _MAX_ID_SEARCH and not features.probe("timer_restore_ids").ok:
        raise _too_high(process.pid, highest)


def _too_high(pid: int, timer_id: int) -> UnsupportedError:
    return UnsupportedError(
        f"POSIX timer id {timer_id} cannot be made on this kernel",
        where=f"task {pid}",
        hint="Linux 6.15 or later restores timer ids directly",
    )


def restore_create(stub: RemoteTask, timers: Sequence[task_pb2.PosixTimer]) -> None:
    """Make every POSIX timer with its id, not armed yet. All threads must exist (SIGEV_THREAD_ID)."""
    if not timers:
        return
    batch = stub.batch()
    restore_ids = batch.call("prctl", prctl.TIMER_CREATE_RESTORE_IDS, 1, 0, 0, 0, check=False)
    if stub.run(batch)[restore_ids] == 0:
        batch = stub.batch()
        # Ascending: the kernel counts on from the id that was restored last (posix_timer_add, Linux 6.15).
        for timer in sorted(timers, key=lambda timer: timer.id):
            batch.call("timer_create", timer.clock_id, _sigevent(timer), _TIMER_ID.pack(timer.id))
        batch.call("prctl", prctl.TIMER_CREATE_RESTORE_IDS, 0, 0, 0, 0)
        stub.run(batch)
        return
    for timer in sorted(timers, key=lambda timer: timer.id):
        _create_by_search(stub, timer)


def _create_by_search(stub: RemoteTask, timer: task_pb2.PosixTimer) -> None:
    """Ids count up from 0 in each process: make and delete until the wanted one comes."""
    for _ in range(_MAX_ID_SEARCH):
        batch = stub.batch()
        out = batch.buffer(_TIMER_ID.size)
        batch.call("timer_create", timer.clock_id, _sigevent(timer), out)
        got = _TIMER_ID.unpack(stub.run(batch).bytes(out)[: _TIMER_ID.size])[0]
        if got == timer.id:
            return
        stub.call("timer_delete", got)
        if got > timer.id:
            break
    raise _too_high(stub.pid, timer.id)


def _sigevent(timer: task_pb2.PosixTimer) -> bytes:
    return _SIGEVENT.pack(timer.sigval, timer.signo, timer.notify, timer.notify_tid)


def restore_arm(batch: Batch, process: task_pb2.Process) -> None:
    """Start all timers with the time that remained at the point."""
    for timer in process.posix_timers:
        if timer.value_ns or timer.interval_ns:
            spec = _ITIMERSPEC.pack(*divmod(timer.interval_ns, SECOND_NS), *divmod(timer.value_ns, SECOND_NS))
            batch.call("timer_settime", timer.id, 0, spec, 0)
    for itimer in process.itimers:
        # Expired, its signal still pending: the kernel starts the next period when that is taken. Value 0 would
        # disarm it here, so the next period starts now.
        remaining_us = itimer.value_us or itimer.interval_us
        value = _ITIMERVAL.pack(*divmod(itimer.interval_us, 1000000), *divmod(remaining_us, 1000000))
        batch.call("setitimer", itimer.which, value, 0)
