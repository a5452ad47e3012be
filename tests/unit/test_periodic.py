"""Takes by pid file, for cron: whom the file means, what is skipped, what is doubt."""

from __future__ import annotations

import dataclasses
import errno
import os

import pytest

from snapshotter.base.errors import (
    SnapshotterError,
    TargetGoneError,
    UsageError,
)
from snapshotter.manager import ended, pidfile
from snapshotter.manager.ports import Skipped
from snapshotter.manager.rollback import rollback
from snapshotter.manager.take import StrangerError, take, take_periodic


def periodic(session, path):
    return take_periodic(session, path, job="a")


def test_periodic(session, engine, store, tmp_path):
    path = tmp_path / "pid"
    path.write_text("7\n")
    first = periodic(session, path)
    assert periodic(session, path).parent == first.id
    store.locked.add("a")
    assert periodic(session, path).reason == "busy"
    store.locked.clear()
    del engine.alive[7]
    done = periodic(session, path)
    assert isinstance(done, Skipped)
    assert done.reason == "ended"
    path.unlink()
    assert periodic(session, path).reason == "ended"


def test_a_job_that_nobody_knows_has_not_ended(session, engine, store, tmp_path):
    """A mistyped --pidfile, or a job's name that is not the one of its points."""
    path = tmp_path / "pid"
    for exists in (True, False):
        store.exists = exists
        with pytest.raises(TargetGoneError, match="no point of a job 'a'"):
            periodic(session, path)
    path.write_text("8\n")
    with pytest.raises(TargetGoneError, match=r"process 8 .* is gone, and no point"):
        periodic(session, path)


def test_a_pid_file_that_is_missing_while_the_job_runs(session, engine, tmp_path):
    path = tmp_path / "pid"
    path.write_text("7\n")
    point = periodic(session, path)
    with pytest.raises(SnapshotterError, match="process 7 of job a runs") as caught:
        periodic(session, tmp_path / "pdi")
    assert caught.value.exit_status == 1
    rollback(session, point.id)  # known by its head now
    with pytest.raises(SnapshotterError, match="process 7 of job a runs"):
        periodic(session, tmp_path / "pdi")


def test_the_end_of_a_job_is_said_once(session, engine, tmp_path, monkeypatch):
    path = tmp_path / "pid"
    path.write_text("7\n")
    point = periodic(session, path)

    def end():
        del engine.alive[7]
        done = [periodic(session, path) for _ in range(3)]
        assert [one.reason for one in done] == ["ended"] * 3
        return [one.said_before for one in done]

    assert end() == [False, True, True]
    rollback(session, point.id)
    assert end() == [False, True, True], "it ran again, so this is another end"
    engine.alive[7] = 300
    os.utime(path)
    periodic(session, path)
    assert end() == [False, True, True]


def test_the_end_is_said_again_where_it_cannot_be_written_down(session, engine, tmp_path, monkeypatch):
    path = tmp_path / "pid"
    path.write_text("7\n")
    periodic(session, path)
    del engine.alive[7]

    def full(*_args):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(ended, "publish", full)
    assert [periodic(session, path).said_before for _ in range(2)] == [False, False]


def test_periodic_job_that_ends_during_the_take(session, engine, tmp_path):
    (tmp_path / "pid").write_text("7")
    periodic(session, tmp_path / "pid")

    def end():
        raise TargetGoneError("gone")

    engine.during_dump = end
    assert periodic(session, tmp_path / "pid").reason == "ended"


def write_pid(path, engine, pid, uptime_s):
    """A pid file, written when the machine had been up that long, by the clock as it is set now."""
    path.write_text(f"{pid}\n")
    os.utime(path, (engine.wall(uptime_s),) * 2)


def test_periodic_pid_of_a_stranger(session, engine, tmp_path, monkeypatch):
    monkeypatch.setattr("time.clock_gettime_ns", lambda _clock: engine.uptime_ns)
    path = tmp_path / "pid"
    engine.alive[7] = 500_00
    write_pid(path, engine, 7, 400)
    with pytest.raises(StrangerError):
        periodic(session, path)
    write_pid(path, engine, 7, 600)
    first = periodic(session, path)
    # What a point knows of a process needs no time stamp.
    write_pid(path, engine, 7, 400)
    assert periodic(session, path).parent == first.id
    # Rolled back: a new start time, younger than the pid file, and the job all the same.
    write_pid(path, engine, 7, 600)
    rollback(session, first.id)
    engine.started_s[7] = engine.uptime_ns / 1e9
    assert periodic(session, path).parent == first.id
    engine.alive[7] += 1
    assert periodic(session, path).reason == "ended"


def test_clock_set_forward_never_ends_a_restarted_job(session, engine, tmp_path):
    path = tmp_path / "pid"
    write_pid(path, engine, 7, 900)
    first = periodic(session, path)
    del engine.alive[7]
    engine.alive[8] = 1000_50
    write_pid(path, engine, 8, 1001)
    engine.clock_offset_s += 3600
    for _ in range(2):
        with pytest.raises(StrangerError, match="the clock was set") as caught:
            periodic(session, path)
        assert "snap take 8 --job a" in caught.value.hint
    # Named once, or with the file written anew, it is known.
    taken = take(session, 8, job="a")
    assert taken.parent is None
    assert periodic(session, path).parent == taken.id
    assert first.job == "a"


def test_clock_set_back_never_makes_a_stranger_the_job(session, engine, tmp_path):
    path = tmp_path / "pid"
    write_pid(path, engine, 7, 900)
    periodic(session, path)
    engine.clock_offset_s -= 3600
    engine.alive[7] = 1002_00  # the pid was reused
    with pytest.raises(StrangerError, match="the clock was set"):
        periodic(session, path)  # the file is of the future
    engine.uptime_ns += 5000 * 10**9
    with pytest.raises(StrangerError, match="the clock was set"):
        periodic(session, path)


def test_pid_file_of_an_earlier_boot(session, engine, store, tmp_path):
    path = tmp_path / "pid"
    write_pid(path, engine, 7, 900)
    point = periodic(session, path)
    store.saved[point.id] = dataclasses.replace(point, boot_id="another boot")
    # The machine restarted: the uptime is small, the wall clock went on, the pid is another process's.
    engine.clock_offset_s += 2000
    engine.uptime_ns = 60 * 10**9
    engine.alive[7] = 20_00
    assert periodic(session, path).reason == "ended"
    # Without a clock that runs while it is off, a new file is older than everything. That proves nothing.
    os.utime(path, (1000, 1000))
    with pytest.raises(StrangerError):
        periodic(session, path)


@pytest.mark.parametrize("text", ["", "abc", "-5", "0", "99999999999"])
def test_bad_pid_file(tmp_path, text):
    (tmp_path / "pid").write_text(text)
    with pytest.raises(UsageError):
        pidfile.read(tmp_path / "pid")
