"""Which pages of an address space have content: PAGEMAP_SCAN where the kernel has it, else /proc/PID/pagemap.

Owns the two interfaces and their differences; answers are tables of page runs
(checkpoint.model.pageplan.Runs). Documented in Documentation/admin-guide/mm/pagemap.rst. A swapped entry may
be a mere marker (guard page, or what userfaultfd's write protection leaves in page tables that have no page):
such entries are no content.
"""

from __future__ import annotations

import errno
import functools
import mmap
import os
import struct
from dataclasses import dataclass, field
from typing import Self

import numpy as np
from numpy.typing import NDArray
from parasite_c._native import ffi, lib

from checkpoint.model import pageplan
from checkpoint.model.pageplan import EMPTY, Runs
from snapshotter.base.pages import PAGE_SIZE

Regions = NDArray[np.int64]
"""(n, 3): struct page_region, rows (start, end, categories), addresses in bytes."""

WRITTEN, FILE, PRESENT, SWAPPED, PFNZERO = 1 << 1, 1 << 2, 1 << 3, 1 << 4, 1 << 5
GUARD = 1 << 8

_PM_PRESENT, _PM_SWAP, _PM_FILE, _PM_GUARD, _PM_EXCLUSIVE = 1 << 63, 1 << 62, 1 << 61, 1 << 58, 1 << 56
_PM_FRAME = (1 << 55) - 1
_SWAP_TYPE_MARKER = 31
"""The last of the 32 swap types is SWP_PTE_MARKER (include/linux/swap.h), whatever the kernel's
configuration."""

_NR_REGIONS = 16384
_ENTRIES_AT_ONCE = 1 << 17


@dataclass(frozen=True, slots=True)
class Content:
    """What a scan found."""

    present: Runs
    """Pages with content of their own: anonymous, present or swapped, not the zero page."""
    guard: Runs
    """Pages with MADV_GUARD_INSTALL."""
    doubtful: Runs = field(default_factory=lambda: EMPTY)
    """Those of `present` that may be the zero page: no tracker sees how a page that was dropped became that."""
    answers: tuple[NDArray[np.int64], ...] | None = None
    """What was asked and what the kernel said, if that says it all: the same answers are the same content."""


class _Support:
    """What the running kernel's PAGEMAP_SCAN can do; learnt by trying."""

    scan = True
    guard = True


class PageMap:
    """/proc/PID/pagemap of one process. A context manager."""

    def __init__(self, pid: int) -> None:
        self._fd = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        self._regions = np.empty((_NR_REGIONS, 3), dtype=np.int64)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def content(self, anonymous: Runs, over_files: Runs = EMPTY, before: Content | None = None) -> Content:
        """Content of the pages in both tables, which must lie in private VMAs: of anonymous memory and of
        files.

        They are told apart because looking at whether a page is the file's costs three times the scan. `before` is
        returned when nothing has changed since: where memory has many holes, working out the runs takes longer than the scan.
        """
        if _Support.scan:
            try:
                return self._scan_content(anonymous, over_files, before)
            except OSError as error:
                if error.errno not in {errno.ENOTTY, errno.EINVAL}:
                    raise
                _Support.scan = False
        return self._read_content(pageplan.union(anonymous, over_files))

    def _scan_content(self, anonymous: Runs, over_files: Runs, before: Content | None) -> Content:
        wanted = PRESENT | SWAPPED | (GUARD if _Support.guard else 0)
        try:
            # What has no content is asked for where little of it is expected: four times as fast as asking for what
            # has. A range that is unmapped meanwhile (in a process that runs) counts as content, and reads as zeros.
            empty = self.scan(anonymous, inverted=PRESENT, any_of=PRESENT | PFNZERO, wanted=wanted)
            over = self.scan(over_files, inverted=FILE, mask=FILE, any_of=PRESENT | SWAPPED, wanted=wanted)
        except OSError as error:
            if error.errno != errno.EINVAL or not _Support.guard:
                raise
            _Support.guard = False
            return self._scan_content(anonymous, over_files, before)
        answers = (anonymous, over_files, empty, over)
        if (
            before is not None
            and before.answers is not None
            and all(map(np.array_equal, answers, before.answers))
        ):
            return before
        found = np.concatenate((empty, over))
        categories = found[:, 2]
        guarded = (categories & GUARD) != 0
        swapped = found[((categories & (PRESENT | SWAPPED)) == SWAPPED) & ~guarded]
        own = over[(over[:, 2] & (PRESENT | GUARD)) == PRESENT]
        present = pageplan.union(_pages(own), pageplan.subtract(anonymous, _pages(empty)))
        if len(swapped):
            # What was swapped out is never the zero page.
            present = pageplan.union(present, self._read_content(_pages(swapped)).present)
            return Content(present, _pages(found[guarded]))
        return Content(present, _pages(found[guarded]), answers=answers)

    def scan(
        self, ranges: Runs, *, mask: int = 0, any_of: int = 0, inverted: int = 0, wanted: int = 0
    ) -> Regions:
        """PAGEMAP_SCAN without side effects over every range.

        Raises:
            OSError: ENOTTY where the kernel lacks it, EINVAL for a category it does not know.
        """
        parts = []
        table = np.ascontiguousarray(ranges * PAGE_SIZE)
        scan = ffi.new(
            "struct snap_scan *", {"inverted": inverted, "mask": mask, "any_of": any_of, "wanted": wanted}
        )
        while scan.next < len(table):
            nr_regions = lib.snap_scan_ranges(
                self._fd, ffi.from_buffer("struct snap_range[]", table), len(table), scan,
                ffi.from_buffer("struct snap_region[]", self._regions), _NR_REGIONS,
            )  # fmt: skip
            if nr_regions < 0:
                raise OSError(-nr_regions, f"PAGEMAP_SCAN: {os.strerror(-nr_regions)}")
            parts.append(self._regions[:nr_regions].copy())
        return np.concatenate(parts) if parts else np.empty((0, 3), dtype=np.int64)

    def _read_content(self, ranges: Runs) -> Content:
        """The same from the entries themselves. The zero page is told by its frame; where frames are hidden (they take
        CAP_SYS_ADMIN), every page that is not this process's alone may be it.
        """
        zero = _zero_frames()
        doubtful: list[Runs] = []
        present: list[Runs] = []
        guard: list[Runs] = []
        for first, end in ranges.tolist():
            for at in range(first, end, _ENTRIES_AT_ONCE):
                data = os.pread(self._fd, min(end - at, _ENTRIES_AT_ONCE) * 8, at * 8)
                entries = np.frombuffer(data[: len(data) & ~7], dtype="<u8")
                swapped = (entries & _PM_SWAP) != 0
                marker = swapped & ((entries & _PM_FRAME & 31) == _SWAP_TYPE_MARKER)
                anonymous = ((entries & (_PM_PRESENT | _PM_SWAP)) != 0) & ((entries & _PM_FILE) == 0)
                guarded = (entries & _PM_GUARD) != 0
                content = anonymous & ~marker & ~guarded
                if zero:
                    frames = entries & _PM_FRAME
                    for low, high in zero:
                        content &= swapped | (frames < low) | (frames >= high)
                else:
                    doubtful.append(_true_runs(content & ~swapped & ((entries & _PM_EXCLUSIVE) == 0), at))
                present.append(_true_runs(content, at))
                guard.append(_true_runs(guarded, at))
        return Content(_join(present), _join(guard), _join(doubtful))


@functools.cache
def _zero_frames() -> tuple[tuple[int, int], ...]:
    """Page frames [first, end) of the zero page and the huge zero page, as seen in memory of our own that was only read.

    Empty: frames are hidden from us.
    """
    size = 4 << 20
    found = []
    with (
        mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory,
        open("/proc/self/pagemap", "rb", buffering=0) as file,
    ):
        start = np.frombuffer(memory, dtype=np.uint8).ctypes.data
        huge = -start % (2 << 20)
        for advice, at in ((mmap.MADV_NOHUGEPAGE, 0), (mmap.MADV_HUGEPAGE, huge)):
            try:
                memory.madvise(advice)
            except OSError:
                continue  # a kernel without huge pages has no huge zero page
            if memory[at]:
                raise AssertionError("fresh memory is zero")
            (entry,) = struct.unpack("<Q", os.pread(file.fileno(), 8, (start + at) // PAGE_SIZE * 8))
            frame = entry & _PM_FRAME
            if entry & _PM_PRESENT and frame:
                found.append((frame, frame + (512 if at == huge and advice == mmap.MADV_HUGEPAGE else 1)))
            memory.madvise(mmap.MADV_DONTNEED)
    return tuple(found)


def _pages(regions: Regions) -> Runs:
    return pageplan.normalise(regions[:, :2] // PAGE_SIZE)


def _true_runs(mask: np.ndarray[tuple[int], np.dtype[np.bool_]], base: int) -> Runs:
    edges = np.flatnonzero(np.diff(mask.astype(np.int8), prepend=0, append=0))
    return edges.reshape(-1, 2).astype(np.int64) + base


def _join(parts: list[Runs]) -> Runs:
    return pageplan.normalise(np.concatenate(parts)) if parts else EMPTY
