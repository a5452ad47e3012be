"""Timeouts that begin anew when their call is restarted: a job that is frozen more often than that times out all the same, never early."""

from __future__ import annotations

import contextlib
import os
import pathlib
import selectors
import signal
import struct
import subprocess
from collections.abc import Iterator

import pytest

from checkpoint.freeze import FrozenTree
from checkpoint.kernel import timeouts
from checkpoint.kernel.ptrace import NOT_IN_SYSCALL, Regs
from checkpoint.kernel.syscalls import NUMBERS
from tests.jobs import wait_until

PROGRAM = "../kernel/programs/timeouts.c"
CALLS = {
    "epoll_wait", "epoll_pwait2", "sigtimedwait", "semtimedop", "io_getevents", "select", "pselect6", "ppoll", "recv", "send",
    "accept", "connect", "connect_unix", "again", "event",
}  # fmt: skip
LENGTH_MS, PAUSE_S = 2000, 0.1
MOST_FREEZES = 2 * LENGTH_MS // 100 + 20
"""Two waits one after the other at most, each with a freeze at least every PAUSE_S."""

needs_root = pytest.mark.requires("root")


class Waiting:
    """The program, and what it has said."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process, self.pid = process, process.pid
        self.said: list[str] = []
        self._rest = b""
        self._selector = selectors.DefaultSelector()
        self._selector.register(process.stdout, selectors.EVENT_READ)

    def hear(self, seconds: float) -> bool:
        """Whether it has said something within that time."""
        if not self._selector.select(seconds):
            return False
        *lines, self._rest = (self._rest + os.read(self.process.stdout.fileno(), 4096)).split(b"\n")
        self.said += [line.decode() for line in lines]
        return True

    def freeze(self) -> dict[int, int]:
        """Freeze it once; what was left of each thread's wait, in milliseconds."""
        with FrozenTree(self.pid) as tree:
            return {task.tid: task.wait_left_ms for task in tree.tasks() if task.wait_left_ms}


@pytest.fixture
def start(compile_program):
    with contextlib.ExitStack() as stack:

        def started(*arguments: str) -> Waiting:
            process = subprocess.Popen(
                [compile_program(PROGRAM), *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
            )  # fmt: skip
            stack.callback(process.communicate)
            stack.callback(process.kill)
            return Waiting(process)

        yield started


def frozen_until_over(job: Waiting) -> Iterator[int]:
    """Freeze it again and again; yields how often so far."""
    for number in range(1, MOST_FREEZES + 1):
        job.freeze()
        yield number
        job.hear(PAUSE_S)
        if "over" in job.said:
            return
    raise AssertionError(f"after {MOST_FREEZES} freezes it still waits: {job.said}")


@needs_root
def test_every_wait_ends_in_time(start):
    job = start(str(LENGTH_MS))
    wait_until(lambda: job.hear(0.1) and "waits" in job.said, "it waits")
    for number in frozen_until_over(job):
        if number == 4:
            job.process.send_signal(signal.SIGUSR1)
            job.process.stdin.write(b"x")
            job.process.stdin.flush()
    ends = [line for line in job.said if ":" in line]
    assert sorted(ends) == sorted(f"{name}: right" for name in CALLS)


@needs_root
def test_what_is_left_outlives_a_rollback(compile_program, job):
    job.start([compile_program(PROGRAM), "600000", "epoll_wait"])
    log = job.directory / "stdout"
    wait_until(lambda: "begins" in log.read_text() and in_epoll_wait(job.pid), "it waits")
    (before,) = left(job.pid)
    job.take("--kill")
    job.rollback()
    wait_until(lambda: in_epoll_wait(job.pid), "it waits again")
    (after,) = left(job.pid)
    assert 0 < after < before <= 600_000
    wait_until(lambda: in_epoll_wait(job.pid), "it is back in its wait")
    (again,) = left(job.pid)
    assert 0 < again <= after


def left(pid: int) -> list[int]:
    with FrozenTree(pid) as tree:
        return [task.wait_left_ms for task in tree.tasks()]


def in_epoll_wait(pid: int) -> bool:
    return pathlib.Path(f"/proc/{pid}/syscall").read_text().startswith(f"{NUMBERS['epoll_wait']} ")


# -- the deadline in the registers, without a job ------------------------------------------------------------------


def waiting(length_ms: int = 1000) -> Regs:
    regs = Regs()
    regs.orig_rax, regs.rax, regs.r10 = NUMBERS["epoll_wait"], 2**64 - 514, length_ms
    return regs


def test_the_first_stop_sets_the_deadline_and_later_ones_keep_it():
    regs, timeout = waiting(), timeouts.Timeout(1000, 0)
    assert timeouts.keep(regs, timeout, now_ms=5_000) == 1000
    assert regs.call == NUMBERS["epoll_wait"]
    assert regs.wants_restart
    assert timeouts.keep(regs, timeout, now_ms=5_700) == 300


def test_a_wait_that_is_over_returns():
    regs, timeout = waiting(), timeouts.Timeout(1000, -11)
    timeouts.keep(regs, timeout, now_ms=5_000)
    assert timeouts.keep(regs, timeout, now_ms=6_000) == 0
    assert regs.orig_rax == NOT_IN_SYSCALL
    assert struct.unpack("<q", struct.pack("<Q", regs.rax)) == (-11,)


@pytest.mark.parametrize("now_ms", [2**31 - 500, 2**31 - 1000, 7 * 2**31 - 1, 2**31])
def test_across_the_end_of_the_numbers(now_ms):
    regs, timeout = waiting(), timeouts.Timeout(1000, 0)
    timeouts.keep(regs, timeout, now_ms)
    assert abs(timeouts.keep(regs, timeout, now_ms + 600) - 400) <= 1


def test_what_a_program_leaves_there_is_no_deadline():
    regs = waiting()
    regs.orig_rax |= 77 << 32
    assert timeouts.keep(regs, timeouts.Timeout(1000, 0), now_ms=500_000) == 1000


@pytest.mark.parametrize("length_ms", [2**30, 2**40])
def test_one_of_weeks_is_left_alone(length_ms):
    regs = waiting()
    assert timeouts.keep(regs, timeouts.Timeout(length_ms, 0), now_ms=5_000) == 0
    assert bytes(regs) == bytes(waiting())


@pytest.mark.parametrize("r10", [0, 0xFFFFFFFF, 2**64 - 1])
def test_no_timeout(r10):
    assert timeouts.timeout_of(waiting(r10), 0, None) is None
