"""Signals that wait: none is lost, none comes in between, and what was set before is set again."""

import os
import signal

import pytest

from checkpoint.uninterrupted import signals_wait, stops_wait


@pytest.mark.parametrize(
    ("waits", "signo"),
    [(signals_wait, signal.SIGINT), (signals_wait, signal.SIGTERM), (stops_wait, signal.SIGTSTP), (stops_wait, signal.SIGTTOU)],
)  # fmt: skip
def test_a_signal_arrives_at_the_end(waits, signo):
    came = []
    before = signal.signal(signo, lambda number, _: came.append(number))
    try:
        with waits():
            os.kill(os.getpid(), signo)
            assert came == []
        assert came == [signo]
        os.kill(os.getpid(), signo)
        assert came == [signo] * 2
    finally:
        signal.signal(signo, before)


def test_ctrl_z_stops_once_it_is_over():
    """In a child: stopped after the stretch and not within it."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        with stops_wait():
            os.kill(os.getpid(), signal.SIGTSTP)
            os.write(write_end, b"within ")
        os.write(write_end, b"after")
        os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end, "rb", buffering=0) as pipe:
        # A stopped process in an orphaned group would not stop: this one's parent is in another group of the session.
        assert os.WIFSTOPPED(os.waitpid(child, os.WUNTRACED)[1])
        assert pipe.read(100) == b"within "
        os.kill(child, signal.SIGCONT)
        assert os.waitpid(child, 0)[1] == 0
        assert pipe.read(100) == b"after"
