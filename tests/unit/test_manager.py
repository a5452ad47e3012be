"""Which point is the parent, names, pid files, retention: the manager's decisions against fakes."""

from __future__ import annotations

import dataclasses

import pytest

from snapshotter.base.errors import (
    LockedError,
    MissingPagesError,
    NoSuchPointError,
    OtherProgramError,
    SnapshotterError,
    UsageError,
    VerificationError,
)
from snapshotter.manager import config, doctor, identities, jobs, listing, upkeep
from snapshotter.manager.ports import Identity
from snapshotter.manager.rollback import rollback
from snapshotter.manager.session import Session
from snapshotter.manager.take import take, take_periodic
from store.types import Damage, FileRecord
from tests.fakes import BOOT


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


def test_a_name_belongs_to_one_program(session, engine):
    first = take(session, 7, job="a")
    engine.alive[8] = 200
    with pytest.raises(OtherProgramError, match="job a still runs as process 7"):
        take(session, 8, job="a")
    del engine.alive[7]
    engine.programs[8] = "another"
    with pytest.raises(OtherProgramError, match="it runs another, the job ran sim") as caught:
        take(session, 8, job="a")
    assert caught.value.exit_status == 2
    assert "--other-program" in caught.value.hint
    assert [point.id for point in listing.list_points(session)] == [first.id]
    taken = take(session, 8, job="a", other_program=True)
    assert take(session, 8, job="a").parent == taken.id, "from now on the name is its"
    del engine.alive[8]
    engine.alive[9] = 300
    assert take(session, 9, job="a").parent is None, "a restart"


def test_a_pid_file_of_another_program(session, engine, tmp_path):
    path = tmp_path / "pid"
    take(session, 7, job="a")
    del engine.alive[7]
    engine.alive[8] = 200
    engine.programs[8] = "another"
    path.write_text("8")
    with pytest.raises(OtherProgramError):
        take_periodic(session, path, job="a", max_points=1)
    assert take_periodic(session, path, job="a", max_points=1, other_program=True).pid == 8
    assert len(listing.list_points(session)) == 1


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
    made = jobs.default_name(Identity(7, 1, BOOT, comm, 0.0, 1.0, 1.0))
    assert jobs.check_name(made) == made
    if "/" not in comm:
        assert made == name


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
        upkeep.select(session, [point.id, "ffff"])
    assert len(listing.list_points(session)) == 1


def test_keep_last_goes_by_commits_not_by_the_clock(session, engine):
    points = []
    for step_s in (0, -3600, -7200):
        engine.clock_offset_s += step_s
        points.append(take(session, 7, job="a"))
    assert [point.id for point in listing.list_points(session)] == [point.id for point in points]
    assert [point.id for point in upkeep.forget_all_but(session, "a", 1)] == [p.id for p in points[:2]]
    assert [point.id for point in listing.list_points(session)] == [points[2].id]


def test_keep_last_that_fails_is_a_warning_of_the_take(session, store, tmp_path):
    (tmp_path / "pid").write_text("7")
    take(session, 7, job="a")
    store.forget_error = LockedError("a prune of the store is running")
    point = take_periodic(session, tmp_path / "pid", job="a", max_points=1)
    assert len(store.points()) == 2
    assert any("not forgotten" in text and "prune" in text for text in point.warnings)


def test_forget_and_prune_wait_as_long_as_the_settings_say(tmp_path, engine, store):
    settings = config.Config(store=tmp_path / "store", store_from="test", lock_wait_s=7.5)
    session = Session(settings, open_store=store.opener, open_engine=lambda: engine)
    points = [take(session, 7, job="a") for _ in range(3)]
    upkeep.forget(session, [points[0]])
    upkeep.forget_all_but(session, "a", 1)
    upkeep.prune(session)
    assert store.waited == [("forget", 7.5), ("forget", 7.5), ("prune", 7.5)]


def test_a_prune_is_waited_for_as_long_as_the_settings_say(tmp_path):
    from store import Store

    with Store.open(tmp_path / "store", create=True) as store, store.lock_exclusive():
        settings = config.Config(store=tmp_path / "store", store_from="test", lock_wait_s=0.0)
        with Session(settings) as session:
            with pytest.raises(LockedError):
                session.store().forget(["f" * 32], wait_s=settings.lock_wait_s)
            with pytest.raises(LockedError):
                upkeep.prune(session)


@pytest.mark.parametrize("text", ["nan", "inf", "-1", "-0.5", "1e6", "1" + "0" * 400])
def test_lock_wait_out_of_range(tmp_path, text):
    path = tmp_path / "c.toml"
    path.write_text(f"lock_wait_s = {text}")
    env = {"HOME": str(tmp_path)}
    with pytest.raises(UsageError) as caught:
        config.load(env=env, uid=0, system_config=path)
    assert str(path) in str(caught.value)
    with pytest.raises(UsageError):
        config.load(env=env | {"SNAP_LOCK_WAIT_S": text}, uid=0, system_config=tmp_path / "none")


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


def test_any_living_task_makes_the_point_be_verified_first(session, engine, store):
    """The root is gone, a child lives: the rollback would kill it."""
    engine.alive[8] = 200
    point = take(session, 7, job="a")
    store.saved[point.id] = dataclasses.replace(point, tasks={7: 100, 8: 200, 9: 300})
    store.damage = (Damage("pack 1", "frame 3 is wrong", (point.id,)),)
    del engine.alive[7]
    with pytest.raises(VerificationError):
        rollback(session, point.id)
    assert engine.alive == {8: 200}
    engine.alive[8] = 201  # somebody else
    rollback(session, point.id)


def test_name_is_resolved_again_once_the_lock_is_held(session, store, monkeypatch):
    older = take(session, 7, job="a")
    lock = store.lock_job
    committed = []

    def lock_late(job, wait_s=0.0):
        if not committed:  # while we waited for the lock, a take committed
            committed.append(take_into(store, older))
        return lock(job, wait_s)

    monkeypatch.setattr(store, "lock_job", lock_late)
    assert rollback(session, "a").point.id == committed[0].id


def test_latest_may_be_another_jobs_by_then(session, store, monkeypatch):
    older = take(session, 7, job="a")
    lock = store.lock_job
    locked = []

    def lock_late(job, wait_s=0.0):
        if not locked:
            take_into(store, dataclasses.replace(older, job="b"))
        locked.append(job)
        return lock(job, wait_s)

    monkeypatch.setattr(store, "lock_job", lock_late)
    assert rollback(session, "latest").point.job == "b"
    assert locked == ["a", "b"]


def take_into(store, like):
    """Commits a copy of a point behind the manager's back."""
    point = dataclasses.replace(like, id=next(store.ids))
    store.saved[point.id] = point
    return point


def test_a_damaged_parent_is_not_built_upon(session, engine, store, monkeypatch):
    """In the parent's page map, in its images, or in pages that the dump compares: a new chain, and a word of it."""
    for number, place in enumerate(("writer", "reader", "dump")):
        first = take(session, 7, job=f"job{number}")

        real = getattr(store, place, None)

        def bad(*args, real=real):
            if args[-1] is not None:
                raise VerificationError("frame 3 does not match its digest", where="pack 1")
            return real(*args)

        if place == "dump":
            failing = iter([VerificationError("frame 3 does not match its digest", where="pack 1")])

            def fail_once(failing=failing):
                for error in failing:
                    raise error

            monkeypatch.setattr(engine, "during_dump", fail_once)
        else:
            monkeypatch.setattr(store, place, bad)
        second = take(session, 7, job=f"job{number}")
        monkeypatch.undo()
        assert second.parent is None
        assert engine.dumps[-1][1] is None
        text = next(text for text in second.warnings if "new chain" in text)
        assert first.id[:8] in text
        assert "pack 1: frame 3" in text
        assert take(session, 7, job=f"job{number}").parent == second.id


def test_damage_without_a_parent_is_an_error(session, engine):
    def fail():
        raise VerificationError("no memory is right")

    engine.during_dump = fail
    with pytest.raises(VerificationError):
        take(session, 7, job="a")
    assert len(engine.dumps) == 1


def test_warnings_after_the_commit_reach_whoever_took_the_point(session, engine, store):
    engine.late_warnings = ["tracking ends here: no keeper"]
    point = take(session, 7, job="a")
    assert point.warnings == ("a warning", "tracking ends here: no keeper")
    assert store.saved[point.id].warnings == ("a warning",)


def test_the_engines_late_warnings_are_told_from_those_of_the_point(monkeypatch):
    import checkpoint.dump
    from checkpoint.context import DumpResult, DumpStats
    from snapshotter.manager.engine import RealEngine

    def dump(_pid, _sink, _parent, _options, commit):
        result = DumpResult(7, {}, DumpStats(), ["early"], BOOT, 1, 1, {7: 1}, "compare", "")
        commit(result)
        result.warnings.append("tracking ends here: EIO")
        return result

    monkeypatch.setattr(checkpoint.dump, "dump", dump)
    committed = []
    late = RealEngine().dump(7, None, None, "run", committed.append)
    assert list(late) == ["tracking ends here: EIO"]
    assert list(committed[0].warnings) == ["early"]


def test_file_identities_come_from_the_images():
    from images import common_pb2, files_pb2, mm_pb2

    def identity(path, **fields):
        return common_pb2.FileIdentity(path=path, dev=1, ino=len(path), size_bytes=5, mtime_ns=-6, **fields)

    mm = mm_pb2.Mm(
        exe=identity(b"/bin/x", build_id=b"id"),
        files=[identity(b"/lib/y"), identity(b"/gone", deleted=True), identity(b"/bad\xff")],
    )
    replaced = mm_pb2.Mm(exe=identity(b"/bin/replaced"), exe_shmem="shmem/1", files=[identity(b"/lib/y")])
    files = files_pb2.Files(
        descriptions=[
            files_pb2.Description(id=1, regular=files_pb2.RegularFile(identity=identity(b"/log"))),
            files_pb2.Description(
                id=2, regular=files_pb2.RegularFile(identity=identity(b"/memfd:a"), shmem="shmem/2")
            ),
            files_pb2.Description(id=3, directory=files_pb2.Directory(identity=identity(b"/tmp"))),
        ]
    )
    images = {"manifest": b"", "mm/7": mm, "mm/8": replaced, "files": files, "fdtable/7": b""}
    found = identities.of_images(
        {n: m if isinstance(m, bytes) else m.SerializeToString() for n, m in images.items()}
    )
    assert [record.path for record in found] == ["/bad\\xff", "/bin/x", "/lib/y", "/log"]
    assert found[1] == FileRecord("/bin/x", 1, 6, 5, -6, b"id")


def test_file_identities_are_recorded_with_the_point(session, engine, store):
    from images import common_pb2, mm_pb2

    mm = mm_pb2.Mm(exe=common_pb2.FileIdentity(path=b"/bin/x", size_bytes=9))
    engine.images = {"manifest": b"", "mm/7": mm.SerializeToString()}
    point = take(session, 7)
    assert [record.path for record in store.files(point)] == ["/bin/x"]


def test_doctor_needs_names_that_the_probes_have(session, engine):
    """A name that no probe has is a feature that is missing, and there is none of that kind."""
    from checkpoint.kernel.features import probe_all

    engine.features = lambda: [{"name": "wp_async", "ok": True, "errno": 0, "note": ""}]
    missing = {note.subject for note in doctor.doctor(session).notes if note.level == "problem"}
    assert {"kcmp", "clone3_set_tid"} <= missing
    assert missing - {"machine", "yama"} <= {found.name for found in probe_all()}


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
