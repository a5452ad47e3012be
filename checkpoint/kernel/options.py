"""Socket options in bulk (parasite_c/options.c): what a socket answers to a list of them. Decides nothing."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from parasite_c._native import ffi, lib

SIZE: int = lib.SNAP_OPTION_BYTES
"""No longer value is read whole."""


@functools.cache
def _flat(names: tuple[tuple[int, int], ...]) -> Any:
    return ffi.new("int32_t[]", [number for pair in names for number in pair])


def answers(fd: int, names: tuple[tuple[int, int], ...]) -> bytes:
    """What it answers to these (level, name) pairs, for `values` and to be compared as a whole."""
    each = 4 + SIZE
    room = ffi.new("char[]", each * len(names))
    lengths = ffi.cast("int32_t *", room)
    lib.snap_get_options(fd, _flat(names), len(names), room + 4 * len(names), lengths)
    return bytes(ffi.buffer(room))


def values(answered: bytes) -> list[bytes | None]:
    """The values in it, in order; None for an option that the socket does not have."""
    nr = len(answered) // (4 + SIZE)
    lengths = memoryview(answered)[: 4 * nr].cast("i")
    at = range(4 * nr, len(answered), SIZE)
    return [
        None if length < 0 else answered[start : start + length]
        for start, length in zip(at, lengths, strict=True)
    ]


def read(fd: int, names: Sequence[tuple[int, int]]) -> list[bytes | None]:
    """Both in one step."""
    return values(answers(fd, tuple(names)))
