"""Making a store: a crash anywhere in it is completed by the next open, and an old store is never made anew."""

import os
from pathlib import Path

import pytest

from snapshotter.base.errors import NoStoreError
from snapshotter.manager.jobs import Head, read_head, write_head
from store import Store
from tests.unit.store_helpers import die_at, page, restored, take

DATA = b"".join(page(number) for number in range(20))


@pytest.mark.parametrize("content", [b"", "empty database"], ids=["empty", "no tables"])
def test_an_empty_catalog_beside_packs_is_refused(tmp_path, content):
    with Store.open(tmp_path / "s", create=True) as store:
        point = take(store, DATA)
        packs = os.listdir(store.packs_dir)
    path = tmp_path / "s" / "catalog.sqlite"
    good = path.read_bytes()
    if content:
        import sqlite3

        path.unlink()
        with sqlite3.connect(path) as database:
            database.execute("create table t (x)")
            database.execute("drop table t")
    else:
        path.write_bytes(b"")
    for create in (False, True):
        with pytest.raises(NoStoreError, match="catalog is empty") as caught:
            Store.open(tmp_path / "s", create=create)
        assert "backup" in caught.value.hint
        assert caught.value.exit_status == 10
    assert os.listdir(tmp_path / "s" / "packs") == packs
    path.write_bytes(good)
    with Store.open(tmp_path / "s") as store:
        assert restored(store, point) == DATA


@pytest.mark.parametrize("left", ["catalog.sqlite", "packs"])
def test_a_store_that_lost_its_mark_is_not_made_anew(tmp_path, left):
    with Store.open(tmp_path / "s", create=True) as store:
        point = take(store, DATA)
    mark = (tmp_path / "s" / "STORE").read_bytes()
    (tmp_path / "s" / "STORE").unlink()
    if left == "packs":
        (tmp_path / "s" / "catalog.sqlite").rename(tmp_path / "catalog")
    with pytest.raises(NoStoreError, match="STORE is missing"):
        Store.open(tmp_path / "s", create=True)
    assert not (tmp_path / "s" / "STORE").exists()
    (tmp_path / "s" / "STORE").write_bytes(mark)
    if left == "packs":
        (tmp_path / "catalog").rename(tmp_path / "s" / "catalog.sqlite")
    with Store.open(tmp_path / "s") as store:
        assert restored(store, point) == DATA


def call(where):
    """(owner, name) of what a making store calls."""
    from alembic import command

    return {
        "open": (os, "open"),
        "rename": (Path, "rename"),
        "fsync": (os, "fsync"),
        "mkdir": (Path, "mkdir"),
        "migrate": (command, "upgrade"),
    }[where]


@pytest.mark.parametrize("where", ["open", "rename", "fsync", "mkdir", "migrate"])
def test_a_crash_while_a_store_is_made(tmp_path, where):
    """The next creating open completes it; one that does not create either does too, or says that there is none."""
    for nth in range(1, 60):
        root = tmp_path / f"{where}{nth}"
        child = os.fork()
        if child == 0:
            try:
                die_at(*call(where), nth)
                Store.open(root, create=True).close()
                os._exit(0)
            finally:
                os._exit(1)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in {0, 77}
        if root.exists():
            try:
                Store.open(root).close()
            except NoStoreError:
                assert not (root / "STORE").exists()
        with Store.open(root, create=True) as store:
            assert restored(store, take(store, DATA)) == DATA
            store.prune()
            assert not list(root.rglob("*.tmp"))
        if status == 0:
            assert nth > 1
            return
    raise AssertionError("the steps never came to an end")


def test_heads_are_part_of_the_store(tmp_path, monkeypatch):
    head = Head(point="ab" * 16, boot_id="b" * 36, restored_uptime_ns=5, tasks={42: 7})
    with Store.open(tmp_path / "s", create=True) as store:
        directory = store.path / "heads"
        assert directory.stat().st_mode & 0o777 == 0o700
        synced = []
        real = os.fsync
        monkeypatch.setattr(
            os, "fsync", lambda fd: (synced.append(os.readlink(f"/proc/self/fd/{fd}")), real(fd))
        )
        write_head(store.path, "sim", head)
        assert str(directory) in synced
        assert (directory / "sim.json").stat().st_mode & 0o777 == 0o600
        for name, age_s in (("old", 7200), ("new", 0)):
            temp = directory / f"{name}.json.tmp"
            temp.touch()
            os.utime(temp, (temp.stat().st_mtime - age_s,) * 2)
        assert store.prune().garbage_removed == 1  # somebody may be writing the other one
        assert sorted(os.listdir(directory)) == ["new.json.tmp", "sim.json"]
        assert read_head(store.path, "sim") == head
