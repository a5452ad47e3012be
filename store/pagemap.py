"""Page maps: where every page of every space of a point is.

Pure: arrays and bytes, no files. A resolved map is, per space, the sorted page numbers and a location for each
(pack << 32 | frame << 12 | slot; 0 is the all-zero page). Encoded, it is a keyframe (everything)
or a delta against another point's map, as extents in byte planes (FORMAT.md, "Page maps").

Keyframe rule: a full map once the deltas since the last one add up to its size, or MAX_CHAIN of them were
made. So resolving a point costs at most twice a keyframe, however long the chain of points is.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from snapshotter.base.runs import PageRuns, RunTable, as_table

if TYPE_CHECKING:
    import numpy.typing as npt

    U64 = npt.NDArray[np.uint64]

MAGIC = b"SNAPMAPS"
VERSION = 1
KEYFRAME, DELTA = 0, 1
MAX_CHAIN = 32
MAX_SPACES = 1 << 20
MAX_PAGES = 1 << 36
"""256 TiB: more than an address space of 47 bits has pages, so that sums cannot overflow."""
MAX_RESOLVED_PAGES = 1 << 28
_FEW = 16
"""A put is small beside what was put before when that is so many times as long."""

_HEADER = struct.Struct("<8sIIII")
_SPACE = struct.Struct("<HHII")
_EXTENT_BYTES = 20
_RUN_BYTES = 12


class BadMapError(Exception):
    """Bytes that are no page map; the message says why."""


@dataclass(frozen=True, slots=True)
class Space:
    """Sorted page numbers and the location of each."""

    pages: U64
    locs: U64


Maps = dict[str, Space]
EMPTY = Space(np.zeros(0, dtype="<u8"), np.zeros(0, dtype="<u8"))


def expand(runs: PageRuns) -> U64:
    """Page numbers of runs, in their order."""
    array = as_table(runs)
    firsts, counts = array[:, 0], array[:, 1]
    if (counts <= 0).any() or (firsts < 0).any():
        raise ValueError("a run needs a page number >= 0 and at least one page")
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    pages: U64 = (np.arange(total, dtype=np.int64) + np.repeat(firsts - (ends - counts), counts)).astype(
        "<u8"
    )
    return pages


def to_runs(pages: U64) -> list[tuple[int, int]]:
    """Sorted page numbers as merged runs."""
    if not len(pages):
        return []
    breaks = np.flatnonzero(np.diff(pages) != 1) + 1
    starts = np.concatenate(([0], breaks))
    counts = np.diff(np.concatenate((starts, [len(pages)])))
    return list(zip(pages[starts].tolist(), counts.tolist(), strict=True))


def ascending(array: U64) -> U64:
    """Sorted, each value once; np.unique hashes first, which costs more than everything else in here."""
    if _ascends(array):
        return array
    array = np.sort(array)
    return array[np.concatenate(([True], array[1:] != array[:-1]))]


def find(haystack: U64, needles: U64) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.bool_]]:
    """Index of each needle in a sorted array, and whether it is there."""
    if not len(haystack):
        return np.zeros(len(needles), dtype=np.intp), np.zeros(len(needles), dtype=bool)
    if len(haystack) == len(needles) and (haystack == needles).all():
        return np.arange(len(needles)), np.ones(len(needles), dtype=bool)
    index = np.minimum(np.searchsorted(haystack, needles), len(haystack) - 1)
    return index, haystack[index] == needles


def within(pages: U64, table: RunTable) -> npt.NDArray[np.bool_]:
    """Which of the page numbers are in one of the runs (sorted, disjoint)."""
    if not len(table):
        return np.zeros(len(pages), dtype=bool)
    edges = np.stack((table[:, 0], table[:, 0] + table[:, 1]), axis=1).ravel().astype("<u8")
    # Of touching runs the end of one is the beginning of the next: both are passed, and the parity is right.
    inside: npt.NDArray[np.bool_] = np.searchsorted(edges, pages, side="right") % 2 == 1
    return inside


def put_over(space: Space, pages: U64, locs: U64) -> Space:
    """The space with these pages, in any order, at other locations than before; it is not to be used any more."""
    # Mostly they continue it, or are a few pages in it: that is told and done faster than all are sorted.
    if _ascends(pages):
        if not len(space.pages):
            return Space(pages, locs)
        if not len(pages) or pages[0] > space.pages[-1]:
            return Space(np.concatenate((space.pages, pages)), np.concatenate((space.locs, locs)))
        if len(pages) * _FEW <= len(space.pages):
            return _insert(space, pages, locs)
    pages, locs = np.concatenate((space.pages, pages)), np.concatenate((space.locs, locs))
    order = np.argsort(pages, kind="stable")
    pages, locs = pages[order], locs[order]
    last = np.concatenate((pages[1:] != pages[:-1], [True]))
    return Space(pages[last], locs[last])


def _insert(space: Space, pages: U64, locs: U64) -> Space:
    """The space with other locations of some pages, in place, and with more pages."""
    index, have = find(space.pages, pages)
    space.locs[index[have]] = locs[have]
    if have.all():
        return space
    pages, locs = pages[~have], locs[~have]
    at = np.searchsorted(space.pages, pages)
    return Space(np.insert(space.pages, at, pages), np.insert(space.locs, at, locs))


def _ascends(array: U64) -> bool:
    return len(array) < 2 or bool((array[1:] > array[:-1]).all())


def overlay(present: U64, put: Space, parent: Space) -> tuple[Space, U64]:
    """The pages `present`, from `put` where it has them, else from `parent`; and those that neither has."""
    index, have = find(put.pages, present)
    if len(present) and have.all():
        return Space(present, put.locs[index]), EMPTY.pages
    locs = np.zeros(len(present), dtype="<u8")
    if len(put.pages):
        locs[have] = put.locs[index[have]]
    rest = np.flatnonzero(~have)
    index, found = find(parent.pages, present[rest])
    if len(parent.pages):
        locs[rest[found]] = parent.locs[index[found]]
    return Space(present, locs), present[rest[~found]]


def without(maps: Mapping[str, Space], damaged: Mapping[int, Iterable[int]]) -> Mapping[str, Space]:
    """The maps less the pages in damaged frames (pack -> frames; none named: all of the pack's)."""
    if not damaged:
        return maps
    packs, frames = [], []
    for pack, numbers in damaged.items():
        some = [pack << 20 | number for number in numbers]
        frames += some
        packs += [] if some else [pack]
    whole, single = np.array(packs, dtype="<u8"), np.array(frames, dtype="<u8")
    left = {}
    for name, space in maps.items():
        bad = np.isin(space.locs >> np.uint64(32), whole) | np.isin(space.locs >> np.uint64(12), single)
        left[name] = Space(space.pages[~bad], space.locs[~bad]) if bad.any() else space
    return left


def _planes(array: npt.NDArray[Any]) -> bytes:
    """First all lowest bytes, then all second lowest ..."""
    width = array.dtype.itemsize
    return np.ascontiguousarray(array.view(np.uint8).reshape(-1, width).T).tobytes()


def _unplane(data: memoryview, dtype: str) -> npt.NDArray[Any]:
    width = np.dtype(dtype).itemsize
    rows = np.frombuffer(data, dtype=np.uint8).reshape(width, -1)
    return np.ascontiguousarray(rows.T).reshape(-1).view(dtype)


def _delta(array: U64) -> U64:
    out = array.copy()
    out[1:] -= array[:-1]
    return out


def _encode_extents(space: Space) -> tuple[int, bytes]:
    """Runs of pages whose locations go up by one as well, or are all zero."""
    pages, locs = space.pages.astype("<u8"), space.locs.astype("<u8")
    if not len(pages):
        return 0, b""
    step = np.diff(locs)
    joined = (np.diff(pages) == 1) & (((step == 1) & (locs[:-1] != 0)) | ((step == 0) & (locs[:-1] == 0)))
    starts = np.concatenate(([0], np.flatnonzero(~joined) + 1))
    counts = np.diff(np.concatenate((starts, [len(pages)])))
    columns = (_delta(pages[starts]), counts.astype("<u4"), _delta(locs[starts]))
    return len(starts), b"".join(_planes(column) for column in columns)


def _decode_extents(data: memoryview, nr: int, room: int) -> Space:
    if not nr:
        return EMPTY
    counts = _unplane(data[nr * 8 : nr * 12], "<u4").astype(np.int64)
    starts = np.cumsum(_unplane(data[: nr * 8], "<u8"), dtype="<u8")
    bases = np.cumsum(_unplane(data[nr * 12 :], "<u8"), dtype="<u8")
    total = int(counts.sum())
    if total > room or (counts <= 0).any() or int(starts.max()) >= MAX_PAGES:
        raise BadMapError("extents out of bounds")
    ends = starts + counts.astype("<u8")
    if (starts[1:] < ends[:-1]).any():
        raise BadMapError("extents overlap or are not sorted")
    if (
        int(bases.max()) >= 1 << 63
        or (((bases & np.uint64(0xFFF)).astype(np.int64) + counts)[bases != 0] > 4096).any()
    ):
        raise BadMapError("a location is out of bounds")
    if ((bases != 0) & (bases < np.uint64(1 << 32))).any():
        raise BadMapError("a location names no pack")
    before = np.cumsum(counts) - counts
    offset = np.arange(total, dtype=np.int64) - np.repeat(before, counts)
    step = np.where(np.repeat(bases, counts) == 0, 0, offset)
    offset_u, step_u = offset.astype("<u8"), step.astype("<u8")
    return Space(np.repeat(starts, counts) + offset_u, np.repeat(bases, counts) + step_u)


def _encode_runs(pages: U64) -> tuple[int, bytes]:
    runs = np.array(to_runs(pages), dtype="<u8").reshape(-1, 2)
    if not len(runs):
        return 0, b""
    return len(runs), _planes(_delta(np.ascontiguousarray(runs[:, 0]))) + _planes(runs[:, 1].astype("<u4"))


def _decode_runs(data: memoryview, nr: int, room: int) -> U64:
    if not nr:
        return EMPTY.pages
    starts = np.cumsum(_unplane(data[: nr * 8], "<u8"), dtype="<u8")
    counts = _unplane(data[nr * 8 :], "<u4").astype(np.int64)
    if int(counts.sum()) > room or int(starts.max()) >= MAX_PAGES:
        raise BadMapError("runs out of bounds")
    return expand(zip(starts.tolist(), counts.tolist(), strict=True))


def _encode(kind: int, spaces: Sequence[tuple[str, Space, U64]]) -> bytes:
    parts = [_HEADER.pack(MAGIC, VERSION, kind, len(spaces), 0)]
    for name, changed, removed in spaces:
        nr_extents, extents = _encode_extents(changed)
        nr_runs, runs = _encode_runs(removed)
        raw = name.encode()
        parts += [_SPACE.pack(len(raw), 0, nr_extents, nr_runs), raw, extents, runs]
    return b"".join(parts)


def encode_keyframe(maps: Mapping[str, Space]) -> bytes:
    """Everything."""
    return _encode(KEYFRAME, [(name, maps[name], EMPTY.pages) for name in sorted(maps)])


def encode_delta(maps: Mapping[str, Space], base: Mapping[str, Space]) -> bytes:
    """What `base` lacks or has elsewhere, and what it has too much. A space that is gone loses all its pages."""
    spaces = []
    for name in sorted(set(maps) | set(base)):
        new, old = maps.get(name, EMPTY), base.get(name, EMPTY)
        if len(new.pages) == len(old.pages) and (new.pages == old.pages).all():
            same, removed = new.locs == old.locs, EMPTY.pages
        else:
            index, found = find(old.pages, new.pages)
            same = found.copy()
            if len(old.pages):
                same[found] = old.locs[index[found]] == new.locs[found]
            removed = old.pages[~find(new.pages, old.pages)[1]]
        if len(removed) or not same.all() or (name in maps) != (name in base):
            spaces.append((name, Space(new.pages[~same], new.locs[~same]), removed))
    return _encode(DELTA, spaces)


def _apply(old: Space, changed: Space, removed: U64) -> Space:
    if not len(old.pages):
        return changed
    if not len(changed.pages) and not len(removed):
        return old
    gone = np.concatenate((removed, changed.pages))
    gone.sort()
    keep = ~find(gone, old.pages)[1]
    pages = np.concatenate((old.pages[keep], changed.pages))
    locs = np.concatenate((old.locs[keep], changed.locs))
    order = np.argsort(pages, kind="stable")
    return Space(pages[order], locs[order])


def decode(data: bytes, base: Mapping[str, Space] | None) -> Maps:
    """The map that `data` says, on top of `base` if it is a delta. Hostile input: raises BadMapError."""
    view = memoryview(data)
    if len(view) < _HEADER.size:
        raise BadMapError("shorter than a header")
    magic, version, kind, nr_spaces, zero = _HEADER.unpack_from(view)
    if (
        magic != MAGIC
        or version != VERSION
        or kind not in {KEYFRAME, DELTA}
        or zero
        or nr_spaces > MAX_SPACES
    ):
        raise BadMapError("no page map of a known version")
    if (kind == DELTA) != (base is not None):
        raise BadMapError("a delta without its base, or a keyframe with one")
    maps: Maps = dict(base or {})
    at = _HEADER.size
    room = MAX_RESOLVED_PAGES  # for what all spaces of this map say together
    seen = set()
    for _ in range(nr_spaces):
        if at + _SPACE.size > len(view):
            raise BadMapError("truncated")
        name_size, flags, nr_extents, nr_runs = _SPACE.unpack_from(view, at)
        if flags:
            raise BadMapError(f"flags {flags:#x} of a space are not known to this snap")
        at += _SPACE.size
        end = at + name_size + nr_extents * _EXTENT_BYTES + nr_runs * _RUN_BYTES
        if end > len(view):
            raise BadMapError("truncated")
        try:
            name = bytes(view[at : at + name_size]).decode()
        except UnicodeDecodeError as error:
            raise BadMapError("a space's name is not UTF-8") from error
        if name in seen:
            raise BadMapError("a space comes twice")
        seen.add(name)
        at += name_size
        changed = _decode_extents(view[at : at + nr_extents * _EXTENT_BYTES], nr_extents, room)
        room -= len(changed.pages)
        at += nr_extents * _EXTENT_BYTES
        try:
            removed = _decode_runs(view[at:end], nr_runs, room)
        except ValueError as error:
            raise BadMapError("a run is out of bounds") from error
        room -= len(removed)
        at = end
        new = _apply(maps.get(name, EMPTY), changed, removed)
        if len(new.pages) or kind == KEYFRAME or not nr_runs:
            maps[name] = new
        else:
            maps.pop(name, None)
    if at != len(view):
        raise BadMapError("bytes after the last space")
    if sum(len(space.pages) for space in maps.values()) > MAX_RESOLVED_PAGES:
        raise BadMapError("more pages than a job can have")  # a chain of deltas that only ever adds
    return maps


def needs_keyframe(chain: int, delta_bytes: int, keyframe_bytes: int, new_bytes: int) -> bool:
    """The rule above, for a delta of `new_bytes` on a chain of `chain` deltas of `delta_bytes` in all."""
    return chain + 1 > MAX_CHAIN or (delta_bytes + new_bytes > max(keyframe_bytes, 2048))
