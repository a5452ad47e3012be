"""Points through the whole store: what was put comes back, and costs what it should."""

import os
import subprocess
import sys
import threading

import pytest

from snapshotter.base.errors import (
    LockedError,
    NoStoreError,
    NoSuchPointError,
    PermissionDeniedError,
    StoreError,
    UsageError,
    VerificationError,
)
from store import FileRecord, PointMeta, Store
from tests.unit.store_helpers import META, PAGE, Memory, page, restored, take


@pytest.fixture
def store(tmp_path):
    with Store.open(tmp_path / "store", create=True) as opened:
        yield opened


def pages(numbers, salt=0):
    return b"".join(page(number, salt) for number in numbers)


def test_what_was_put_comes_back(store):
    data = pages(range(300)) + bytes(50 * PAGE) + os.urandom(300 * PAGE) + pages(range(10))
    point = take(store, data, files=(FileRecord("/bin/sim", 2**63, 5, 6, 7, b"id"),), warnings=("w",))
    assert restored(store, point) == data
    assert point.pages_total == 660
    assert point.pages_new == 600  # zero pages and the ten repeated ones cost nothing
    assert store.points() == [point]
    assert point.tasks == {42: 1000, 43: 1001}
    assert point.warnings == ("w",)
    assert store.files(point) == [FileRecord("/bin/sim", 2**63, 5, 6, 7, b"id")]
    with store.reader(point) as reader:
        assert reader.image_names() == ["manifest", "mm/42"]
        assert reader.image("mm/42") == b"m" * 500
        assert reader.runs("no such space") == []
        with pytest.raises(VerificationError, match="no image"):
            reader.image("nothing")


def test_every_point_of_a_chain_resolves_by_itself(store):
    data = bytearray(pages(range(600)))
    points = [take(store, data)]
    contents = [bytes(data)]
    for step in range(50):
        for number in (step, step * 7 % 600, 599 - step):
            data[number * PAGE : (number + 1) * PAGE] = page(number, step + 1)
        runs = [(n, 1) for n in sorted({step, step * 7 % 600, 599 - step})]
        points.append(take(store, data, points[-1], runs=runs))
        contents.append(bytes(data))
    for point, content in zip(points, contents, strict=True):
        assert restored(store, point) == content
    chains = [refs.chain for refs in store.catalog.blobs().values()]
    assert max(chains) <= 32
    assert chains.count(0) < 10
    assert store.verify().ok
    assert len(store.index.names()) < 8  # merged by size, not one per take


def test_an_idle_increment_is_small_on_disk(store):
    data = pages(range(16384 // 8))
    point = take(store, data)

    def on_disk():
        return sum(
            os.stat(os.path.join(folder, name)).st_blocks * 512
            for folder, _, names in os.walk(store.path)
            for name in names
        )

    before = on_disk()
    for step in range(16):
        data = page(3, step) + data[PAGE:]
        point = take(
            store, data, point, runs=[(0, 1)], images={"manifest": b"%d" % step, "x": os.urandom(10)}
        )
    assert (on_disk() - before) / 16 <= 16 * 1024


def test_pages_known_to_any_job_are_not_stored_again(store):
    data = pages(range(500))
    take(store, data)
    other = take(store, data, job="other", space="mm/7")
    assert other.pages_new == 0
    assert other.bytes_stored < 4096
    assert restored(store, other, "mm/7") == data


def test_a_later_put_wins(store):
    first, second = pages(range(600)), pages(range(600), salt=1)
    with store.writer("sim") as writer:
        writer.put("mm/42", [(0, 600)], Memory(first))
        writer.put("mm/42", [(100, 300)], Memory(second))
        writer.put("mm/42", [(200, 1)], Memory(first))
        writer.drain()
        writer.close_space("mm/42", [(0, 600)])
        point = writer.commit(PointMeta(**META))
    expected = bytearray(first)
    expected[100 * PAGE : 400 * PAGE] = second[100 * PAGE : 400 * PAGE]
    expected[200 * PAGE : 201 * PAGE] = first[200 * PAGE : 201 * PAGE]
    assert restored(store, point) == bytes(expected)


def test_waiting_for_all_but_the_last_pages(store):
    """What may be left unread is no more than was said, and is there in the end."""
    data = pages(range(3000))

    class Slow(Memory):
        nr_read = 0

        def read_into(self, runs, buffer):
            super().read_into(runs, buffer)
            Slow.nr_read += sum(count for _, count in runs)

    with store.writer("sim") as writer:
        writer.put("mm/42", [(0, 3000)], Slow(data))
        writer.drain(hurry=False, leave=1000)
        assert Slow.nr_read >= 2000
        writer.drain(hurry=False, leave=0)
        assert Slow.nr_read == 3000
        writer.close_space("mm/42", [(0, 3000)])
        point = writer.commit(PointMeta(**META))
    assert restored(store, point) == data


def test_pages_outside_present_are_dropped_and_missing_ones_refused(store):
    first = take(store, pages(range(20)))
    with store.writer("sim", first) as writer:
        writer.put("mm/42", [(3, 2)], Memory(pages(range(20), 1)))
        with pytest.raises(StoreError, match="neither dumped nor in the parent"):
            writer.close_space("mm/42", [(0, 21)])
        writer.close_space("mm/42", [(0, 2), (4, 1), (10, 5)])
        point = writer.commit(PointMeta(**META))
    with store.reader(point) as reader:
        assert reader.runs("mm/42") == [(0, 2), (4, 1), (10, 5)]
        assert reader.read("mm/42", [(4, 1), (3, 1), (14, 1)]) == page(4, 1) + bytes(PAGE) + page(14)


def test_one_space_is_made_out_of_another(store):
    """What fork shares: only what differs is read, and nothing that differs is left out."""
    mine, theirs = bytearray(pages(range(600))), bytearray(pages(range(600)))
    for number in (3, 4, 5, 70, 599):
        mine[number * PAGE : (number + 1) * PAGE] = page(number, 1)
    mine[9 * PAGE : 10 * PAGE] = theirs[10 * PAGE : 11 * PAGE] = bytes(PAGE)
    with store.writer("sim") as writer:
        for space, data in (("mm/1", theirs), ("mm/2", mine)):
            writer.put(space, [(0, 600)], Memory(bytes(data)))
        writer.drain()
        writer.close_space("mm/1", [(0, 600)])
        writer.close_space("mm/2", [(0, 300), (310, 290)])
        point = writer.commit(PointMeta(**META))
    with store.reader(point) as reader:
        write, drop = reader.changes("mm/2", "mm/1")
        assert write == [(3, 3), (10, 1), (70, 1), (599, 1)]
        assert drop == [(9, 1), (300, 10)]
        assert reader.changes("mm/1", "mm/1") == ([], [])
        assert reader.changes("mm/1", "nothing")[0] == [(0, 10), (11, 589)]
        got = {}

        def note(runs, data):
            at = 0
            for first, count in runs:
                for number in range(first, first + count):
                    got[number] = bytes(data[at : at + PAGE])
                    at += PAGE

        assert reader.fill("mm/2", note, [(2, 3), (5, 1), (9, 1), (300, 20)]) == 14
        wanted = [2, 3, 4, 5, *range(310, 320)]
        assert got == {number: bytes(mine[number * PAGE : (number + 1) * PAGE]) for number in wanted}
        assert reader.fill("mm/2", note, []) == 0


def test_a_space_that_is_not_closed_is_gone_and_one_put_must_be_closed(store):
    first = take(store, pages(range(20)))
    with store.writer("sim", first) as writer:
        writer.put("shmem/1", [(0, 5)], Memory(pages(range(5))))
        with pytest.raises(UsageError, match="not closed"):
            writer.commit(PointMeta(**META))
        writer.close_space("shmem/1", [(0, 5)])
        point = writer.commit(PointMeta(**META))
    with store.reader(point) as reader:
        assert reader.spaces() == ["shmem/1"]


def test_an_error_of_the_reader_comes_out_of_drain(store):
    class Bad:
        def read_into(self, runs, buffer):
            raise VerificationError("the job is gone")

    with store.writer("sim") as writer:
        writer.put("mm/42", [(0, 2000)], Bad())
        with pytest.raises(VerificationError, match="the job is gone"):
            writer.drain()
        with pytest.raises(VerificationError, match="the job is gone"):
            writer.commit(PointMeta(**META))
    assert store.points() == []
    assert os.listdir(store.packs_dir) == []


def test_a_writer_left_without_a_commit_leaves_nothing(store):
    with store.writer("sim") as writer:
        writer.put("mm/42", [(0, 600)], Memory(os.urandom(600 * PAGE)))
        writer.drain()
    assert os.listdir(store.packs_dir) == []
    assert store.points() == []


def test_names_of_points(store):
    one = take(store, pages(range(2)), point_id="aaaa" + "0" * 28)
    two = take(store, pages(range(2)), one, point_id="aaab" + "0" * 28)
    other = take(store, pages(range(2)), job="other", point_id="ccc" + "0" * 29)
    assert store.resolve("aaaa") == one
    assert store.resolve("latest") == other
    assert store.resolve("latest~2") == one
    assert store.resolve("sim") == two
    assert store.resolve("sim~1") == one
    assert store.resolve("latest", job="sim") == two
    for bad in ("aaa", "dddd", "sim~2", "latest~3", "nobody", ""):
        with pytest.raises(NoSuchPointError):
            store.resolve(bad)
    take(store, pages(range(2)), point_id="aaaa1" + "0" * 27)
    with pytest.raises(NoSuchPointError, match="2 points begin with aaaa"):
        store.resolve("aaaa")


def test_forgetting_relinks_children_and_prune_keeps_them_whole(store):
    data = bytearray(os.urandom(800 * PAGE))
    points, contents = [], []
    for step in range(12):
        fresh = os.urandom(700 * PAGE) if step else bytes(data[: 700 * PAGE])
        data[: 700 * PAGE] = fresh
        points.append(take(store, data, points[-1] if points else None, runs=[(0, 700)] if points else None))
        contents.append(bytes(data))
    store.forget(points[:5] + points[6:11])
    left = store.points()
    assert [point.parent for point in left] == [None, points[5].id]
    size = store.stats().bytes_packs
    dry = store.prune(dry_run=True)
    assert dry.packs_removed + dry.packs_repacked > 0
    assert store.stats().bytes_packs == size
    assert store.prune().bytes_freed > 0
    assert store.stats().bytes_packs < size / 3
    for number in (5, 11):
        assert restored(store, next(p for p in left if p.id == points[number].id)) == contents[number]
    assert store.verify().ok
    assert store.prune().bytes_freed == 0
    child = take(store, data, store.points()[-1], runs=[])
    assert child.pages_new == 0
    assert restored(store, child) == bytes(data)


def test_prune_repacks_and_rewrites_maps_and_images(store):
    def noise():
        return {"manifest": b"m" * 3000 + os.urandom(8)}

    data = bytearray(os.urandom(2000 * PAGE))
    points, contents = [take(store, data, images=noise())], [bytes(data)]
    for step in range(1, 5):
        data[step * 300 * PAGE : (step + 1) * 300 * PAGE] = os.urandom(300 * PAGE)
        points.append(take(store, data, points[-1], runs=[(step * 300, 300)], images=noise()))
        contents.append(bytes(data))
    images = [store.readers.images(refs.images) for refs in store.catalog.blobs().values()]
    store.forget(points[:-1])
    report = store.prune()
    assert report.packs_repacked >= 1
    assert restored(store, points[-1]) == contents[-1]
    assert store.readers.images(store.blob_refs(points[-1].id).images) == images[-1]
    assert store.verify().ok


def test_a_lock_that_a_dying_child_still_holds_is_waited_for(store):
    """A snap killed between a fork and the exec leaves one: nobody is at work, so nobody need be told to wait."""
    held = store.lock_job("job")
    with subprocess.Popen(["sleep", "0.2"], pass_fds=[held._fd]):
        held.release()
        with pytest.raises(LockedError):
            store.lock_job("job", wait_s=0)
        store.lock_job("job").release()


def test_locks(store):
    with store.lock_job("a/b"), pytest.raises(LockedError, match="a/b"):
        store.lock_job("a/b")
    store.lock_job("a/b").release()
    point = take(store, pages(range(2)))
    with store.reader(point), pytest.raises(LockedError):
        store.prune(wait_s=0)
    store.prune(wait_s=0)


def test_a_store_is_private(tmp_path):
    old = os.umask(0)
    try:
        with Store.open(tmp_path / "new", create=True) as store:
            take(store, pages(range(5)))
    finally:
        os.umask(old)
    for folder, _, names in os.walk(tmp_path / "new"):
        assert os.stat(folder).st_mode & 0o777 == 0o700
        for name in names:
            assert os.stat(os.path.join(folder, name)).st_mode & 0o077 == 0, name
    (tmp_path / "new").chmod(0o750)
    with pytest.raises(PermissionDeniedError, match="others have access"):
        Store.open(tmp_path / "new")


def test_what_is_no_store_is_refused(tmp_path):
    with pytest.raises(NoStoreError, match="no store here"):
        Store.open(tmp_path / "absent")
    (tmp_path / "file").write_text("x")
    with pytest.raises(NoStoreError, match="not a directory"):
        Store.open(tmp_path / "file")
    (tmp_path / "full").mkdir(mode=0o700)
    (tmp_path / "full" / "thesis.txt").write_text("x")
    with pytest.raises(NoStoreError, match="not empty"):
        Store.open(tmp_path / "full", create=True)
    with pytest.raises(NoStoreError, match="not a store"):
        Store.open(tmp_path / "full")
    (tmp_path / "empty").mkdir(mode=0o755)
    Store.open(tmp_path / "empty", create=True).close()
    mark = tmp_path / "empty" / "STORE"
    mark.write_text(mark.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(NoStoreError, match="format 2"):
        Store.open(tmp_path / "empty")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: chown")
def test_somebody_elses_store_is_refused(tmp_path):
    Store.open(tmp_path / "s", create=True).close()
    os.chown(tmp_path / "s", 4711, 4711)
    with pytest.raises(PermissionDeniedError, match="belongs to uid 4711"):
        Store.open(tmp_path / "s")


def test_imports_are_lazy(tmp_path):
    Store.open(tmp_path / "s", create=True).close()
    code = (
        "import sys, store\n"
        "heavy = {'numpy', 'sqlalchemy', 'alembic', 'zstandard', 'sqlalchemy.orm'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "s = store.Store.open(sys.argv[1]); s.points(); s.close()\n"
        "heavy = {'numpy', 'alembic', 'sqlalchemy.orm'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "s")], check=True)


def test_several_may_make_the_store_at_once(tmp_path):
    code = "import sys, store; print(store.Store.open(sys.argv[1], create=True).id)"
    command = [sys.executable, "-c", code, str(tmp_path / "s")]
    children = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    assert len({child.communicate()[0] for child in children}) == 1
    assert [child.returncode for child in children] == [0] * 4


def test_jobs_may_be_taken_at_once(tmp_path):
    with Store.open(tmp_path / "s", create=True) as store:
        data = {job: os.urandom(300 * PAGE) for job in ("a", "b", "c")}
        threads = [
            threading.Thread(target=take, args=(store, data[job]), kwargs={"job": job}) for job in data
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for job, content in data.items():
            assert restored(store, store.resolve(job)) == content
        assert store.verify().ok


@pytest.mark.parametrize("number", [0x10000, 0x10001, 0x7F01FFFE, 0, 0x7FFFFFFE])
def test_any_pack_number_will_do(store, monkeypatch, number):
    """A pack's number stands where a provisional location has the worker's."""
    monkeypatch.setattr("store.packset.secrets.randbelow", lambda _limit: number)
    data = os.urandom(1500 * PAGE)
    assert restored(store, take(store, data)) == data


@pytest.mark.parametrize("nr_processors", [1, 3, 64])
def test_any_number_of_processors(store, monkeypatch, nr_processors):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(nr_processors)))
    names = []
    real = threading.Thread.start

    def starting(self):
        names.append(self.name)
        real(self)

    monkeypatch.setattr(threading.Thread, "start", starting)
    data = os.urandom(6000 * PAGE) + pages(range(3000))
    point = take(store, data)
    assert restored(store, point) == data
    assert sum(name.startswith("snap-store") for name in names) == {1: 2, 3: 2, 64: 8}[nr_processors]
    assert sum(name == "snap-fill" for name in names) >= {1: 1, 3: 2, 64: 7}[nr_processors]
