"""A job that counts in a file, and a command line that must fail: what the tests of the command line share."""

from __future__ import annotations

import pathlib
import time

import pytest

from tests.jobs import SnapFailedError, snap, wait_until

COUNTER = """
import sys, time
n = 0
while True:
    n += 1
    with open(sys.argv[1] + "/count", "w") as f: f.write(str(n))
    time.sleep(0.01)
"""


def count(job) -> int:
    """The last number that was written; 0: none yet, or the job stands still between emptying the file and writing."""
    for _ in range(20):
        try:
            text = (job.directory / "count").read_text()
        except FileNotFoundError:
            return 0
        if text:
            return int(text)
        time.sleep(0.005)
    return 0


def goes_on(job) -> None:
    """The job runs, is not traced, and makes progress."""
    at = count(job)
    wait_until(lambda: count(job) > at + 2, "the job going on")
    status = pathlib.Path(f"/proc/{job.pid}/status").read_text()
    assert "TracerPid:\t0" in status


def fails(status: int, *args, store, **popen) -> dict:
    """Run snap, which must fail with `status` and a whole error object."""
    with pytest.raises(SnapFailedError) as caught:
        snap(*args, store=store, **popen)
    assert caught.value.status == status, caught.value
    error = caught.value.error
    assert error.get("message"), caught.value
    assert "Traceback" not in caught.value.stderr
    assert "internal error" not in error["message"]
    return error
