"""Stopped tasks: a take, a rollback, and a snap that is killed leave them stopped, and their parents told what they were told."""

from __future__ import annotations

import contextlib
import os
import pathlib
import signal

import pytest

from tests.jobs import reap, state, tree, wait_until

pytestmark = pytest.mark.requires("root", "clone3_set_tid")

PROGRAM = str(pathlib.Path(__file__).parent / "programs" / "stop_reports.c")


@pytest.fixture
def stopped(job, compile_program):
    return job.start([compile_program(PROGRAM)]).wait_ready()


def test_the_program_itself(stopped):
    assert stopped.finish() == "PASS"


def test_taken_and_left_running(stopped):
    for _ in range(3):
        stopped.take()
    assert stopped.finish() == "PASS"


def test_killed_and_rolled_back(stopped):
    stopped.take("--kill")
    stopped.rollback()
    assert stopped.finish() == "PASS"


def test_rolled_back_twice(stopped):
    stopped.take()
    stopped.rollback()
    stopped.take("--kill")
    stopped.rollback()
    assert stopped.finish() == "PASS"


def test_stopped_by_the_terminal_and_rolled_back_outside_of_its_shell(job, compile_program):
    """Its group is an orphaned one then, in which SIGTSTP stops nobody; and yet the job must not run."""
    program = compile_program("threads.c")
    job.directory.mkdir(parents=True)
    shell = os.fork()
    if shell == 0:
        try:
            os.setsid()
            for fd in range(3):
                os.dup2(os.open("/dev/null", os.O_RDWR), fd)
            os.closerange(3, 256)
            if os.fork() == 0:
                os.setpgid(0, 0)
                os.chdir(job.directory)
                os.execv(program, [program, job.directory])
            signal.pause()
        finally:
            os._exit(1)
    try:
        wait_until((job.directory / "ready").exists, "ready")
        job.pid = tree(shell)[1]
        os.kill(job.pid, signal.SIGTSTP)
        wait_until(lambda: state(job.pid) == "T", "stopped")
        job.take()
        assert state(job.pid) == "T"
        os.kill(job.pid, signal.SIGKILL)
        os.kill(shell, signal.SIGKILL)
        reap(shell)
        job.wait_gone()
        job.rollback()
        assert state(job.pid) == "T"
        os.kill(job.pid, signal.SIGCONT)
        assert job.finish() == "PASS"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(shell, signal.SIGKILL)
        reap(shell)
