"""Prune: what it merges, what it copies as it is, what a full disk lets it do, and what a crash anywhere leaves."""

import errno
import os
import types

import pytest

from snapshotter.base import faults
from snapshotter.base.errors import StoreError
from store import Store, prune
from store.pack import KIND_PAGES
from tests.unit.store_helpers import PAGE, page, restored, take
from tests.unit.test_store_faults import flip, frame_of, in_child, pages


@pytest.fixture
def store(tmp_path):
    with Store.open(tmp_path / "store", create=True) as opened:
        yield opened


def chain(store, nr_points, job="sim", nr_pages=60):
    """Points each of which changes three pages. Returns them and what each restores to."""
    data = bytearray(pages(range(nr_pages), hash(job) % 1000))
    points, contents = [], []
    for step in range(nr_points):
        numbers = sorted({step % nr_pages, step * 7 % nr_pages, nr_pages - 1 - step % nr_pages})
        for number in numbers:
            data[number * PAGE : (number + 1) * PAGE] = page(number, step * 1000 + len(job))
        images = {"manifest": b"m" * 700 + b"%d" % step, "mm/42": b"x" * 300 + job.encode()}
        runs = [(number, 1) for number in numbers] if points else None
        points.append(take(store, data, points[-1] if points else None, runs=runs, job=job, images=images))
        contents.append(bytes(data))
    return points, contents


def assert_all_whole(store, points, contents):
    assert store.verify().ok
    for point, content in zip(points, contents, strict=True):
        assert restored(store, point) == content


def test_many_small_packs_become_few(store):
    points, contents = chain(store, 200)
    before = {point.id: store.readers.images(store.blob_refs(point.id).images) for point in points}
    assert len(store.catalog.packs()) == 200
    size = store.stats().bytes_packs
    report = store.prune()
    assert report.packs_repacked == 200
    assert report.warnings == ()
    assert len(store.catalog.packs()) == len(os.listdir(store.packs_dir)) == 1
    assert store.stats().bytes_packs < size
    assert_all_whole(store, points, contents)
    for point in points:
        assert store.readers.images(store.blob_refs(point.id).images) == before[point.id]
    chains = [refs.chain for refs in store.catalog.blobs().values()]
    assert max(chains) <= 32
    assert chains.count(0) < 30
    assert store.prune().packs_repacked == 0
    child = take(store, contents[-1], points[-1], runs=[])
    assert child.pages_new == 0
    assert restored(store, child) == contents[-1]


def test_a_merge_of_two_jobs_keeps_each_ones_maps_small(store, monkeypatch):
    """Points of two jobs in turn: a map made against the other job's would say everything again."""
    monkeypatch.setattr(prune, "MERGE_FROM", 8)
    parents, contents = {}, {}
    for step in range(24):
        for job in ("a", "b"):
            base = bytearray(contents.get(job) or os.urandom(800 * PAGE))
            base[step * PAGE : (step + 1) * PAGE] = os.urandom(PAGE)
            runs = [(step, 1)] if job in parents else None
            parents[job] = take(store, base, parents.get(job), runs=runs, job=job, space="mm/" + job)
            contents[job] = bytes(base)
    store.prune()
    assert [refs.chain for refs in store.catalog.blobs().values()].count(0) <= 4
    for job, point in parents.items():
        assert restored(store, point, "mm/" + job) == contents[job]


def test_frames_that_live_as_a_whole_are_copied_as_they_are(store, monkeypatch):
    monkeypatch.setattr(prune, "MERGE_FROM", 2)
    points, contents = chain(store, 10)
    stored = {
        frame: store.readers.get(frame[0]).read_stored(frame[1])[1]
        for frame in {frame_of(store, point, number) for point in points for number in range(60)}
    }

    def no_compression(*_args):
        raise AssertionError("a frame was compressed again")

    monkeypatch.setattr("store.compress.FrameCompressor.pages", no_compression)
    store.prune()
    (pack,) = store.catalog.packs()
    reader = store.readers.get(pack)
    kept = [reader.read_stored(n)[1] for n in range(len(reader.frames)) if reader.frame(n).kind == KIND_PAGES]
    assert sorted(kept) == sorted(stored.values())
    assert_all_whole(store, points, contents)


def test_merging_writes_each_page_map_once(store, monkeypatch):
    monkeypatch.setattr(prune, "MERGE_FROM", 8)
    chain(store, 40)
    written = []
    real = prune.add_maps
    monkeypatch.setattr(prune, "add_maps", lambda *args: (written.append(1), real(*args))[1])
    store.prune()
    assert len(written) == 40
    chain(store, 12, job="later")  # of the old points none needs what is merged now but the last small pack
    written.clear()
    store.prune()
    assert len(written) <= 12 + 40
    written.clear()
    assert store.prune().packs_repacked == 0
    assert not written


def test_few_small_packs_are_left_alone(store):
    chain(store, 20)
    assert store.prune().packs_repacked == 0
    assert len(store.catalog.packs()) == 20


def test_a_damaged_pack_is_left_out_of_a_merge(store, monkeypatch):
    monkeypatch.setattr(prune, "MERGE_FROM", 8)
    points, contents = chain(store, 30)
    pack, frame = frame_of(store, points[10], 10)
    flip(store.packs_dir / f"{pack:08x}.pack", store.readers.get(pack).frame(frame).offset + 5)
    hurt = set(store.verify().points_hurt)
    assert points[10].id in hurt
    assert store.prune().packs_repacked == 29
    assert pack in store.catalog.packs()
    assert set(store.verify().points_hurt) == hurt
    for point, content in zip(points, contents, strict=True):
        if point.id not in hurt:
            assert restored(store, point) == content
    store.forget(list(hurt))
    store.prune()
    assert pack not in store.catalog.packs()
    assert store.verify().ok


def prepared(path, seed=0):
    """A store with something for every step of a prune: garbage, dead packs, hollow and small ones."""
    with Store.open(path, create=True) as store:
        data = bytearray(os.urandom(600 * PAGE))
        first = take(store, data, job="big")
        data[: 500 * PAGE] = os.urandom(500 * PAGE)
        second = take(store, data, first, runs=[(0, 500)], job="big")
        gone = take(store, os.urandom(40 * PAGE), job="gone")
        points, contents = chain(store, 24)
        store.forget([first, gone, points[3]])
        (store.packs_dir / "12345678.pack.tmp").write_bytes(b"x" * 5000)
        (store.packs_dir / "12345679.pack").write_bytes(b"x" * 5000)
        points.append(second)
        contents.append(bytes(data))
        del points[3], contents[3]
        return points, contents


PASSAGES = [
    "store.pack_written",
    "store.pack_synced",
    "store.pack_renamed",
    "store.prune_copied",
    "store.prune_committed@1",
    "store.prune_committed@2",
    *(f"store.prune_deleted@{number}" for number in (1, 2, 3, 4, 12, 27)),
]


@pytest.mark.parametrize("action", ["kill", "error"])
@pytest.mark.parametrize("name", PASSAGES)
def test_a_crash_anywhere_in_a_prune_leaves_every_point_whole(tmp_path, monkeypatch, name, action):
    monkeypatch.setattr(prune, "MERGE_FROM", 8)
    points, contents = prepared(tmp_path / "store")

    def work():
        with Store.open(tmp_path / "store") as store:
            store.prune()

    assert in_child(work, f"{name}:{action}") == (-9 if action == "kill" else 1)
    with Store.open(tmp_path / "store") as store:
        assert_all_whole(store, points, contents)
        store.prune()
        assert_all_whole(store, points, contents)
        assert len(store.catalog.packs()) <= 2
        assert len(os.listdir(store.packs_dir)) == len(store.catalog.packs())
        assert store.stats().bytes_packs < 650 * PAGE


def test_every_fault_point_of_a_prune_is_passed():
    names = {name for name in faults.POINTS if name.startswith(("store.prune", "store.pack"))}
    assert names == {name.partition("@")[0] for name in PASSAGES}


@pytest.mark.parametrize("call", ["pwrite", "fsync"])
def test_a_full_disk_frees_what_needs_no_room(tmp_path, monkeypatch, call):
    monkeypatch.setattr(prune, "MERGE_FROM", 8)
    points, contents = prepared(tmp_path / "store")
    with Store.open(tmp_path / "store") as store:
        files = set(os.listdir(store.packs_dir))

        def full(*_args):
            raise OSError(errno.ENOSPC, "full")

        with monkeypatch.context() as patch:
            patch.setattr(os, call, full)
            report = store.prune()
        assert report.garbage_removed == 2
        assert report.packs_removed >= 1
        assert report.packs_repacked == 0
        assert "ENOSPC" in report.warnings[0]
        assert report.bytes_freed > 40 * PAGE
        left = set(os.listdir(store.packs_dir))
        assert left < files
        assert len(left) == len(store.catalog.packs())
        assert_all_whole(store, points, contents)
        assert store.prune().warnings == ()
        assert_all_whole(store, points, contents)


def test_other_failures_of_a_repack_are_errors(tmp_path, monkeypatch):
    points, contents = prepared(tmp_path / "store")
    with Store.open(tmp_path / "store") as store:

        def broken(*_args):
            raise OSError(errno.EIO, "broken")

        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", broken)
            with pytest.raises(StoreError, match="EIO"):
                store.prune()
        assert_all_whole(store, points, contents)


def test_a_catalog_without_room_for_its_journal_gets_it_from_the_key_tables(tmp_path, monkeypatch):
    from store.catalog import Catalog
    from store.files import NoSpaceError

    points, contents = prepared(tmp_path / "store")
    with Store.open(tmp_path / "store") as store:
        assert store.index.names()
        real = Catalog.replace_packs

        def full(self, *args):
            if store.index.names():
                raise NoSpaceError("the catalog cannot be written: database or disk is full")
            return real(self, *args)

        monkeypatch.setattr(Catalog, "replace_packs", full)
        assert store.prune().packs_removed >= 1
        assert_all_whole(store, points, contents)


def test_only_what_there_is_room_for_is_copied(tmp_path, monkeypatch):
    monkeypatch.setattr(prune, "MERGE_FROM", 8)
    points, contents = prepared(tmp_path / "store")
    with Store.open(tmp_path / "store") as store:
        monkeypatch.setattr(os, "statvfs", lambda _path: types.SimpleNamespace(f_bavail=461_000, f_frsize=1))
        report = store.prune()
        assert report.packs_repacked >= 1
        assert "nearly full" in report.warnings[0]
        assert_all_whole(store, points, contents)
