"""io_uring rings from outside: made, looked into, brought to a count (io_uring_setup(2), io_uring(7)).

Owns the layout of a ring's two areas, which the kernel itself tells of a ring of the same size, and the few system calls.
Rings with entries of double size, and those that the kernel polls by itself, are not for this module.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import mmap
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from checkpoint.kernel import sys

EPOLL_CTL = 29
"""IORING_OP_EPOLL_CTL"""
SQE_BYTES, CQE_BYTES = 64, 16
_PARAMS_BYTES = 120
_SETUP_CQSIZE = 1 << 3
_ENTER_GETEVENTS = 1
_REGISTER_PROBE = 8
_OFF_SQES = 0x10000000


@dataclass(frozen=True, slots=True)
class Layout:
    """Where things are in the area of both queues, bytes. The other area has `sq_entries` of SQE_BYTES."""

    sq_entries: int
    cq_entries: int
    sq_head: int
    sq_tail: int
    cq_head: int
    cq_tail: int
    cqes: int
    array: int

    @property
    def size_bytes(self) -> int:
        """Of the area of both queues."""
        return max(self.cqes + self.cq_entries * CQE_BYTES, self.array + 4 * self.sq_entries)


@dataclass(frozen=True, slots=True)
class Areas:
    """A ring mapped in snap."""

    layout: Layout
    queues: mmap.mmap
    sqes: mmap.mmap

    def read(self, offset: int) -> int:
        """One of the four counters, by its offset."""
        (value,) = struct.unpack_from("=I", self.queues, offset)
        return int(value)

    def write(self, offset: int, value: int) -> None:
        """Set one of the job's counters: the tail of requests, the head of completions."""
        struct.pack_into("=I", self.queues, offset, value & 0xFFFFFFFF)


def setup(sq_entries: int, cq_entries: int) -> tuple[int, Layout]:
    """A new ring: (descriptor, layout). OSError: this kernel has none, or they are turned off."""
    params = bytearray(_PARAMS_BYTES)
    struct.pack_into("=III", params, 0, sq_entries, cq_entries, _SETUP_CQSIZE)
    holder = (ctypes.c_char * _PARAMS_BYTES).from_buffer(params)
    fd = sys.syscall("io_uring_setup", sq_entries, holder)
    sq_head, sq_tail, _, _, _, _, array = struct.unpack_from("=7I", params, 40)
    cq_head, cq_tail, _, _, _, cqes = struct.unpack_from("=6I", params, 80)
    sq_entries, cq_entries = struct.unpack_from("=II", params)
    return fd, Layout(sq_entries, cq_entries, sq_head, sq_tail, cq_head, cq_tail, cqes, array)


@functools.cache
def layout_of(sq_entries: int, cq_entries: int) -> Layout:
    """The layout of a ring of this size. OSError as `setup`."""
    fd, layout = setup(sq_entries, cq_entries)
    os.close(fd)
    return layout


@contextlib.contextmanager
def mapped(fd: int, layout: Layout) -> Iterator[Areas]:
    """A ring's areas for the time of the context. OSError, ValueError: it is of another shape."""
    access = mmap.PROT_READ | mmap.PROT_WRITE
    with (
        mmap.mmap(fd, layout.size_bytes, mmap.MAP_SHARED, access) as queues,
        mmap.mmap(fd, layout.sq_entries * SQE_BYTES, mmap.MAP_SHARED, access, offset=_OFF_SQES) as sqes,
    ):
        yield Areas(layout, queues, sqes)


def is_for_anybody(fd: int) -> bool:
    """Whether any task may use it: neither of one submitter alone (IORING_SETUP_SINGLE_ISSUER) nor restricted."""
    try:
        sys.syscall("io_uring_register", fd, _REGISTER_PROBE, 0, 0)
    except OSError as error:
        return error.errno == errno.EINVAL
    return True


def advance(fd: int, areas: Areas, count: int) -> None:
    """Let a fresh ring do `count` requests that do nothing, fewer than 2^31, so that its counters get there."""
    layout = areas.layout
    struct.pack_into(f"={layout.sq_entries}I", areas.queues, layout.array, *range(layout.sq_entries))
    done = 0
    while done < count:
        part = min(layout.sq_entries, count - done)
        areas.write(layout.sq_tail, done + part)
        if sys.syscall("io_uring_enter", fd, part, part, _ENTER_GETEVENTS, 0, 0) != part:
            raise OSError(errno.EAGAIN, "io_uring_enter did not do all that it was given")
        done += part
        areas.write(layout.cq_head, done)
