"""snap killed at every fault point of a dump: what the next take then holds is exact, page by page.

That the job is unharmed is test_take_killed.py's.
"""

from __future__ import annotations

import json
import os
import signal

import pytest

from checkpoint.tracking import keeper
from images import codec
from snapshotter.base import faults
from tests.jobs import reap, state, wait_until
from tests.kernel.test_keeper import keepers
from tests.kernel.test_take_killed import FIRST_TAKE_ONLY, POINTS
from tests.kernel.test_trackers import differences, take

pytestmark = pytest.mark.requires("root")

NAMES = [name for name in POINTS if name.startswith(("dump.", "freeze.", "thaw.", "track.", "parasite."))]


def killed_take(pid, parent, name):
    """The wait status of a take that was told to die at a fault point."""
    child = os.fork()
    if child == 0:
        try:
            faults.configure(f"{name}:kill")
            take(pid, parent)
        finally:
            os._exit(0)
    return reap(child)


def unnamed_keepers(pid):
    """Those that the state file does not name: they have not taken over yet, or not ended."""
    named = [json.loads(path.read_bytes())["keeper"] for path in keeper.state_dir().glob("*.json")]
    return set(keepers(pid)) - set(named)


def test_the_next_take_is_exact(job, compile_program, tmp_path, monkeypatch):
    monkeypatch.setenv("SNAP_RUNTIME_DIR", str(tmp_path / "run"))
    job.start([compile_program("mem_churn.c")]).wait_ready()
    parent = None
    for name in NAMES:
        if parent is not None and name in FIRST_TAKE_ONLY:
            continue
        assert killed_take(job.pid, parent, name) == signal.SIGKILL, name
        after = take(job.pid, parent, after="stop")
        assert differences(after) == [], name
        for pid in codec.parse("manifest", after.images["manifest"]).pids:
            os.kill(pid, signal.SIGCONT)
        wait_until(lambda: state(job.pid) in {"S", "R"}, f"the job goes on after {name}")
        parent = after


@pytest.mark.requires("wp_async")
@pytest.mark.parametrize("name", sorted(FIRST_TAKE_ONLY))
def test_the_take_after_a_first_one_is_exact(name, job, compile_program, tmp_path, monkeypatch):
    monkeypatch.setenv("SNAP_RUNTIME_DIR", str(tmp_path / "run"))
    job.start([compile_program("nothing.c")]).wait_ready()
    assert killed_take(job.pid, None, name) == signal.SIGKILL
    # Until then the job's memory is registered with what it holds, and a take reads in full.
    wait_until(lambda: not unnamed_keepers(job.pid), "no keeper but the one that stays")
    parent = take(job.pid, None)
    after = take(job.pid, parent, after="stop")
    assert differences(after) == []
    assert after.pages_put < parent.pages_put, "tracking goes on"


@pytest.mark.requires("wp_async")
def test_a_stopped_job_is_taken_though_a_userfaultfd_was_left_in_it(
    job, compile_program, tmp_path, monkeypatch
):
    """It would be closed when the job goes on, which may be never."""
    monkeypatch.setenv("SNAP_RUNTIME_DIR", str(tmp_path / "run"))
    job.start([compile_program("nothing.c")]).wait_ready()
    os.kill(job.pid, signal.SIGSTOP)
    wait_until(lambda: state(job.pid) == "T", "stopped")
    before = sorted(os.listdir(f"/proc/{job.pid}/fd"))
    assert killed_take(job.pid, None, "track.created") == signal.SIGKILL
    wait_until(lambda: state(job.pid) == "T", "stopped again")
    assert len(os.listdir(f"/proc/{job.pid}/fd")) == len(before) + 1
    take(job.pid, None)
    assert sorted(os.listdir(f"/proc/{job.pid}/fd")) == before
    wait_until(lambda: state(job.pid) == "T", "stopped after the take")
    os.kill(job.pid, signal.SIGCONT)
    assert job.finish() == "PASS"
