"""Packs, key tables and the page hash: golden bytes, reference vectors, damage."""

import gc
import os
import random
import struct

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from parasite_c._native import ffi, lib

from snapshotter.base.errors import VerificationError
from store import keytable, native
from store.compress import FrameCompressor
from store.pack import (
    CODEC_RAW,
    CODEC_ZSTD,
    CODEC_ZSTD_PAGES,
    KIND_IMAGES,
    KIND_PAGES,
    PackFile,
    PackWriter,
    location,
    pack_name,
)
from store.segments import SegmentPool
from tests.unit.store_helpers import KEYS, one_frame

KEY = b"whats the Elvish word for friend"
# Keyed BLAKE3 of bytes 0, 1, ... 250, 0, ...: the lengths and key of the reference's test vectors.
VECTORS = [
    (0, "92b2b75604ed3c761f9d6f62392c8a9227ad0ea3f09573e783f1498a4ed60d26"),
    (1, "6d7878dfff2f485635d39013278ae14f1454b8c0a3a2d34bc1ab38228a80c95b"),
    (63, "bb1eb5d4afa793c1ebdd9fb08def6c36d10096986ae0cfe148cd101170ce37ae"),
    (64, "ba8ced36f327700d213f120b1a207a3b8c04330528586f414d09f2f7d9ccb7e6"),
    (65, "c0a4edefa2d2accb9277c371ac12fcdbb52988a86edc54f0716e1591b4326e72"),
    (1023, "c951ecdf03288d0fcc96ee3413563d8a6d3589547f2c2fb36d9786470f1b9d6e"),
    (1024, "75c46f6f3d9eb4f55ecaaee480db732e6c2105546f1e675003687c31719c7ba4"),
    (1025, "357dc55de0c7e382c900fd6e320acc04146be01db6a8ce7210b7189bd664ea69"),
    (2048, "879cf1fa2ea0e79126cb1063617a05b6ad9d0b696d0d757cf053439f60a99dd1"),
    (2049, "9f29700902f7c86e514ddc4df1e3049f258b2472b6dd5267f61bf13983b78dd5"),
    (4096, "befc660aea2f1718884cd8deb9902811d332f4fc4a38cf7c7300d597a081bfc0"),
    (5120, "2c493e48e9b9bf31e0553a22b23503c0a3388f035cece68eb438d22fa1943e20"),
    (31744, "efa53b389ab67c593dba624d898d0f7353ab99e4ac9d42302ee64cbf9939a419"),
    (102400, "1c35d1a5811083fd7119f5d5d1ba027b4d01c0c6c49fb6ff2cf75393ea5db4a7"),
]


@pytest.fixture(params=[0, 1, 2], ids=["sse2", "avx2", "avx512"])
def variant(request):
    best = {"sse2": 0, "avx2": 1, "avx512": 2}[ffi.string(lib.snap_hash_variant()).decode()]
    if lib.snap_hash_select(request.param) < 0:
        pytest.skip("needs a CPU with this vector unit")
    yield request.param
    lib.snap_hash_select(best)


@pytest.mark.usefixtures("variant")
def test_hash_is_keyed_blake3():
    for size, expected in VECTORS:
        assert native.derive(KEY, bytes(i % 251 for i in range(size))).hex() == expected


def carryless(x, y):
    """The product of two polynomials over GF(2)."""
    product = 0
    while y:
        lowest = y & -y
        product ^= x * lowest
        y ^= lowest
    return product


def digest_by_the_format(secret, data):
    """FORMAT.md's "Digest", in Python."""
    material = b"".join(
        native.derive(secret, b"snap ph\0" + number.to_bytes(8, "little")) for number in range(256)
    )
    k = struct.unpack("<1024Q", material)
    message = len(data).to_bytes(32, "little")
    for at in range(0, len(data), 4096):
        w = struct.unpack("<512Q", data[at : at + 4096].ljust(4096, b"\0"))
        for shift in (0, 512):
            total = 0
            for i in range(0, 512, 2):
                total ^= carryless(w[i] ^ k[i + shift], w[i + 1] ^ k[i + 1 + shift])
            message += total.to_bytes(16, "little")
    return native.derive(secret, message)[:16]


@pytest.mark.usefixtures("variant")
def test_digests_are_those_of_the_format():
    for size in (0, 1, 4095, 4096, 4097, 8192, 40000):
        data = random.Random(size).randbytes(size)
        assert native.checksum(KEY, data) == digest_by_the_format(KEY, data)


def test_digests_tell_apart_what_differs_little():
    pages = [bytes(4096), bytes(4095), bytes(8192), b""]
    for word in range(0, 512, 73):
        pages += [
            bytes(8 * word) + value.to_bytes(8, "little") + bytes(4088 - 8 * word)
            for value in (1, 1 << 63, 2**64 - 1)
        ]
    assert len({native.checksum(KEY, page) for page in pages}) == len(pages)
    assert native.checksum(KEY, pages[-1]) != native.checksum(KEY[::-1], pages[-1])


@pytest.mark.usefixtures("variant")
def test_page_keys_are_the_digest_of_each_page():
    data = os.urandom(37 * 4096)
    keys = native.hash_pages(KEY, data)
    for number in range(37):
        page = data[number * 4096 : (number + 1) * 4096]
        assert keys[number * 16 : (number + 1) * 16] == native.checksum(KEY, page)


def lookup(tables, key):
    return lib.snap_lookup(tables.array, tables.count, key)


def sound(tables):
    return all(lib.snap_table_check(tables.array + i) == 0 for i in range(tables.count))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.binary(min_size=16, max_size=16), max_size=300, unique=True))
def test_key_tables_find_what_is_in_them_and_nothing_else(keys):
    locs = np.arange(1, len(keys) + 1, dtype="<u8")
    wanted = dict(zip(keys, locs.tolist(), strict=True))
    data, bits = keytable.encode_table(bytearray().join(keys), locs)
    table = keytable.KeyTable.parse(np.frombuffer(data, dtype=np.uint8), len(keys), bits)
    tables = native.Tables([table.native()])
    assert sound(tables)
    for key, loc in wanted.items():
        assert lookup(tables, key) == loc
        other = bytes([key[0] ^ 1]) + key[1:]
        assert lookup(tables, other) == wanted.get(other, 0)


def test_a_damaged_fanout_leads_nowhere_outside():
    keys = os.urandom(16 * 200)
    data, bits = keytable.encode_table(bytearray(keys), np.arange(1, 201, dtype="<u8"))
    bad = bytearray(data)
    bad[: 4 * ((1 << bits) + 1)] = os.urandom(4 * ((1 << bits) + 1))
    tables = native.Tables([keytable.KeyTable.parse(np.frombuffer(bad, dtype=np.uint8), 200, bits).native()])
    assert not sound(tables)
    for number in range(200):
        assert lookup(tables, keys[number * 16 : number * 16 + 16]) in range(201)


def test_index_files_merge_and_refuse_damage(tmp_path):
    def table(numbers):
        keys = bytearray().join(struct.pack(">QQ", n << 40, n) for n in numbers)
        data, bits = keytable.encode_table(keys, np.array(numbers, dtype="<u8") + np.uint64(1 << 32))
        return keytable.KeyTable.parse(np.frombuffer(data, dtype=np.uint8), len(numbers), bits)

    directory = keytable.IndexDir(tmp_path, bytes(32))
    name = directory.write([1, 2], [table(range(100)), table(range(50, 150))])
    (loaded,) = directory.load(frozenset({1, 2, 3}))
    assert loaded.table.nr_keys == 150
    assert directory.load(frozenset({1})) == []  # covers a pack that does not exist
    content = bytearray((tmp_path / name).read_bytes())
    content[200] ^= 1
    (tmp_path / name).write_bytes(content)
    assert directory.load(frozenset({1, 2})) == []
    (tmp_path / name).write_bytes(content[:-5])
    assert directory.load(frozenset({1, 2})) == []


def write_pack(directory, pages=b"ab" * 2048 * 3, blob=b"images"):
    pack = PackWriter(directory, 0x1234, KEYS, SegmentPool())
    codec, data = FrameCompressor().pages(memoryview(pages), 1)
    for kind, raw, stored, how, keys in (
        (KIND_PAGES, pages, data, codec, native.hash_pages(KEYS.pages, pages)),
        (KIND_IMAGES, blob, blob, CODEC_RAW, b""),
    ):
        number, offset = pack.reserve(len(stored))
        pack.put_frame(number, offset, stored, raw=len(raw), codec=how, kind=kind, base=None, page_keys=keys)
        pack.filled(offset, len(stored))
    pack.seal()
    return directory / pack_name(0x1234)


def test_golden_bytes_of_a_pack(tmp_path):
    """FORMAT.md, offset by offset."""
    data = write_pack(tmp_path, os.urandom(8192)).read_bytes()
    assert data[:8] == b"SNAPPACK"
    assert struct.unpack_from("<IIII", data, 8) == (1, 0, 0x1234, 0)
    assert data[24:40] == KEYS.store_id
    assert data[40:48] == bytes(8)
    assert data[48:64] == native.checksum(KEYS.frames, data[:48])
    trailer = data[-64:]
    assert trailer[:8] == b"SNAPFOOT"
    frames, bits, keys, start, table, pack, zero = struct.unpack_from("<IIQQQII", trailer, 8)
    assert (frames, bits, keys, pack, zero) == (2, 0, 2, 0x1234, 0)
    assert data[-16:] == native.checksum(KEYS.frames, data[start:-16])
    row = struct.unpack_from("<QIIBBHIII16s", data, start)
    assert row[:9] == (64, 8192, 8192, CODEC_RAW, KIND_PAGES, 2, 0, 0, 0)
    assert row[9] == native.checksum(KEYS.frames, data[64 : 64 + 8192])
    row = struct.unpack_from("<QIIBBHIII16s", data, start + 48)
    assert row[:9] == (64 + 8192, 6, 6, CODEC_RAW, KIND_IMAGES, 0, 0, 0, 0)
    assert table == start + 96
    assert struct.unpack_from("<II", data, table) == (0, 2)
    locs = struct.unpack_from("<2Q", data, table + 8 + 32)
    assert sorted(locs) == [location(0x1234, 0, 0), location(0x1234, 0, 1)]
    assert data[table + 8 : table + 24] < data[table + 24 : table + 40]
    assert len(data) == table + 8 + 2 * 24 + 64


def test_reading_a_pack(tmp_path):
    write_pack(tmp_path)
    pack = PackFile(tmp_path, 0x1234, KEYS)
    assert pack.read(0, KIND_PAGES) == b"ab" * 2048 * 3
    assert pack.frame(0).codec == CODEC_ZSTD
    assert pack.read(1, KIND_IMAGES) == b"images"
    assert pack.page_keys() == {0: native.hash_pages(KEYS.pages, b"ab" * 2048 * 3)}
    with pytest.raises(VerificationError, match="kind"):
        pack.read(0, KIND_IMAGES)
    with pytest.raises(VerificationError, match="no such frame"):
        pack.read(2, KIND_PAGES)
    with pytest.raises(VerificationError, match="missing"):
        PackFile(tmp_path, 0x1235, KEYS)


@pytest.mark.parametrize(("nr_cached", "expected"), [(16384, False), (1 << 20, True)])
def test_what_was_read_with_the_header_is_not_a_frame_in_the_cache(
    tmp_path, monkeypatch, nr_cached, expected
):
    write_pack(tmp_path, os.urandom(16 * 4096))
    pack = PackFile(tmp_path, 0x1234, KEYS)

    def preadv(_fd, buffers, offset, flags):
        assert flags == os.RWF_NOWAIT
        size = min(len(buffers[0]), nr_cached - offset)
        if size <= 0:
            raise BlockingIOError
        return size

    monkeypatch.setattr(os, "preadv", preadv)
    assert pack.is_cached(0) is expected


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_damaged_pack_reads_wrong(tmp_path_factory, data):
    directory = tmp_path_factory.mktemp("pack")
    path = write_pack(directory)
    whole = path.read_bytes()
    if data.draw(st.booleans()):
        content = whole[: data.draw(st.integers(0, len(whole) - 1))]
    else:
        at = data.draw(st.integers(0, len(whole) - 1))
        content = whole[:at] + bytes([whole[at] ^ data.draw(st.integers(1, 255))]) + whole[at + 1 :]
    path.write_bytes(content)
    wrong = 0
    try:
        pack = PackFile(directory, 0x1234, KEYS)
    except VerificationError as error:
        assert "pack 00001234" in error.where
        return
    for frame, kind, expected in ((0, KIND_PAGES, b"ab" * 2048 * 3), (1, KIND_IMAGES, b"images")):
        try:
            assert pack.read(frame, kind) == expected
        except VerificationError as error:
            assert f"frame {frame}" in error.where
            wrong += 1
    # Padding before the footer is the one place that nothing depends on.
    start = struct.unpack_from("<Q", whole, len(whole) - 64 + 24)[0]
    assert wrong or content[: start - 8] == whole[: start - 8]


def test_pages_apart(tmp_path):
    """Each page can be had alone; one that does not compress is stored as it is."""
    pages = b"".join(os.urandom(4096) if n % 5 == 0 else bytes([n]) * 4096 for n in range(100))
    codec, stored = FrameCompressor().pages_apart(memoryview(pages))
    assert codec == CODEC_ZSTD_PAGES
    sizes = np.frombuffer(stored, dtype="<u2", count=100)
    assert [size == 4096 for size in sizes] == [n % 5 == 0 for n in range(100)]
    assert sum(sizes.tolist()) + 200 == len(stored)
    pack = one_frame(tmp_path, stored, codec, 100)
    assert pack.read(0, KIND_PAGES) == pages
    for slots in ([0], [1], [0, 99], [3, 5, 50], [7, 6], list(range(100))):
        data, where = pack.read_pages(0, np.array(slots, dtype=np.uint32))
        for slot, at in zip(slots, where.tolist(), strict=True):
            assert data[at * 4096 : (at + 1) * 4096] == pages[slot * 4096 : (slot + 1) * 4096]
    with pytest.raises(VerificationError, match="does not have"):
        pack.read_pages(0, np.array([100], dtype=np.uint32))
    assert FrameCompressor().pages_apart(memoryview(os.urandom(4096 * 30)))[0] == CODEC_RAW


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_forged_pages_apart_are_refused_or_whole(tmp_path_factory, data):
    """Whoever has the key may write anything: no size of it is believed."""
    nr_pages = 8
    stored = bytearray(
        FrameCompressor().pages_apart(memoryview(b"".join(bytes([n]) * 4096 for n in range(nr_pages))))[1]
    )
    for _ in range(data.draw(st.integers(1, 4))):
        stored[data.draw(st.integers(0, len(stored) - 1))] = data.draw(st.integers(0, 255))
    del stored[data.draw(st.integers(0, len(stored))) or len(stored) :]
    pack = one_frame(tmp_path_factory.mktemp("pack"), bytes(stored), CODEC_ZSTD_PAGES, nr_pages)
    try:
        assert len(pack.read(0, KIND_PAGES)) == nr_pages * 4096
    except VerificationError as error:
        assert "frame 0" in error.where


def test_the_cycle_collector_may_meet_a_pack(tmp_path):
    """CPython's gh-77894: a memoryview in a garbage cycle, with a buffer taken of it, ends the process."""
    write_pack(tmp_path)
    child = os.fork()
    if child == 0:
        pack = PackFile(tmp_path, 0x1234, KEYS)
        cycle = [pack, native.Tables([pack.table.native()])]
        cycle.append(cycle)
        del pack, cycle
        gc.collect()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
