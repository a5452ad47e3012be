"""The keeper changes hands while snap is killed: the state file always names the one keeper that stays."""

from __future__ import annotations

import os
import pathlib
import signal

import pytest

from checkpoint.kernel import proc
from checkpoint.tracking import keeper
from checkpoint.tracking.write_protect import WriteProtectTracker
from snapshotter.base import faults
from tests.jobs import reap, wait_until

pytestmark = pytest.mark.requires("root", "wp_async")

POINTS = ["track.keeper", "track.described", "track.kept"]


@pytest.fixture
def target(tmp_path, monkeypatch):
    """A child that does nothing, to be tracked."""
    monkeypatch.setenv("SNAP_RUNTIME_DIR", str(tmp_path / "run"))
    child = os.fork()
    if child == 0:
        while True:
            signal.pause()
    yield child
    os.kill(child, signal.SIGKILL)
    reap(child)
    wait_until(lambda: not keepers(child), "the keepers leave with the job")


def keepers(pid):
    """The pids of all that keep something of this job."""
    wanted = bytes(keeper.state_path(pid))
    found = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            words = pathlib.Path(f"/proc/{entry}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if (
            words[0] == b"snap: keeper of job %d, ends with it" % pid
            and wanted in words
            and proc.read_stat(int(entry)).state != "Z"
        ):
            found.append(int(entry))
    return found


def track(pid, nonce, *, anew=False):
    """One take's worth of tracking: what the collect told, and the nonce."""
    tasks = {pid: proc.read_stat(pid).start_time_ticks}
    vmas = [(entry.start, entry.end) for entry in proc.read_maps(pid) if entry.path == "[heap]"]
    with WriteProtectTracker().session(pid, tasks, nonce) as session:
        told = session.collect(pid, vmas)
        assert session.tracks(pid)
        if anew:
            session._changed = True  # as after an exec in the job: another keeper is needed
        session.confirm()
        return told, session.nonce


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("first", [True, False])
def test_killed_while_it_changes_hands(target, point, first):
    nonce = "" if first else track(target, "")[1]
    for _ in range(3):
        child = os.fork()
        if child == 0:
            try:
                faults.configure(f"{point}:kill")
                track(target, nonce, anew=True)
            finally:
                os._exit(0)
        assert reap(child) == signal.SIGKILL
        named = keeper.find(target, proc.read_stat(target).start_time_ticks, WriteProtectTracker.name)
        if named is not None:
            named.close()
        wait_until(lambda: len(keepers(target)) <= 1, "there is one keeper at most")
        nonce = track(target, "")[1]
        assert track(target, nonce)[0] is not None, "tracking goes on"
        assert len(keepers(target)) == 1
        left = [path.name for path in keeper.state_dir().iterdir()]
        assert left == [f"{target}.json"]


def test_the_one_before_is_ended(target):
    nonce = track(target, "")[1]
    (old,) = keepers(target)
    told, nonce = track(target, nonce, anew=True)
    assert told is not None
    wait_until(lambda: old not in keepers(target), "the old keeper is gone")
    assert len(keepers(target)) == 1
    assert track(target, nonce)[0] is not None
