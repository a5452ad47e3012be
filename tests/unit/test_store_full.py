"""A disk without a free byte: forget and prune work all the same. A small tmpfs in a mount namespace of the test's own."""

import ctypes
import errno
import os
import traceback
from pathlib import Path

import pytest

from snapshotter.base.errors import StoreError
from store import Store, reserve
from store.files import NoSpaceError, store_error
from tests.unit.store_helpers import PAGE, page, restored, take

pytestmark = pytest.mark.requires("root")
CLONE_NEWNS, MS_REC, MS_PRIVATE = 0x20000, 0x4000, 1 << 18
DISK_BYTES = 24 << 20


def noise(number, nr_pages=64):
    """Pages that do not compress."""
    import random

    return random.Random(number).randbytes(nr_pages * PAGE)


def fill(folder):
    """To the last byte: not even an empty file's name need be new."""
    fd = os.open(folder / "ballast", os.O_WRONLY | os.O_CREAT)
    for size in (1 << 20, 4096, 1):
        try:
            while True:
                os.write(fd, bytes(size))
        except OSError:
            continue
    os.close(fd)
    assert os.statvfs(folder).f_bavail == 0


@pytest.fixture
def on_a_small_disk(tmp_path):
    """on_a_small_disk(work): runs work(folder) in a child whose `folder` is a tmpfs; fails with it."""

    def run(work):
        child = os.fork()
        if child == 0:
            try:
                libc = ctypes.CDLL(None, use_errno=True)
                assert libc.unshare(CLONE_NEWNS) == 0
                assert libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None) == 0
                assert (
                    libc.mount(b"t", os.fsencode(tmp_path), b"tmpfs", 0, b"size=%d,mode=755" % DISK_BYTES)
                    == 0
                )
                work(Path(tmp_path))
                os._exit(0)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

    return run


def test_forget_and_prune_without_a_free_byte(on_a_small_disk):
    def work(folder):
        with Store.open(folder / "s", create=True) as store:
            points = [take(store, noise(number), job=f"job{number}") for number in range(12)]
            assert (folder / "s" / reserve.NAME).stat().st_blocks * 512 >= reserve.SIZE_BYTES
            fill(folder)
            with pytest.raises(StoreError):
                take(store, noise(99), job="more")
            store.forget(points[:6])
            assert [point.id for point in store.points()] == [point.id for point in points[6:]]
            report = store.prune()
            assert report.packs_removed >= 6
            assert report.bytes_freed > 6 * 64 * PAGE
            assert not report.warnings
            for point, number in zip(points[6:], range(6, 12), strict=True):
                assert restored(store, point) == noise(number)
            assert (folder / "s" / reserve.NAME).stat().st_size >= reserve.SIZE_BYTES
            take(store, noise(100, 16), job="again")
            assert store.verify().ok

    on_a_small_disk(work)


def test_packs_half_alive_are_repacked_without_a_free_byte(on_a_small_disk):
    """Nothing dies whole: room must come from the reserve, then from what the first copies free."""

    def work(folder):
        with Store.open(folder / "s", create=True) as store:
            firsts, seconds, data = [], [], []
            for number in range(5):
                whole = noise(number, 400)
                firsts.append(take(store, whole, job=f"job{number}"))
                data.append(whole[: 100 * PAGE])
                seconds.append(take(store, data[-1], firsts[-1], runs=[], job=f"job{number}"))
            fill(folder)
            store.forget(firsts)
            report = store.prune()
            assert report.packs_repacked >= 5, report
            assert report.bytes_freed > 5 * 250 * PAGE, report
            for point, kept in zip(seconds, data, strict=True):
                assert restored(store, point) == kept
            assert store.verify().ok

    on_a_small_disk(work)


def test_forget_works_where_the_whole_reserve_did_not_fit(on_a_small_disk):
    """A take that leaves less than SIZE_BYTES leaves a smaller reserve; one that leaves nothing fails."""

    def work(folder):
        with Store.open(folder / "s", create=True) as store:
            point = take(store, noise(1), job="one")
            (folder / "s" / reserve.NAME).unlink()
            free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
            with open(folder / "other", "wb") as file:
                os.posix_fallocate(file.fileno(), 0, free - (1200 << 10))
            second = take(store, noise(2, 16), job="one")
            assert (folder / "s" / reserve.NAME).stat().st_size >= reserve.LEAST_BYTES
            fill(folder)
            store.forget([point, second])
            assert store.prune().bytes_freed > 0

    on_a_small_disk(work)


def test_a_take_does_not_use_up_the_room_for_forgetting(on_a_small_disk):
    def work(folder):
        with Store.open(folder / "s", create=True) as store:
            point = take(store, noise(1), job="one")
            (folder / "s" / reserve.NAME).unlink()
            free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
            with open(folder / "other", "wb") as file:
                os.posix_fallocate(file.fileno(), 0, free - (400 << 10))
            with pytest.raises(StoreError):
                take(store, noise(2, 128), job="one")
            fill(folder)
            store.forget([point])
            assert store.prune().bytes_freed > 0

    on_a_small_disk(work)


def test_forget_without_any_room_does_not_advise_to_forget(tmp_path):
    def work():
        raise NoSpaceError("full", hint="run `snap forget`")

    with pytest.raises(NoSpaceError) as caught:
        reserve.use(tmp_path, work)
    assert "forget" not in caught.value.hint
    assert "by other means" in caught.value.hint


def test_a_limit_of_file_sizes_is_named():
    assert "ulimit -f" in store_error(OSError(errno.EFBIG, ""), "cannot write", "/s").hint


def test_a_store_without_a_reserve_works(tmp_path):
    with Store.open(tmp_path / "s", create=True) as store:
        point = take(store, page(1))
        (tmp_path / "s" / reserve.NAME).unlink()
        store.forget([point])
        store.prune()
    assert (tmp_path / "s" / reserve.NAME).exists()
