"""Bounds: how many points a query takes, how much a hostile map may allocate, what flags and sizes are refused."""

import errno
import gc
import os
import struct

import numpy as np
import pytest

from images.codec import KINDS
from snapshotter.base.errors import LockedError, StoreError, VerificationError
from store import Store, imageset, native, pagemap
from store.locks import lock_store
from store.pack import MAX_BLOB_BYTES, PackFile, PackWriter
from store.segments import SegmentPool
from tests.unit.store_helpers import page, take
from tests.unit.test_store_pack import KEYS, write_pack


@pytest.fixture
def store(tmp_path):
    with Store.open(tmp_path / "store", create=True) as opened:
        yield opened


def test_more_points_than_a_statement_has_parameters(store, monkeypatch):
    """SQLite takes 250,000 here and 32,766 elsewhere; a limit of 5 stands for either."""
    import sqlalchemy as sa

    from store import catalog

    monkeypatch.setattr(catalog, "_IDS_AT_A_TIME", 3)
    first = take(store, page(1))
    points = [first, *(take(store, page(1), first, runs=[], job=f"job{i % 2}") for i in range(12))]

    def limited(connection, _record):
        connection.setlimit(9, 5)  # SQLITE_LIMIT_VARIABLE_NUMBER

    sa.event.listen(store.catalog._engine, "connect", limited)
    assert store.points("job0") == points[1::2]
    assert store.points() == points
    some = [point.id for point in reversed(points)]
    assert store.catalog.points(ids=[*some, some[0]]) == points
    assert list(store.catalog.blobs(some)) == [point.id for point in points]
    assert store.verify(points).ok
    assert store.catalog.points(ids=[]) == []


def space_of(nr_pages):
    """A map's space of that many zero pages, in 20 bytes."""
    return struct.pack("<HHII", 4, 0, 1, 0), struct.pack("<Q", 0), struct.pack("<I", nr_pages), bytes(8)


def hostile(nr_spaces, nr_pages):
    parts = [struct.pack("<8sIIII", b"SNAPMAPS", 1, 0, nr_spaces, 0)]
    for number in range(nr_spaces):
        head, first, count, loc = space_of(nr_pages)
        parts += [head, b"%04d" % number, first, count, loc]
    return b"".join(parts)


def test_a_map_of_many_spaces_is_bounded_as_a_whole(monkeypatch):
    monkeypatch.setattr(pagemap, "MAX_RESOLVED_PAGES", 1000)
    assert sum(len(space.pages) for space in pagemap.decode(hostile(10, 100), None).values()) == 1000
    with pytest.raises(pagemap.BadMapError, match="out of bounds"):
        pagemap.decode(hostile(11, 100), None)


def test_a_chain_that_only_ever_adds_is_bounded(monkeypatch):
    monkeypatch.setattr(pagemap, "MAX_RESOLVED_PAGES", 1000)
    base = pagemap.decode(hostile(1, 900), None)
    pages = np.arange(900, 1100, dtype="<u8")
    more = {"0000": pagemap.Space(np.concatenate((base["0000"].pages, pages)), np.zeros(1100, dtype="<u8"))}
    with pytest.raises(pagemap.BadMapError, match="more pages"):
        pagemap.decode(pagemap.encode_delta(more, base), base)


def test_unknown_flags_of_maps_and_image_sets_are_refused():
    whole = bytearray(hostile(1, 5))
    for at in (20, 24 + 2):
        bad = bytearray(whole)
        bad[at] = 1
        with pytest.raises(pagemap.BadMapError):
            pagemap.decode(bytes(bad), None)
    images = bytearray(imageset.encode({"a": b"b"}))
    images[16 + 2] = 1
    with pytest.raises(imageset.BadImageSetError, match="flags"):
        imageset.decode(bytes(images))


@pytest.mark.parametrize("where", ["header", "frame", "trailer"])
def test_unknown_flags_of_packs_are_refused(tmp_path, where):
    path = write_pack(tmp_path)
    data = bytearray(path.read_bytes())
    start = struct.unpack_from("<Q", data, len(data) - 64 + 24)[0]
    at = {"header": 12, "frame": start + 28, "trailer": len(data) - 64 + 44}[where]
    data[at] = 1
    data[48:64] = native.checksum(KEYS.frames, data[:48])
    data[-16:] = native.checksum(KEYS.frames, data[start:-16])
    path.write_bytes(data)
    with pytest.raises(VerificationError, match=r"flags|footer"):
        PackFile(tmp_path, 0x1234, KEYS).frame(0)


def test_an_image_may_be_as_large_as_a_store_takes():
    assert max(kind.max_bytes for kind in KINDS) == MAX_BLOB_BYTES


def test_a_pack_that_cannot_be_begun_leaves_nothing(tmp_path, monkeypatch):
    before = len(os.listdir("/proc/self/fd"))

    def full(*_args):
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fchmod", full)
        with pytest.raises(StoreError, match="ENOSPC"):
            PackWriter(tmp_path, 5, KEYS, SegmentPool())
    with monkeypatch.context() as patch:
        patch.setattr(SegmentPool, "take", lambda _self: full())
        with pytest.raises(OSError, match="full"):
            PackWriter(tmp_path, 5, KEYS, SegmentPool())
    assert os.listdir(tmp_path) == []
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_a_lock_that_cannot_be_made_says_why(tmp_path, monkeypatch, code):
    real = os.open

    def refusing(path, flags, mode=0o777, **kwargs):
        if flags & os.O_CREAT:
            raise OSError(code, os.strerror(code))
        return real(path, flags, mode, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refusing)
        with pytest.raises(StoreError, match=errno.errorcode[code]) as caught:
            lock_store(tmp_path, exclusive=False)
        assert caught.value.hint
    (tmp_path / "store").touch()
    monkeypatch.setattr(os, "open", refusing)
    lock_store(tmp_path, exclusive=False).release()  # one that exists can be read


def test_a_lock_that_was_not_got_closes_its_descriptor_once(tmp_path):
    with lock_store(tmp_path, exclusive=True):
        with pytest.raises(LockedError) as caught:
            lock_store(tmp_path, exclusive=True, wait_s=0)
        other = os.open("/dev/null", os.O_RDONLY)  # gets the number that the lock had
        del caught
        gc.collect()
        os.close(other)  # EBADF if the lock closed it a second time
