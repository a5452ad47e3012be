"""timerfd(2): clock, what remains, interval, expirations not read yet.

A timer goes on with the time that remained at the dump; only an absolute one on the wall clock
(TFD_TIMER_ABSTIME on CLOCK_REALTIME) keeps its date, and fires at once when that has passed.
Expirations that were not read are put back with TFD_IOC_SET_TICKS. Of a periodic timer the kernel counts only the first of
them; the others are added at the next read or timerfd_gettime(2), which also starts the next period. So the dump calls
timerfd_gettime on a duplicate first. The job cannot see that: its next read gives the same number.
A disarmed timer keeps its interval. The flags of timerfd_settime(2) come back as they were, TFD_TIMER_CANCEL_ON_SET among them.
"""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from checkpoint.kernel import descriptors
from checkpoint.kernel.fdinfo import TimerState, parse_fdinfo
from checkpoint.resources.files import kind
from snapshotter.base.errors import Finding, wrap_os_error

if TYPE_CHECKING:
    from checkpoint.resources.files.dumping import FilesDump
    from checkpoint.resources.files.kind import Seen
    from checkpoint.resources.files.opening import Opening
    from images import files_pb2

_WALL_CLOCKS = frozenset({0, 8})
"""CLOCK_REALTIME, CLOCK_REALTIME_ALARM."""
_PLAIN_CLOCKS = {9: time.CLOCK_BOOTTIME}
"""CLOCK_BOOTTIME_ALARM is read as the clock that it is without waking the machine."""

_TRIES = 3
"""A timer may expire once more between two calls, and shows no remaining time until it is counted."""


class TimerfdKind(kind.Kind):
    field = "timerfd"

    def claims(self, seen: Seen) -> bool:
        return seen.anonymous(b"timerfd")

    def refusal(self, seen: Seen) -> Finding | None:
        if seen.info.timer is None:
            return Finding(seen.pid, seen.where, "the kernel does not show this timer's state")
        return None

    def dump(self, job: FilesDump, seen: Seen, description: files_pb2.Description) -> None:
        state = seen.info.timer
        assert state is not None  # refused otherwise
        if state.ticks and state.interval_ns:
            state = _counted(job, seen)
        timer = description.timerfd
        timer.clock_id = state.clock_id
        timer.ticks = state.ticks
        timer.settime_flags = state.settime_flags
        timer.value_ns = state.value_ns
        timer.interval_ns = state.interval_ns
        if state.clock_id in _WALL_CLOCKS and state.settime_flags & descriptors.TFD_TIMER_ABSTIME:
            timer.expires_ns = (
                time.clock_gettime_ns(time.CLOCK_REALTIME) + timer.value_ns if timer.value_ns else 0
            )

    def check(self, opening: Opening, description: files_pb2.Description) -> None:
        """A clock that wakes the machine takes CAP_WAKE_ALARM, setting unread ticks a kernel option: making one tells."""
        os.close(self.open(opening, description))

    def open(self, opening: Opening, description: files_pb2.Description) -> int:
        timer = description.timerfd
        try:
            fd = descriptors.timerfd_create(timer.clock_id, os.O_CLOEXEC | os.O_NONBLOCK)
            if timer.expires_ns:
                descriptors.timerfd_settime(fd, timer.settime_flags, timer.expires_ns, timer.interval_ns)
            elif timer.value_ns or timer.interval_ns:
                flags, value_ns = timer.settime_flags, timer.value_ns
                if value_ns and flags & descriptors.TFD_TIMER_ABSTIME:
                    value_ns += time.clock_gettime_ns(_PLAIN_CLOCKS.get(timer.clock_id, timer.clock_id))
                descriptors.timerfd_settime(fd, flags, value_ns, timer.interval_ns)
            if timer.ticks:
                descriptors.timerfd_set_ticks(fd, timer.ticks)
        except OSError as error:
            raise wrap_os_error(
                error, f"cannot make a timer on clock {timer.clock_id} again", where="timerfd"
            ) from error
        return fd


def _counted(job: FilesDump, seen: Seen) -> TimerState:
    """The state of a periodic timer that has expired, all of its expirations counted."""
    state: TimerState | None = None
    with job.borrow(seen) as fd:
        for _ in range(_TRIES):
            descriptors.timerfd_gettime(fd)
            state = parse_fdinfo(Path(f"/proc/self/fdinfo/{fd}").read_bytes()).timer
            assert state is not None
            if state.value_ns:
                return state
    assert state is not None
    # It expires between any two calls. Without a value it would come back disarmed.
    return dataclasses.replace(state, value_ns=state.interval_ns)


KIND = TimerfdKind()
