"""Page maps and image sets: what is encoded is decoded, and hostile bytes only ever raise their one error."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from store import imageset, pagemap

runs_strategy = st.lists(st.tuples(st.integers(0, 5000), st.integers(1, 40)), max_size=20)
locations = st.one_of(
    st.just(0),
    st.builds(
        lambda pack, frame, slot: pack << 32 | frame << 12 | slot,
        st.integers(1, 2**31 - 1),
        st.integers(0, 2**20 - 1),
        st.integers(0, 511),
    ),
)


@st.composite
def spaces(draw):
    """A space with stretches of consecutive pages and locations, as dumps make them."""
    found = {}
    for first, count in draw(runs_strategy):
        base = draw(locations)
        for i in range(count):
            found[first + i] = base + i if base and (base & 0xFFF) + i < 4096 else 0
    pages = np.array(sorted(found), dtype="<u8")
    return pagemap.Space(pages, np.array([found[int(page)] for page in pages], dtype="<u8"))


maps_strategy = st.dictionaries(st.text(min_size=1, max_size=10), spaces(), max_size=4)


def plain(maps):
    return {
        name: dict(zip(space.pages.tolist(), space.locs.tolist(), strict=True))
        for name, space in maps.items()
        if len(space.pages)
    }


@settings(deadline=None)
@given(maps_strategy)
def test_keyframes_round_trip(maps):
    assert plain(pagemap.decode(pagemap.encode_keyframe(maps), None)) == plain(maps)


@settings(deadline=None)
@given(maps_strategy, maps_strategy)
def test_deltas_round_trip(old, new):
    mixed = {**new, **{name: space for name, space in old.items() if len(name) % 2}}
    assert plain(pagemap.decode(pagemap.encode_delta(mixed, old), old)) == plain(mixed)


@settings(deadline=None)
@given(spaces())
def test_a_delta_of_nothing_is_nothing(space):
    assert len(pagemap.encode_delta({"mm/1": space}, {"mm/1": space})) == 24


@settings(max_examples=300, deadline=None)
@given(maps_strategy, st.data())
def test_hostile_maps_raise_and_nothing_else(maps, data):
    whole = bytearray(pagemap.encode_keyframe(maps))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(whole) - 1))
        whole[at] = data.draw(st.integers(0, 255))
    try:
        found = pagemap.decode(bytes(whole[: data.draw(st.integers(0, len(whole)))]), None)
    except pagemap.BadMapError:
        return
    for space in found.values():
        assert (np.diff(space.pages.astype(np.int64)) > 0).all()


@settings(deadline=None)
@given(st.sets(st.integers(0, 300)))
def test_runs_and_pages_are_each_others_inverse(numbers):
    pages = np.array(sorted(numbers), dtype="<u8")
    runs = pagemap.to_runs(pages)
    assert pagemap.expand(runs).tolist() == pages.tolist()
    assert all(a + n < b for (a, n), (b, _) in itertools.pairwise(runs))


def test_bad_runs_are_refused():
    for bad in ([(0, 0)], [(-1, 2)], [(3, -1)]):
        with pytest.raises(ValueError, match="run"):
            pagemap.expand(bad)


def test_golden_bytes_of_a_map():
    """FORMAT.md: header, space, then columns in byte planes."""
    space = pagemap.Space(
        np.array([5, 6, 9], dtype="<u8"), np.array([1 << 32, (1 << 32) + 1, 0], dtype="<u8")
    )
    data = pagemap.encode_keyframe({"mm/1": space})
    assert data[:24] == b"SNAPMAPS" + bytes([1, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0])
    assert data[24:40] == bytes([4, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0]) + b"mm/1"
    assert data[40:56] == bytes([5, 4] + [0] * 14)  # first pages: 5, then 4 further
    assert data[56:64] == bytes([2, 1] + [0] * 6)  # pages
    assert data[64:80] == bytes([0, 0] * 4 + [1, 255] + [0, 255] * 3)  # locations: 1 << 32, then minus that
    assert len(data) == 80


def test_keyframe_rule():
    assert not pagemap.needs_keyframe(0, 0, 10_000, 3000)
    assert pagemap.needs_keyframe(3, 9000, 10_000, 3000)
    assert pagemap.needs_keyframe(pagemap.MAX_CHAIN, 0, 10_000, 1)


@given(st.dictionaries(st.text(max_size=20), st.binary(max_size=50), max_size=5))
def test_image_sets_round_trip(images):
    assert imageset.decode(imageset.encode(images)) == images


@settings(max_examples=300)
@given(st.dictionaries(st.text(max_size=20), st.binary(max_size=50), max_size=5), st.data())
def test_hostile_image_sets_raise_and_nothing_else(images, data):
    whole = bytearray(imageset.encode(images))
    whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    try:
        imageset.decode(bytes(whole[: data.draw(st.integers(0, len(whole)))]))
    except imageset.BadImageSetError:
        return
