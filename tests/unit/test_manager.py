"""Which point is the parent, names, pid files, retention: the manager's decisions against fakes."""

from __future__ import annotations

import os

import pytest

from snapshotter.base.errors import (
    LockedError,
    MissingPagesError,
    NoSuchPointError,
    SnapshotterError,
    TargetGoneError,
    UsageError,
    VerificationError,
)
from snapshotter.manager import config, jobs, listing, pidfile, upkeep
from snapshotter.manager.ports import Identity, Skipped
from snapshotter.manager.rollback import rollback
from snapshotter.manager.session import Session
from snapshotter.manager.take import StrangerError, take, take_periodic
from store.types import Damage
from tests.fakes import BOOT, FakeEngine, FakeStore


@pytest.fixture
def engine():
    return FakeEngine()


@pytest.fixture
def store():
    return FakeStore()


@pytest.fixture
def session(tmp_path, engine, store):
    settings = config.Config(store=tmp_path / "store", store_from="test", lock_wait_s=0.0)
    return Session(settings, open_store=store.opener, open_engine=lambda: engine)


def test_chain_of_one_process(session, engine):
    first = take(session, 7)
    second = take(session, 7)
    assert (first.parent, second.parent) == (None, first.id)
    assert first.job == second.job == "sim-7"
    assert engine.dumps[0][1] is None
    assert engine.dumps[1][1].nonce == "n"
    assert engine.dumps[1][1].has_space("mm/7")
    assert not engine.dumps[1][1].has_space("mm/8")


def test_reused_pid_starts_a_new_chain(session, engine):
    take(session, 7, job="a")
    engine.alive[7] = 101
    assert take(session, 7, job="a").parent is None
    assert engine.dumps[1][1] is None


def test_chain_goes_on_from_the_point_rolled_back_to(session, engine, monkeypatch):
    monkeypatch.setattr("time.clock_gettime_ns", lambda _clock: engine.uptime_ns)
    points = [take(session, 7, job="a") for _ in range(3)]
    rollback(session, points[1].id)
    fourth = take(session, 7, job="a")
    assert fourth.parent == points[1].id
    # The tracker knows nothing of the restored process: the engine reads everything.
    assert engine.dumps[-1][1] is None
    fifth = take(session, 7, job="a")
    assert fifth.parent == fourth.id
    assert engine.dumps[-1][1] is not None
    rollback(session, fifth.id)
    assert {7: 100} in engine.known_tasks
    assert {7: 101} in engine.known_tasks
    rollback(session, points[0].id)
    assert take(session, 7, job="a").parent == points[0].id


def test_rolled_back_point_that_was_forgotten_is_no_parent(session, engine, store):
    first = take(session, 7, job="a")
    rollback(session, first.id)
    store.forget([first])
    assert take(session, 7, job="a").parent is None


def test_unreadable_head_starts_a_new_chain(session):
    first = take(session, 7, job="a")
    rollback(session, first.id)
    (session.store_path / "heads" / "a.json").write_text('{"point": 1}')
    assert take(session, 7, job="a").parent is None


def test_two_takes_at_once(session, store):
    store.locked.add("a")
    with pytest.raises(LockedError):
        take(session, 7, job="a")
    with pytest.raises(LockedError):
        _ = rollback(session, _saved(session, "b").id) if not store.locked.add("b") else None


def _saved(session, job):
    store = session.store()
    store.locked.discard(job)
    point = take(session, 7, job=job)
    store.locked.add(job)
    return point


def test_engine_that_does_not_commit(session, engine):
    engine.dump = lambda *_args: None
    with pytest.raises(SnapshotterError, match="without a point"):
        take(session, 7)


@pytest.mark.parametrize(
    "name", ["", "a/b", "../x", "-x", "latest", "a b", "deadbeef", "x" * 65, "a~1", "a..b"]
)
def test_bad_job_names(name):
    with pytest.raises(UsageError):
        jobs.check_name(name)


@pytest.mark.parametrize("name", ["sim", "sim-1", "a.b_c:d+e", "Web1", "beef_"])
def test_good_job_names(name):
    assert jobs.check_name(name) == name


@pytest.mark.parametrize(
    ("comm", "name"),
    [("python3", "python3-7"), ("(sd-pam)", "sd-pam-7"), ("../../x", "_.._x-7"), ("\N{SNOWMAN}", "job-7")],
)
def test_default_names_are_names(comm, name):
    made = jobs.default_name(Identity(7, 1, BOOT, comm, 0.0))
    assert jobs.check_name(made) == made
    if "/" not in comm:
        assert made == name


def periodic(session, path):
    return take_periodic(session, path, job="a")


def test_periodic(session, engine, store, tmp_path):
    path = tmp_path / "pid"
    done = periodic(session, path)
    assert isinstance(done, Skipped)
    assert done.reason == "ended"
    path.write_text("7\n")
    first = periodic(session, path)
    assert periodic(session, path).parent == first.id
    store.locked.add("a")
    assert periodic(session, path).reason == "busy"
    store.locked.clear()
    del engine.alive[7]
    assert periodic(session, path).reason == "ended"


def test_periodic_job_that_ends_during_the_take(session, engine, tmp_path):
    (tmp_path / "pid").write_text("7")

    def end():
        raise TargetGoneError("gone")

    engine.during_dump = end
    assert periodic(session, tmp_path / "pid").reason == "ended"


def test_periodic_pid_of_a_stranger(session, engine, tmp_path, monkeypatch):
    monkeypatch.setattr("time.clock_gettime_ns", lambda _clock: engine.uptime_ns)
    path = tmp_path / "pid"
    path.write_text("7")
    os.utime(path, (500, 500))
    with pytest.raises(StrangerError):
        periodic(session, path)
    os.utime(path, (1500, 1500))
    first = periodic(session, path)
    os.utime(path, (500, 500))
    assert periodic(session, path).parent == first.id
    # Rolled back: a new start time, younger than the pid file, and the job all the same.
    rollback(session, first.id)
    assert periodic(session, path).parent == first.id
    engine.alive[7] += 1
    assert periodic(session, path).reason == "ended"


@pytest.mark.parametrize("text", ["", "abc", "-5", "0", "99999999999"])
def test_bad_pid_file(tmp_path, text):
    (tmp_path / "pid").write_text(text)
    with pytest.raises(UsageError):
        pidfile.read(tmp_path / "pid")


def test_keep_last(session):
    points = [take(session, 7, job="a") for _ in range(5)]
    assert [p.id for p in upkeep.forget_all_but(session, "a", 2, dry_run=True)] == [p.id for p in points[:3]]
    assert len(listing.list_points(session)) == 5
    upkeep.forget_all_but(session, "a", 2)
    assert [p.id for p in listing.list_points(session)] == [p.id for p in points[3:]]


def test_ranges(session):
    points = [take(session, 7, job="a") for _ in range(4)]
    other = take(session, 7, job="b")
    got = listing.resolve_many(session, [f"{points[1].id}..{points[2].id}", points[2].id])
    assert [p.id for p in got] == [p.id for p in points[1:3]]
    for bad in (f"{points[2].id}..{points[1].id}", f"{points[0].id}..{other.id}", f"..{other.id}"):
        with pytest.raises(UsageError):
            listing.resolve_many(session, [bad])


def test_forget_refuses_everything_when_one_is_unknown(session):
    point = take(session, 7)
    with pytest.raises(NoSuchPointError):
        upkeep.forget(session, [point.id, "ffff"])
    assert len(listing.list_points(session)) == 1


def test_config_precedence(tmp_path):
    system = tmp_path / "system.toml"
    user = tmp_path / "home" / ".config" / "snap" / "config.toml"
    user.parent.mkdir(parents=True)
    env = {"HOME": str(tmp_path / "home")}

    def load(flag=None, uid=0, **more):
        return config.load(flag, env=env | more, uid=uid, system_config=system)

    assert str(load().store) == "/var/lib/snap"
    assert load(uid=5).store == tmp_path / "home/.local/share/snap"
    assert str(load(uid=5, XDG_DATA_HOME="/x").store) == "/x/snap"
    system.write_text('store = "/sys"\nlock_wait_s = 3\n')
    assert (str(load().store), load().lock_wait_s) == ("/sys", 3.0)
    user.write_text('store = "~/points"\n')
    assert load().store == tmp_path / "home" / "points"
    assert load().lock_wait_s == 3.0
    assert str(load(SNAP_STORE="/env").store) == "/env"
    made = load("/flag", SNAP_STORE="/env")
    assert (str(made.store), made.store_from) == ("/flag", "--store")


@pytest.mark.parametrize("text", ["store = 5", "stor = '/x'", "store = 'relative'", "store = ", "\xff"])
def test_bad_config(tmp_path, text):
    path = tmp_path / "c.toml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UsageError, match=r"c\.toml|setting|store|TOML") as caught:
        config.load(env={"HOME": str(tmp_path)}, uid=0, system_config=path)
    assert str(path) in str(caught.value)


def test_living_job_is_replaced_only_by_a_whole_point(session, engine, store):
    point = take(session, 7, job="a")
    store.damage = (Damage("pack 1", "frame 3 is wrong", (point.id,)),)
    with pytest.raises(VerificationError, match="frame 3"):
        rollback(session, point.id)
    assert engine.alive == {7: 100}
    # Nothing to lose: the engine verifies what it reads.
    del engine.alive[7]
    rollback(session, point.id)
    assert 7 in engine.alive


def test_pages_that_the_tracker_missed_are_read_again(session, engine, store):
    first = take(session, 7, job="a")
    failing = iter([True])

    def fail_once():
        if next(failing, False):
            raise MissingPagesError("8 pages are missing", where="mm/7")

    engine.during_dump = fail_once
    second = take(session, 7, job="a")
    assert second.parent == first.id
    assert [parent is None for _, parent, _ in engine.dumps] == [True, False, True]
    assert any("mm/7: 8 pages" in text for text in second.warnings)
    assert len(store.points()) == 2
