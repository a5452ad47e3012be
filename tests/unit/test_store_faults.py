"""What a full disk, a crash or damage leaves: the old points whole, and an error that names things."""

import dataclasses
import errno
import os
import sqlite3
from pathlib import Path

import pytest

from snapshotter.base import faults
from snapshotter.base.errors import NoStoreError, PermissionDeniedError, StoreError, VerificationError
from store import Store, schema
from store.pack import KIND_PAGES
from tests.unit.store_helpers import PAGE, die_at, page, restored, take


def pages(numbers, salt=0):
    return b"".join(page(number, salt) for number in numbers)


FIRST, SECOND = pages(range(40)), pages(range(20), 1) + pages(range(20, 40))


@pytest.fixture
def store(tmp_path):
    with Store.open(tmp_path / "store", create=True) as opened:
        yield opened


def assert_whole(store, point):
    """The first point is there, nothing else is, and a prune leaves no garbage."""
    assert [dataclasses.replace(found, bytes_stored=0) for found in store.points()] == [
        dataclasses.replace(point, bytes_stored=0)  # prune reckons it anew
    ]
    assert store.verify().ok
    assert restored(store, point) == FIRST
    store.prune(wait_s=5)
    assert len(os.listdir(store.packs_dir)) == len(store.catalog.packs())


def failing(monkeypatch, call, nth, code):
    """Makes the nth call of os.<call> fail, and every one after it."""
    real = getattr(os, call)
    count = 0

    def wrapper(*args, **kwargs):
        nonlocal count
        count += 1
        if count >= nth:
            raise OSError(code, os.strerror(code))
        return real(*args, **kwargs)

    monkeypatch.setattr(os, call, wrapper)
    return lambda: count >= nth


@pytest.mark.parametrize(
    ("call", "code", "kind"),
    [
        ("pwrite", errno.ENOSPC, StoreError),
        ("fsync", errno.EIO, StoreError),
        ("fsync", errno.ENOSPC, StoreError),
        ("pwrite", errno.EACCES, PermissionDeniedError),
    ],
)
def test_every_write_may_fail(store, call, code, kind):
    point = take(store, FIRST)
    for nth in range(1, 30):
        with pytest.MonkeyPatch.context() as patch:
            failed = failing(patch, call, nth, code)
            try:
                take(store, SECOND, point, runs=[(0, 20)])
            except kind as error:
                assert errno.errorcode[code] in error.what
                assert error.hint
            else:
                assert nth > 1
                assert not failed()
                return
        assert_whole(store, point)
    raise AssertionError("the writes never came to an end")


def test_no_room_for_a_new_pack(store):
    point = take(store, FIRST)
    store.packs_dir.rename(store.path / "elsewhere")
    with pytest.raises(StoreError, match="ENOENT"):
        take(store, SECOND, None, job="other", runs=None)
    (store.path / "elsewhere").rename(store.packs_dir)
    assert_whole(store, point)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("where", ["pwrite", "fsync", "rename", "commit"])
def test_a_crash_at_each_step(tmp_path, where, after):
    """A child takes a point and dies at the nth call; the store is then as if it never ran, or the point is there."""
    with Store.open(tmp_path / "store", create=True) as store:
        point = take(store, FIRST)
    for nth in range(1, 30):
        child = os.fork()
        if child == 0:
            try:
                die_at(*call(where), nth, after=after)
                with Store.open(tmp_path / "store") as store:
                    take(store, SECOND, point, runs=[(0, 20)])
            finally:
                os._exit(0 if "store" in locals() and len(store.points()) == 2 else 1)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        with Store.open(tmp_path / "store") as store:
            found = store.points()
            if len(found) == 2:
                assert status == 0 or where == "commit" or nth > 1
                assert restored(store, found[1]) == SECOND
                assert store.verify().ok
                return
            assert status == 77
            assert_whole(store, point)
    raise AssertionError("the steps never came to an end")


def in_child(work, fault):
    """Runs `work` in a child with a fault point selected. Returns the child's exit code."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            faults.configure(fault)
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("action", ["kill", "error"])
@pytest.mark.parametrize(
    "name", [name for name in faults.POINTS if name.startswith("store.") and "prune" not in name]
)
def test_take_fault_points(tmp_path, name, action):
    with Store.open(tmp_path / "store", create=True) as store:
        point = take(store, FIRST)

    def work():
        with Store.open(tmp_path / "store") as store:
            take(store, SECOND, point, runs=[(0, 20)])

    assert in_child(work, f"{name}:{action}") == (-9 if action == "kill" else 1)
    with Store.open(tmp_path / "store") as store:
        if name == "store.committed":
            assert len(store.points()) == 2
            assert restored(store, store.points()[1]) == SECOND
            assert store.verify().ok
        else:
            assert_whole(store, point)


@pytest.mark.parametrize("action", ["kill", "error"])
@pytest.mark.parametrize("name", [name for name in faults.POINTS if name.startswith("store.prune")])
def test_prune_fault_points(tmp_path, name, action):
    data = bytearray(os.urandom(600 * PAGE))
    with Store.open(tmp_path / "store", create=True) as store:
        first = take(store, data)
        data[: 500 * PAGE] = os.urandom(500 * PAGE)
        second = take(store, data, first, runs=[(0, 500)])
        store.forget([first])

    def work():
        with Store.open(tmp_path / "store") as store:
            store.prune()

    assert in_child(work, f"{name}:{action}") == (-9 if action == "kill" else 1)
    with Store.open(tmp_path / "store") as store:
        assert store.verify().ok
        assert restored(store, second) == data
        store.prune()
        assert restored(store, second) == data
        assert len(os.listdir(store.packs_dir)) == len(store.catalog.packs())
        assert store.stats().bytes_packs < 620 * PAGE


def call(where):
    """(owner, name) of what a commit calls."""
    from store.catalog import Catalog

    return {
        "pwrite": (os, "pwrite"),
        "fsync": (os, "fsync"),
        "rename": (Path, "rename"),
        "commit": (Catalog, "add_point"),
    }[where]


def flip(path, at):
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 0x55]))


def two_points(store):
    one = take(store, FIRST)
    two = take(store, SECOND, one, runs=[(0, 20)])
    other = take(store, pages(range(1000, 1040)), job="other")
    return one, two, other


def frame_of(store, point, number):
    loc = int(store.readers.maps(store.blob_refs(point.id).maps)["mm/42"].locs[number])
    return loc >> 32, loc >> 12 & 0xFFFFF


def test_a_corrupt_frame_names_the_points_that_it_hurts(store):
    one, two, other = two_points(store)
    pack, frame = frame_of(store, one, 30)
    offset = store.readers.get(pack).frame(frame).offset
    flip(store.packs_dir / f"{pack:08x}.pack", offset + 5)
    report = store.verify()
    assert report.points_hurt == tuple(sorted((one.id, two.id)))
    assert any(f"pack {pack:08x}, frame {frame}" in damage.where for damage in report.damage)
    with pytest.raises(VerificationError, match="points hurt") as caught:
        restored(store, two)
    assert f"pack {pack:08x}, frame {frame}" in caught.value.where
    assert one.id[:12] in str(caught.value)
    assert restored(store, other) == pages(range(1000, 1040))
    assert store.verify([other]).ok


def test_a_wrong_page_in_a_right_frame_is_found(store):
    one, _, _ = two_points(store)
    pack, frame = frame_of(store, one, 30)
    reader = store.readers.get(pack)
    keys = reader.page_keys()
    keys[frame] = bytes(len(keys[frame]))
    from store.verify import _Verifier

    verifier = _Verifier(store, {})
    with pytest.raises(VerificationError, match="digests"):
        verifier._check_frame(pack, frame, keys, 0)
    assert reader.read(frame, KIND_PAGES)


@pytest.mark.parametrize("damage", ["missing", "truncated", "footer", "header"])
def test_a_damaged_pack_names_the_points_that_it_hurts(store, damage):
    one, two, other = two_points(store)
    pack = frame_of(store, two, 0)[0]
    path = store.packs_dir / f"{pack:08x}.pack"
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        os.truncate(path, path.stat().st_size - 100)
    else:
        flip(path, path.stat().st_size - 80 if damage == "footer" else 20)
    store.readers.forget_all()
    report = store.verify()
    assert report.points_hurt == (two.id,)
    assert all(f"pack {pack:08x}" in item.where for item in report.damage)
    with pytest.raises(VerificationError, match="points hurt"):
        restored(store, two)
    assert restored(store, one) == FIRST
    # A take goes on (without what the damaged pack knew), and nothing is thrown away meanwhile.
    assert restored(store, take(store, FIRST, one, runs=[])) == FIRST
    assert store.prune().packs_removed == 0
    store.forget([two])
    store.prune()
    assert store.verify().ok
    assert restored(store, other) == pages(range(1000, 1040))


def test_a_corrupt_catalog_is_an_error_of_ours(tmp_path):
    with Store.open(tmp_path / "s", create=True) as store:
        take(store, FIRST)
    (tmp_path / "s" / "catalog.sqlite").write_bytes(b"not a database at all" * 500)
    with pytest.raises(StoreError, match="catalog"):
        Store.open(tmp_path / "s")
    (tmp_path / "s" / "catalog.sqlite").unlink()
    with pytest.raises(NoStoreError, match="no catalog"):
        Store.open(tmp_path / "s", create=True)


def test_a_newer_schema_is_refused(tmp_path):
    Store.open(tmp_path / "s", create=True).close()
    with sqlite3.connect(tmp_path / "s" / "catalog.sqlite") as database:
        database.execute("update alembic_version set version_num = '9999'")
    with pytest.raises(NoStoreError, match="newer than this snap"):
        Store.open(tmp_path / "s")


def test_migrations_make_the_tables_that_the_code_uses(store):
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    with store.catalog._engine.connect() as connection:
        context = MigrationContext.configure(connection)
        assert compare_metadata(context, schema.metadata) == []
        assert context.get_current_revision() == schema.SCHEMA_REVISION


def test_a_lost_index_costs_nothing(store):
    point = take(store, FIRST)
    for step in range(20):
        point = take(store, page(step, 9) + FIRST[PAGE:], point, runs=[(0, 1)])
    for name in store.index.names():
        (store.path / "index" / name).write_bytes(b"junk")
    again = take(store, FIRST, job="other")
    assert again.pages_new == 0
