"""The line of a real crontab: Debian's cron daemon takes a real job every minute.

The daemon's period cannot be shortened, so this test takes two to three minutes; it runs with its own crontab in
/etc/cron.d and its own daemon, both removed afterwards.
"""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import time

import pytest

from tests.jobs import ROOT, is_running, reap, snap, wait_until

pytestmark = [pytest.mark.requires("root", "program:cron"), pytest.mark.slow]

MINUTES_S = 150


@pytest.fixture
def daemon():
    """A cron daemon of our own, unless the machine runs one."""
    pidfile = pathlib.Path("/var/run/crond.pid")
    if pidfile.exists() and pidfile.read_text().strip().isdigit() and is_running(int(pidfile.read_text())):
        yield None
        return
    process = subprocess.Popen(
        ["cron", "-f"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    yield process
    process.kill()
    process.wait()
    pidfile.unlink(missing_ok=True)


@pytest.fixture
def crontab():
    """crontab(COMMAND): run it every minute as root until the test ends."""
    path = pathlib.Path(f"/etc/cron.d/snap-test-{os.getpid()}")

    def install(command: str) -> None:
        assert "%" not in command
        path.write_text(f"SHELL=/bin/sh\n* * * * * root {command}\n")
        path.chmod(0o644)
        # cron compares whole seconds of this: a change in the second in which it started would never be seen.
        later = time.time() + 2
        os.utime(path.parent, (later, later))

    yield install
    path.unlink(missing_ok=True)


def test_a_job_every_minute(tmp_path, daemon, crontab, job):
    job.start([sys.executable, "-c", "import time\nwhile True: time.sleep(0.1)"])
    pidfile = tmp_path / "sim.pid"
    pidfile.write_text(f"{job.pid}\n")
    log = tmp_path / "log"
    script = tmp_path / "snap"
    script.write_text(
        f'#!/bin/sh\ncd / && PYTHONPATH={ROOT} exec {sys.executable} -m snapshotter.cli.main "$@"\n'
    )
    script.chmod(0o755)
    crontab(
        f"{script} take --job sim --pidfile {pidfile} --quiet --keep-last 5 --store {job.store} >>{log} 2>&1"
    )

    def points() -> list[dict]:
        return snap("list", "--job", "sim", store=job.store)["points"]

    # The log, which costs nothing to look at, says when it is worth asking.
    lines = lambda: log.read_text().split("\n") if log.exists() else []  # noqa: E731
    wait_until(lambda: len(lines()) > 2, "two lines by cron", MINUTES_S)
    wait_until(lambda: len(points()) >= 2, "two points by cron")
    first, second = points()[:2]
    assert (first["parent"], second["parent"]) == (None, first["id"])
    assert first["pid"] == job.pid
    assert is_running(job.pid)
    said = log.read_text().split("\n")
    assert said[0] == first["id"]
    os.kill(job.pid, 9)
    reap(job.pid)
    wait_until(lambda: "has ended" in log.read_text(), "cron says that the job has ended", MINUTES_S)
    assert len(points()) == len(log.read_text().split("\n")) - 2
    # What cron took brings the job back, and cron takes it again under the same name.
    snap("rollback", second["id"], store=job.store)
    assert is_running(job.pid)
