"""Frames as byte planes (parasite_c/planes.c, FORMAT.md "Frame of codec 4"): there and back, chosen where it pays, damage."""

import os
import random

import numpy as np
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from parasite_c._native import lib

from snapshotter.base.errors import VerificationError
from store import Store, native
from store.compress import FrameCompressor
from store.pack import CODEC_RAW, CODEC_ZSTD, CODEC_ZSTD_PLANES, KIND_IMAGES, KIND_PAGES, PackWriter
from store.pack import PackFile as Pack
from store.segments import SegmentPool
from tests.unit.store_helpers import KEYS, PAGE, one_frame, restored, take


@pytest.fixture
def store(tmp_path):
    with Store.open(tmp_path / "store", create=True) as opened:
        yield opened


@pytest.fixture(params=[0, 1], ids=["sse2", "avx512"])
def variant(request):
    if lib.snap_planes_select(request.param) < 0:
        pytest.skip("needs a CPU with this vector unit")
    yield request.param
    if lib.snap_planes_select(1) < 0:
        lib.snap_planes_select(0)


def planes_by_the_format(pages):
    return np.frombuffer(pages, dtype=np.uint8).reshape(-1, 8).T.tobytes()


def as_planes(pages):
    planes = bytearray(len(pages))
    native.to_planes(planes, pages)
    return bytes(planes)


def numbers(nr_pages, seed=1):
    """A random walk of floating point numbers: neighbours differ in their low bytes."""
    return np.cumsum(np.random.default_rng(seed).standard_normal(nr_pages * 512)).tobytes()


def ascending(nr_pages):
    """Addresses that grow by some bytes each."""
    return (
        0x7F3A_5C00_0000 + 4 * np.cumsum(np.random.default_rng(2).integers(1, 60, nr_pages * 512))
    ).tobytes()


def heap(nr_pages):
    """Small objects: a type's address, a count, a length, an address."""
    words = np.empty((nr_pages * 128, 4), dtype="<u8")
    words[:] = (1, 0x7F3A_5C00_1000, 3, 0)
    words[:, 3] = 0x7F3A_6000_0000 + 32 * np.random.default_rng(3).permutation(len(words))
    return words.tobytes()


def text(nr_pages):
    chance = random.Random(1)
    words = ["the", "job", "goes", "on", "as", "if", "it", "had", "never", "been", "touched", "snapshot"]
    whole = " ".join(chance.choice(words) + str(chance.randrange(50)) for _ in range(nr_pages * 700))
    return whole.encode()[: nr_pages * PAGE]


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("nr_pages", [1, 2, 7, 256, 512])
def test_planes_are_those_of_the_format(nr_pages):
    pages = os.urandom(nr_pages * PAGE)
    planes = as_planes(pages)
    assert planes == planes_by_the_format(pages)
    for slots in (range(nr_pages), [0], [nr_pages - 1, 0], [nr_pages // 2] * 3, []):
        wanted = b"".join(pages[slot * PAGE : (slot + 1) * PAGE] for slot in slots)
        assert native.from_planes(planes, np.array(list(slots), dtype=np.uint32)) == wanted


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="slot"):
        native.from_planes(bytes(2 * PAGE), np.array([0, 2], dtype=np.uint32))
    with pytest.raises(ValueError, match="whole pages"):
        native.from_planes(bytes(PAGE + 1), np.array([0], dtype=np.uint32))
    with pytest.raises(ValueError, match="whole pages"):
        native.to_planes(bytearray(PAGE), bytes(2 * PAGE))


def test_numbers_go_as_planes_and_text_as_it_is():
    compressor = FrameCompressor()
    codec, data = compressor.pages(memoryview(numbers(256)))
    assert codec == CODEC_ZSTD_PLANES
    assert len(data) < len(FrameCompressor()._context(-1).compress(numbers(256))) * 0.97
    assert FrameCompressor().pages(memoryview(text(256)))[0] == CODEC_ZSTD
    assert FrameCompressor().pages(memoryview(os.urandom(256 * PAGE)))[0] == CODEC_RAW
    # What does not compress in one way is tried in the other one at once.
    for _ in range(3):
        assert [compressor.pages(memoryview(text(256)))[0] for _ in range(2)] == [CODEC_ZSTD] * 2
        assert [compressor.pages(memoryview(numbers(256)))[0] for _ in range(2)] == [CODEC_ZSTD_PLANES] * 2
        assert [compressor.pages(memoryview(os.urandom(256 * PAGE)))[0] for _ in range(2)] == [CODEC_RAW] * 2


def test_planes_are_tried_again_when_frames_begin_to_compress_otherwise():
    compressor = FrameCompressor()
    mixed = memoryview(bytes(128 * PAGE) + text(128))
    assert compressor.pages(mixed)[0] == CODEC_ZSTD
    found = [compressor.pages(memoryview(text(256)))[0] for _ in range(4)]
    assert found == [CODEC_ZSTD] * 4
    codecs = [compressor.pages(memoryview(ascending(256)))[0] for _ in range(6)]
    assert codecs[0] == CODEC_ZSTD
    assert codecs[-1] == CODEC_ZSTD_PLANES


def test_the_faster_level_where_it_costs_little():
    """Of numbers it makes about as little, of a heap half as much again."""
    for memory, limit in ((numbers(256), 1.1), (heap(256), 1.0)):
        planes = as_planes(memory)
        compressor = FrameCompressor()
        best = min(len(compressor._context(-1).compress(one)) for one in (memory, planes))
        assert len(compressor.pages(memoryview(memory))[1]) <= best * limit
        assert len(compressor.pages(memoryview(memory))[1]) <= best * limit


def test_small_frames_go_as_they_are():
    assert FrameCompressor().pages(memoryview(ascending(20)))[0] == CODEC_ZSTD


def test_a_point_of_numbers(store):
    data = bytearray(numbers(2000) + text(600) + os.urandom(300 * PAGE))
    first = take(store, data)
    assert restored(store, first) == bytes(data)
    data[100 * PAGE : 101 * PAGE] = os.urandom(PAGE)
    second = take(store, data, first, runs=[(100, 1)])
    with store.reader(second) as reader:
        assert reader.read("mm/42", [(0, 1), (99, 3), (1999, 2)]) == bytes(
            data[:PAGE] + data[99 * PAGE : 102 * PAGE] + data[1999 * PAGE : 2001 * PAGE]
        )
    store.forget([first.id])
    store.prune()
    assert restored(store, second) == bytes(data)
    assert not store.verify().damage


def test_slots_of_a_frame(tmp_path):
    pages = numbers(256)
    codec, stored = FrameCompressor().pages(memoryview(pages))
    pack = one_frame(tmp_path, stored, codec, 256)
    assert pack.read(0, KIND_PAGES) == pages
    for slots in ([0], [255, 3], [10, 11, 12]):
        data, where = pack.read_pages(0, np.array(slots, dtype=np.uint32))
        for slot, at in zip(slots, where.tolist(), strict=True):
            assert data[at * PAGE : (at + 1) * PAGE] == pages[slot * PAGE : (slot + 1) * PAGE]
    with pytest.raises(VerificationError, match="does not have"):
        pack.read_pages(0, np.array([256], dtype=np.uint32))


def test_a_blob_is_never_in_planes(tmp_path):
    pack = PackWriter(tmp_path, 0x1234, KEYS, SegmentPool())
    stored = zstandard.compress(bytes(PAGE))
    number, offset = pack.reserve(len(stored))
    pack.put_frame(
        number, offset, stored, raw=PAGE, codec=CODEC_ZSTD_PLANES, kind=KIND_IMAGES, base=None, page_keys=b""
    )
    pack.filled(offset, len(stored))
    pack.seal()
    with pytest.raises(VerificationError, match="coded as pages"):
        Pack(tmp_path, 0x1234, KEYS).read(0, KIND_IMAGES)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_forged_planes_are_refused_or_whole(tmp_path_factory, data):
    stored = bytearray(FrameCompressor().pages(memoryview(numbers(64)))[1])
    for _ in range(data.draw(st.integers(1, 4))):
        stored[data.draw(st.integers(0, len(stored) - 1))] = data.draw(st.integers(0, 255))
    del stored[data.draw(st.integers(0, len(stored))) or len(stored) :]
    nr_pages = data.draw(st.sampled_from([64, 64, 63, 65, 512]))
    pack = one_frame(tmp_path_factory.mktemp("pack"), bytes(stored), CODEC_ZSTD_PLANES, nr_pages)
    try:
        assert len(pack.read(0, KIND_PAGES)) == nr_pages * PAGE
    except VerificationError as error:
        assert "frame 0" in error.where
