"""A pack's bytes on their way to the disk: every layout of pieces, every file system, a disk that lags or fails."""

import errno
import fcntl
import os
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from snapshotter.base.errors import StoreError
from store import Store, native, segments
from store.pack import CODEC_RAW, KIND_IMAGES, PackKeys
from store.packset import PackReaders, PackSet
from store.segments import SEGMENT_BYTES, SegmentedFile, SegmentPool
from tests.unit.store_helpers import restored, take

KEYS = PackKeys(bytes(16), b"f" * 32, b"p" * 32)


def written(path, sizes, rest=b"end"):
    """Pieces of these sizes, written as a pack set would. Returns (what the file holds, what it should)."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    pool = SegmentPool()
    file = SegmentedFile(fd, pool)
    expected, offset = b"", 0
    for size in sizes:
        data = os.urandom(size)
        file.make_room(offset + size)
        assert file.copy_in(data, offset, KEYS.frames) == native.checksum(KEYS.frames, data)
        for number in file.filled(offset, size):
            file.write(number)
            file.drop(number)
        expected += data
        offset += size
    file.finish(offset, rest)
    file.drop_all()
    os.close(fd)
    assert not pool.exhausted
    return path.read_bytes(), expected + rest


@pytest.mark.parametrize(
    "sizes",
    [
        [1],
        [SEGMENT_BYTES],
        [SEGMENT_BYTES - 1, 1],
        [SEGMENT_BYTES - 1, 2],
        [SEGMENT_BYTES * 3 + 7, 5],
        [100, SEGMENT_BYTES, SEGMENT_BYTES, 1],
    ],
)
def test_what_is_put_is_what_lies_there(tmp_path, sizes):
    found, expected = written(tmp_path / "file", sizes)
    assert found == expected


@settings(max_examples=20, deadline=None)
@given(sizes=st.lists(st.integers(0, 3 * SEGMENT_BYTES), max_size=6))
def test_any_pieces(tmp_path_factory, sizes):
    found, expected = written(tmp_path_factory.mktemp("file") / "file", sizes)
    assert found == expected


@pytest.mark.parametrize("when", ["fcntl", "pwrite"])
def test_a_file_system_without_direct_writes(tmp_path, monkeypatch, when):
    """Some say so when the flag is set, some when it is used."""
    real_fcntl, real_pwrite = fcntl.fcntl, os.pwrite
    refused = []

    def no_flag(fd, command, argument=0):
        if command == fcntl.F_SETFL and argument & os.O_DIRECT:
            refused.append(command)
            raise OSError(errno.EINVAL, "no")
        return real_fcntl(fd, command, argument)

    def no_write(fd, data, offset):
        if real_fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            refused.append(offset)
            raise OSError(errno.EINVAL, "no")
        return real_pwrite(fd, data, offset)

    if when == "fcntl":
        monkeypatch.setattr(segments.fcntl, "fcntl", no_flag)
    else:
        monkeypatch.setattr(os, "pwrite", no_write)
    found, expected = written(tmp_path / "file", [SEGMENT_BYTES * 2 + 5])
    assert found == expected
    assert len(refused) <= 1, "once is enough"
    assert refused or when == "pwrite"  # where the flag cannot be set either


def test_full_segments_are_written_past_the_page_cache_and_the_rest_is_not(tmp_path, monkeypatch):
    flags = []
    real = os.pwrite

    def noting(fd, data, offset):
        flags.append((offset, bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT)))
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", noting)
    written(tmp_path / "file", [SEGMENT_BYTES + 5])
    assert flags in ([(0, True), (SEGMENT_BYTES, False)], [(0, False), (SEGMENT_BYTES, False)])


def test_appending_waits_for_a_disk_that_lags(tmp_path, monkeypatch):
    """No more memory than a few segments, whatever is appended meanwhile; and all of it is there in the end."""
    go = threading.Event()
    in_use = []
    real = SegmentedFile.write

    def slow(self, number):
        assert go.wait(30)
        in_use.append(len(self._buffers))
        real(self, number)

    monkeypatch.setattr(SegmentedFile, "write", slow)
    packs = PackSet(tmp_path, KEYS, frozenset())
    data = [os.urandom(SEGMENT_BYTES // 2) for _ in range(40)]
    refs = []
    threads = [
        threading.Thread(
            target=lambda part=part: refs.extend(
                (packs.append(piece, raw=len(piece), codec=CODEC_RAW, kind=KIND_IMAGES), piece)
                for piece in part
            )
        )
        for part in (data[:20], data[20:])
    ]
    for thread in threads:
        thread.start()
    threads[0].join(0.2)
    assert len(refs) < len(data)
    go.set()
    for thread in threads:
        thread.join()
    packs.publish()
    assert max(in_use) <= segments.MOST_SEGMENTS + len(threads)
    readers = PackReaders(tmp_path, KEYS)
    assert len(refs) == len(data)
    for ref, piece in refs:
        assert readers.blob(ref, KIND_IMAGES) == piece


def test_nobody_waits_for_a_disk_that_failed(tmp_path, monkeypatch):
    def full(_self, _number):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(SegmentedFile, "write", full)
    packs = PackSet(tmp_path, KEYS, frozenset())
    piece = os.urandom(SEGMENT_BYTES)
    with pytest.raises(Exception, match="ENOSPC"):
        for _ in range(4 * segments.MOST_SEGMENTS):
            packs.append(piece, raw=len(piece), codec=CODEC_RAW, kind=KIND_IMAGES)
    with pytest.raises(Exception, match="ENOSPC"):
        packs.publish()
    packs.discard()
    assert os.listdir(tmp_path) == []


def test_nobody_waits_for_room_that_a_failure_keeps(tmp_path, monkeypatch):
    """A frame that was reserved and never put keeps its segments incomplete."""
    packs = PackSet(tmp_path, KEYS, frozenset())
    piece = os.urandom(SEGMENT_BYTES)
    packs.append(piece[: SEGMENT_BYTES // 2], raw=SEGMENT_BYTES // 2, codec=CODEC_RAW, kind=KIND_IMAGES)

    def failing(*_args, **_kwargs):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(SegmentPool, "take", failing)
        with pytest.raises(MemoryError):
            packs.append(piece, raw=len(piece), codec=CODEC_RAW, kind=KIND_IMAGES)
    for _ in range(2 * segments.MOST_SEGMENTS):
        with pytest.raises(StoreError):
            packs.append(piece, raw=len(piece), codec=CODEC_RAW, kind=KIND_IMAGES)
    packs.discard()
    assert os.listdir(tmp_path) == []


def test_a_blob_larger_than_all_segments(tmp_path):
    packs = PackSet(tmp_path, KEYS, frozenset())
    data = os.urandom((segments.MOST_SEGMENTS + 3) * SEGMENT_BYTES + 77)
    ref = packs.append(data, raw=len(data), codec=CODEC_RAW, kind=KIND_IMAGES)
    packs.publish()
    assert PackReaders(tmp_path, KEYS).blob(ref, KIND_IMAGES) == data


def test_copy_stays_inside(tmp_path):
    first, second = native.Room(bytearray(4096)), native.Room(bytearray(4096))
    secret, data = KEYS.frames, b"abcdef"
    assert native.put(secret, data, [(first, 4092, 4), (second, 0, 2)]) == native.checksum(secret, data)
    assert (first.buffer[4092:], second.buffer[:3]) == (b"abcd", b"ef\0")
    for at in (-1, 4091):
        with pytest.raises(ValueError, match="too small"):
            native.put(secret, data, [(first, at, 6)])
    with pytest.raises(ValueError, match="another size"):
        native.put(secret, data, [(first, 0, 5)])


def test_a_take_of_many_segments(tmp_path):
    data = os.urandom(12 << 20)
    with Store.open(tmp_path / "store", create=True) as store:
        assert restored(store, take(store, data)) == data
