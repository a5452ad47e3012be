"""A remote call that does not come back: the wait ends, the others go on, and the lost one comes out by itself."""

import os
import signal
import struct
import threading
import time
import traceback

import pytest

from checkpoint.freeze import stopped_process
from checkpoint.parasite import LostTaskError, Parasite, visit
from checkpoint.parasite.infection import InfectedTask
from tests.jobs import reap, wait_until
from tests.kernel.test_parasite_kill import Job, program

__all__ = ["program"]

pytestmark = pytest.mark.requires("root", "rseq_configuration")

SLEEP_S = 2
"""Long against the limit, short enough to wait for."""


def sleep_in(batch):
    batch.call("nanosleep", struct.pack("<QQ", SLEEP_S, 0), 0)
    return batch


def in_a_child(work):
    """Run `work` in a process of its own, whose end lets go of all that it traces. Returns its pid and what reads its word."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        word = b"nothing"
        try:
            word = work(write)
        except BaseException:
            traceback.print_exc()
        finally:
            os.write(write, word)
            os._exit(0)
    os.close(write)
    return child, read


def word_of(work):
    """What `work` returned there, once that process has ended."""
    child, answer = in_a_child(work)
    word = os.read(answer, 100)
    assert reap(child) == 0
    os.close(answer)
    return word


def lose(pid, blocked=()):
    signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
    InfectedTask.limit_s = 0.1
    with Parasite(pid) as task:
        try:
            task.run(sleep_in(task.batch()))
        except LostTaskError as error:
            assert task.is_lost
            assert "nanosleep" in str(error), error
            return b"lost"
    return b"came back"


@pytest.mark.parametrize(
    ("mode", "blocked"),
    [
        *(
            pytest.param(mode, (), id=mode)
            for mode in ("spin", "sleep", "sigsuspend", "ppoll", "threads", "stopped")
        ),
        # The limit's signal, too: whoever started us may have blocked everything.
        pytest.param("spin", signal.valid_signals(), id="spin-all-blocked"),
    ],
)
def test_a_call_that_does_not_come_back_is_given_up(program, tmp_path, mode, blocked):
    job = Job(program, tmp_path, mode)
    try:
        job.before_injection()
        assert word_of(lambda _: lose(job.pid, blocked)) == b"lost"
        job.untouched("after its call came back")
    finally:
        job.end()


def test_the_other_threads_go_on_while_one_is_lost(program, tmp_path):
    job = Job(program, tmp_path, "threads")

    def lose_a_visitor(_):
        InfectedTask.limit_s = 0.1
        try:
            with stopped_process(job.pid) as process:
                visit(process.parasite, process.threads[1:], sleep_in(process.parasite.batch()))
        except LostTaskError:
            return b"lost"
        return b"came back"

    try:
        child, answer = in_a_child(lose_a_visitor)
        before = job.counts()
        wait_until(
            lambda: sum(now > then for then, now in zip(before, job.counts(), strict=True)) >= 2,
            "the others go on while snap still waits",
        )
        assert os.read(answer, 100) == b"lost"
        assert reap(child) == 0
        os.close(answer)
        job.untouched("after the visit")
    finally:
        job.end()


@pytest.mark.parametrize(("seconds", "expected"), [(2 * SLEEP_S, b"lost"), (0.4, b"waited")])
def test_ctrl_c_waits_for_a_call_but_not_for_long(program, tmp_path, seconds, expected):
    job = Job(program, tmp_path, "spin")

    def interrupted(_):
        signal.signal(signal.SIGINT, signal.default_int_handler)
        came = b"nothing came"
        with Parasite(job.pid) as task:
            threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
            batch = task.batch()
            batch.call("nanosleep", struct.pack("<QQ", int(seconds), int(seconds % 1 * 1e9)), 0)
            try:
                task.run(batch)
                time.sleep(5)
            except KeyboardInterrupt:
                came = b"lost" if task.is_lost else b"waited"
        return came

    try:
        assert word_of(interrupted) == expected
        job.untouched("after Ctrl-C")
    finally:
        job.end()
