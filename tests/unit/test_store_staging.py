"""What staging makes of a point's pages: what will not compress goes by itself, and every page is found where it went."""

import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapshotter.base.pages import PAGE_SIZE as PAGE
from store import Store, native, pagemap
from store.pack import CODEC_RAW
from tests.unit.store_helpers import restored, take

KEY_BYTES = native.KEY_BYTES


def words(count, seed=0):
    """Pages that compress, each of its own."""
    return b"".join((b"page %6d of a text, " % (seed + at) * 300)[:PAGE] for at in range(count))


def doubles(count):
    """Pages of numbers with arbitrary digits: a quarter of their bytes is no secret."""
    return np.random.default_rng(3).normal(size=count * PAGE // 8).tobytes()


def page_frames(store):
    """(codec, pages) of every frame of pages."""
    found = []
    for pack in store.catalog.packs():
        file = store.readers.get(pack)
        for number in file.page_keys():
            frame = file.frame(number)
            found.append((frame.codec, frame.nr_pages))
    return found


@pytest.fixture
def store(tmp_path):
    with Store.open(tmp_path / "store", create=True) as store:
        yield store


def test_pages_that_will_not_compress_go_by_themselves(store):
    data = b"".join(os.urandom(PAGE) if at % 3 else words(1, at) for at in range(1500))
    assert restored(store, take(store, data)) == data
    frames = page_frames(store)
    # One in some thousand looks otherwise.
    assert 990 <= sum(nr_pages for codec, nr_pages in frames if codec == CODEC_RAW) <= 1000
    assert sum(nr_pages for _, nr_pages in frames) == 1500


@pytest.mark.parametrize("pages", [words, doubles])
def test_pages_that_compress_stay_together(store, pages):
    data = pages(900)
    assert restored(store, take(store, data)) == data
    assert CODEC_RAW not in {codec for codec, _ in page_frames(store)}


def test_the_same_random_page_is_stored_once(store):
    page, other = os.urandom(PAGE), os.urandom(PAGE)
    data = (page + words(1) + other + bytes(PAGE)) * 300
    point = take(store, data)
    assert point.pages_new == 3
    assert restored(store, point) == data
    assert take(store, other * 20 + data, point).pages_new == 0


PUTS = st.lists(st.tuples(st.integers(0, 90), st.lists(st.integers(1, 4), max_size=30)), max_size=6)


@given(PUTS)
def test_the_last_put_of_a_page_stands(puts):
    space, expected, place = pagemap.EMPTY, {}, 0
    for first, steps in puts:
        pages = first + np.cumsum([0, *steps]).astype("<u8")
        places = np.arange(place, place + len(pages), dtype="<u8")
        place += len(pages)
        expected.update(zip(pages.tolist(), places.tolist(), strict=True))
        space = pagemap.put_over(space, pages, places)
    assert (space.pages[1:] > space.pages[:-1]).all()
    assert dict(zip(space.pages.tolist(), space.locs.tolist(), strict=True)) == expected


@given(st.lists(st.integers(0, 50), min_size=1, max_size=60))
def test_a_put_in_any_order(numbers):
    pages = np.array(numbers, dtype="<u8")
    before = np.arange(0, 100, 3, dtype="<u8")
    space = pagemap.put_over(pagemap.Space(before, before + 1000), pages, np.arange(len(pages), dtype="<u8"))
    expected = {int(page): int(page) + 1000 for page in before} | {
        page: at for at, page in enumerate(numbers)
    }
    assert dict(zip(space.pages.tolist(), space.locs.tolist(), strict=True)) == expected


def test_marked_locations_are_resolved_and_bounded():
    mark = 1 << 63
    put = np.array([5, mark | 1 << 48 | 2, mark | 0, 0], dtype="<u8")
    finals = [np.array([70, 71], dtype="<u8"), np.array([80, 81, 82], dtype="<u8")]
    locs = np.array([9, mark | 1, mark | 2, mark | 0, mark | 3], dtype="<u8")
    native.resolve(locs, put, finals)
    assert locs.tolist() == [9, 82, 70, 5, 0]
    for loc in (mark | 4, mark | 2**62):
        with pytest.raises(ValueError, match="out of bounds"):
            native.resolve(np.array([loc], dtype="<u8"), put, finals)
    for stream in (2, 255):
        with pytest.raises(ValueError, match="out of bounds"):
            native.resolve(
                np.array([mark], dtype="<u8"), np.array([mark | stream << 48], dtype="<u8"), finals
            )


def test_pages_out_of_their_slots():
    secret, buffer = bytes(range(32)), bytearray(words(6))
    slots = np.array([1, 2, 5], dtype="<u4")
    wanted = b"".join(bytes(buffer[slot * PAGE : (slot + 1) * PAGE]) for slot in slots)
    first, second = native.Room(bytearray(PAGE + 100)), native.Room(bytearray(3 * PAGE))
    parts = [(first, 100, PAGE), (second, 0, 17), (second, 500, 2 * PAGE - 17)]
    assert native.put(secret, native.Pages(buffer, slots), parts) == native.checksum(secret, wanted)
    assert (
        bytes(first.buffer[100:])
        + bytes(second.buffer[:17])
        + bytes(second.buffer[500 : 500 + 2 * PAGE - 17])
        == wanted
    )
    outside = np.array([0, 6], dtype="<u4")
    with pytest.raises(ValueError, match="slot outside"):
        native.put(secret, native.Pages(buffer, outside), [(second, 0, 2 * PAGE)])
    with pytest.raises(ValueError, match="slot outside"):
        native.compact(buffer, outside)
    native.compact(buffer, slots)
    assert bytes(buffer[: 3 * PAGE]) == wanted
