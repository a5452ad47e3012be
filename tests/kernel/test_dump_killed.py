"""snap killed at every fault point of a dump: the job goes on unharmed, the next take is exact."""

from __future__ import annotations

import os
import pathlib
import signal

import pytest

from images import codec
from snapshotter.base import faults
from tests.jobs import reap, state, wait_until
from tests.kernel.test_trackers import differences, take

pytestmark = pytest.mark.requires("root")

NAMES = [
    name for name in faults.POINTS if name.startswith(("dump.", "freeze.", "thaw.", "track.", "parasite."))
]


def alive(pid: int) -> bool:
    tracer = pathlib.Path(f"/proc/{pid}/status").read_text().split("TracerPid:")[1].split()[0]
    return tracer == "0" and state(pid) in {"S", "R"}


def test_killed_at_every_point(job, compile_program, tmp_path, monkeypatch):
    monkeypatch.setenv("SNAP_RUNTIME_DIR", str(tmp_path / "run"))
    job.start([compile_program("mem_churn.c")]).wait_ready()
    parent = take(job.pid, None)
    for name in NAMES:
        child = os.fork()
        if child == 0:
            try:
                faults.configure(f"{name}:kill")
                take(job.pid, parent)
            finally:
                os._exit(0)
        status = reap(child)
        assert status is not None
        wait_until(lambda: alive(job.pid), f"the job goes on after a kill at {name}")
    assert state(job.pid) in {"S", "R"}
    after = take(job.pid, parent, after="stop")
    assert differences(after) == []
    for pid in codec.parse("manifest", after.images["manifest"]).pids:
        os.kill(pid, signal.SIGCONT)
