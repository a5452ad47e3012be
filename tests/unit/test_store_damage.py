"""Damage that was met once: no later take builds upon it, and prune moves what is readable away from it."""

import errno
import json
import os
import shutil

import pytest

from snapshotter.base.errors import MissingPagesError, VerificationError
from store import Store
from store.damage import MAX_FRAMES, DamageList
from tests.unit.store_helpers import PAGE, page, restored, take
from tests.unit.test_store_faults import FIRST, SECOND, flip, frame_of, pages, two_points


@pytest.fixture
def store(tmp_path):
    with Store.open(tmp_path / "store", create=True) as opened:
        yield opened


def damage(store, point, number=0):
    """Flips a byte in the frame of a page. Returns (pack, frame)."""
    pack, frame = frame_of(store, point, number)
    flip(store.packs_dir / f"{pack:08x}.pack", store.readers.get(pack).frame(frame).offset + 5)
    return pack, frame


def test_a_take_never_builds_upon_a_frame_known_to_be_damaged(store):
    one = take(store, FIRST)
    pack, frame = damage(store, one, 3)
    assert not store.verify().ok
    assert store.damage.load() == {pack: frozenset({frame})}
    store.forget([one])
    afresh = take(store, FIRST)
    assert afresh.pages_new == 40
    assert restored(store, afresh) == FIRST
    assert store.verify().ok
    assert store.damage.load() == {pack: frozenset({frame})}  # it is still there for whoever would look
    store.prune()
    assert store.damage.load() == {}
    assert not (store.packs_dir / f"{pack:08x}.pack").exists()
    assert restored(store, afresh) == FIRST


def test_a_read_that_fails_is_noted_too(store):
    one = take(store, FIRST)
    pack, frame = damage(store, one)
    with pytest.raises(VerificationError):
        restored(store, one)
    assert store.damage.load() == {pack: frozenset({frame})}


def test_merged_key_tables_do_not_lead_to_damage_either(store):
    one = take(store, FIRST)
    last = one
    for step in range(20):
        last = take(store, page(step, 9) + FIRST[PAGE:], last, runs=[(0, 1)])
    damage(store, one, 30)
    assert not store.verify().ok
    store.forget(store.points())
    afresh = take(store, FIRST, job="other")
    assert afresh.pages_new == 40
    assert restored(store, afresh) == FIRST
    assert len(store.index.names()) < 4
    assert take(store, FIRST, job="other").pages_new == 0


def test_a_child_of_a_damaged_point_is_not_born_damaged(store):
    one = take(store, FIRST)
    damage(store, one)
    store.verify()
    with pytest.raises(MissingPagesError):
        take(store, SECOND, one, runs=[(0, 20)])
    child = take(store, SECOND, one)  # what the manager does then: everything is read
    assert restored(store, child) == SECOND
    again = take(store, SECOND, child, runs=[])
    assert restored(store, again) == SECOND
    assert store.verify().points_hurt == (one.id,)


def test_prune_moves_what_lives_out_of_a_damaged_pack(store):
    data = bytearray(os.urandom(600 * PAGE))
    one = take(store, data)
    pack, frame = damage(store, one, 599)
    store.verify()
    hurt = [number for number in range(600) if frame_of(store, one, number) == (pack, frame)]
    for number in hurt:
        data[number * PAGE : (number + 1) * PAGE] = os.urandom(PAGE)
    # A child made before the damage was known: it needs most of the pack, but nothing that is damaged.
    (store.path / "damaged").unlink()
    two = take(store, data, one, runs=[(number, 1) for number in hurt])
    assert store.verify().points_hurt == (one.id,)
    assert store.prune().packs_repacked == 0  # one needs what cannot be read: the pack stays for as long
    store.forget([one])
    assert store.prune().packs_repacked == 1
    assert not (store.packs_dir / f"{pack:08x}.pack").exists()
    assert store.damage.load() == {}
    assert restored(store, two) == data
    assert store.verify().ok


def test_verify_strikes_out_what_is_right_again(store):
    one = take(store, FIRST)
    pack, _ = frame_of(store, one, 0)
    path = store.packs_dir / f"{pack:08x}.pack"
    shutil.copy(path, store.path / "backup")
    damage(store, one)
    store.verify()
    assert pack in store.damage.load()
    store.forget([one])
    two = take(store, pages(range(100, 110)))
    assert store.verify([two]).ok
    assert pack in store.damage.load()  # no point needs the frame, it is damaged all the same
    shutil.copy(store.path / "backup", path)
    assert store.verify([two]).ok
    assert store.damage.load() == {}
    assert take(store, FIRST).pages_new == 0


@pytest.mark.parametrize("where", ["open", "footer", "frame"])
def test_what_the_disk_cannot_read_is_damage(store, monkeypatch, where):
    one, two, other = two_points(store)
    pack, _ = frame_of(store, two, 0)
    name = str(store.packs_dir / f"{pack:08x}.pack")
    real_open, real_pread = os.open, os.pread
    data_end = store.readers.get(pack)._data_end

    def open_(path, *args, **kwargs):
        if where == "open" and str(path) == name:
            raise OSError(errno.EIO, "broken")
        return real_open(path, *args, **kwargs)

    def pread(fd, size, offset):
        hit = offset >= data_end if where == "footer" else 64 <= offset < data_end
        if where != "open" and hit and os.readlink(f"/proc/self/fd/{fd}") == name:
            raise OSError(errno.EIO, "broken")
        return real_pread(fd, size, offset)

    store.readers.forget_all()
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", open_)
        patch.setattr(os, "pread", pread)
        with pytest.raises(VerificationError, match=r"EIO.*points hurt"):
            restored(store, two)
        report = store.verify()
        assert report.points_hurt == (two.id,)
        assert all("EIO" in item.what for item in report.damage)
        assert pack in store.damage.load()
        assert store.prune().packs_removed == 0
        assert restored(store, take(store, FIRST, one, runs=[])) == FIRST
        assert restored(store, take(store, SECOND, job="new")) == SECOND
    assert restored(store, other) == pages(range(1000, 1040))
    assert store.verify().ok
    assert store.damage.load() == {}


def test_one_damaged_footer_does_not_stop_the_merging_of_key_tables(store):
    point = take(store, FIRST)
    for step in range(5):
        point = take(store, page(step, 9) + FIRST[PAGE:], point, runs=[(0, 1)])
    assert store.index.names() == []
    pack, _ = frame_of(store, point, 0)
    path = store.packs_dir / f"{pack:08x}.pack"
    flip(path, path.stat().st_size - 80)
    store.readers.forget_all()
    for step in range(10):
        take(store, FIRST, job=f"job{step}")
    assert store.index.names()
    assert store.damage.load() == {pack: frozenset()}
    packs = frozenset(store.catalog.packs())
    assert all(pack not in index.packs for index in store.index.load(packs))


def test_the_list_of_damage(tmp_path):
    (tmp_path / "locks").mkdir()
    damaged = DamageList(tmp_path)
    assert damaged.load() == {}
    damaged.strike([5])
    assert not (tmp_path / "damaged").exists()
    damaged.add([(1, 2), (1, 3), (2, 5)])
    damaged.add([(1, 4), (2, None)])
    assert damaged.load() == {1: frozenset({2, 3, 4}), 2: frozenset()}
    before = (tmp_path / "damaged").stat().st_ino
    damaged.add([(1, 2), (2, 9)])
    assert (tmp_path / "damaged").stat().st_ino == before  # nothing new: not written again
    damaged.add([(3, number) for number in range(MAX_FRAMES + 1)])
    assert damaged.load()[3] == frozenset()
    damaged.strike([1, 7])
    assert damaged.load().keys() == {2, 3}
    assert json.loads((tmp_path / "damaged").read_text())["packs"] == {"00000002": [], "00000003": []}
    (tmp_path / "damaged").write_text('{"format": 1, "packs": [3]}')
    assert damaged.load() == {}
    damaged.add([(1, 2)])
    assert damaged.load() == {1: frozenset({2})}
    shutil.rmtree(tmp_path / "locks")
    damaged.add([(8, None)])  # cannot be written: no error
    assert damaged.load() == {1: frozenset({2})}
