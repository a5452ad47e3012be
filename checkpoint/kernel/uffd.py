"""userfaultfd and PAGEMAP_SCAN as ioctls: the few that write-protection tracking and filling memory need.

Numbers and structures are those of <linux/userfaultfd.h> and <linux/fs.h> (Linux 6.7: WP_ASYNC and PAGEMAP_SCAN);
see ioctl_userfaultfd(2) and Documentation/admin-guide/mm/pagemap.rst. Nothing here decides anything.
"""

from __future__ import annotations

import array
import errno
import fcntl
import struct
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from parasite_c._native import ffi, lib

from checkpoint.model.pageplan import EMPTY, Runs

UFFDIO_API = 0xC018AA3F
UFFDIO_REGISTER = 0xC020AA00
UFFDIO_UNREGISTER = 0x8010AA01
UFFDIO_WRITEPROTECT = 0xC018AA06
PAGEMAP_SCAN = 0xC0606610

WATCHED: int = lib.SNAP_W_WATCHED
OURS: int = lib.SNAP_W_OURS
Bytes = NDArray[np.uint8]
Errors = NDArray[np.int32]

UFFD_USER_MODE_ONLY = 1
"""Flag of userfaultfd(2): allowed to everybody; asynchronous write-protection never waits for a handler anyhow."""
_API = 0xAA
_FEATURE_WP_UNPOPULATED = 1 << 13
_FEATURE_WP_ASYNC = 1 << 15
_MODE_MISSING, _MODE_WP = 1, 2

_PM_SCAN_WP_MATCHING = 1
_PM_SCAN_CHECK_WPASYNC = 2
_PAGE_IS_WRITTEN = 1 << 1
_PAGE_IS_PRESENT = 1 << 3
_PAGE_IS_SWAPPED = 1 << 4
_TASK_SIZE = (1 << 47) - 4096

_ARG = struct.Struct("<12Q")  # struct pm_scan_arg
_REGION = 24  # struct page_region: start, end, categories


def enable(uffd: int) -> None:
    """UFFDIO_API with the features of asynchronous write-protection. Raises OSError (EINVAL: the kernel lacks them)."""
    _api(uffd, _FEATURE_WP_ASYNC | _FEATURE_WP_UNPOPULATED)


def enable_plain(uffd: int) -> None:
    """UFFDIO_API without any feature, which is enough to put pages in place."""
    _api(uffd, 0)


def _api(uffd: int, features: int) -> None:
    fcntl.ioctl(uffd, UFFDIO_API, bytearray(struct.pack("<QQQ", _API, features, 0)))


def register(uffd: int, start: int, end: int) -> None:
    """Watch [start, end). Raises OSError: EBUSY when another userfaultfd has it, EINVAL when it cannot be watched."""
    _register(uffd, start, end, _MODE_WP)


def register_missing(uffd: int, start: int, end: int) -> None:
    """Let UFFDIO_COPY fill [start, end); whoever touches a page that is not there meanwhile waits. Raises OSError."""
    _register(uffd, start, end, _MODE_MISSING)


def _register(uffd: int, start: int, end: int, mode: int) -> None:
    fcntl.ioctl(uffd, UFFDIO_REGISTER, bytearray(struct.pack("<QQQQ", start, end - start, mode, 0)))


def unprotect(uffd: int, start: int, end: int) -> None:
    """Clear the write-protected mark of every page of a registered range."""
    fcntl.ioctl(uffd, UFFDIO_WRITEPROTECT, bytearray(struct.pack("<QQQ", start, end - start, 0)))


def watch(uffd: int, pagemap: int, ranges: Sequence[tuple[int, int]]) -> tuple[Bytes, Errors]:
    """Register VMAs and tell which are registered, all in one call.

    Args:
        uffd: what to register them with; -1: nothing is registered.
        pagemap: /proc/PID/pagemap.
        ranges: (start, end), each exactly a VMA.

    Returns:
        For each: WATCHED (it was registered with any of asynchronous write-protection before) | OURS (it is now with `uffd`), and
        the errno of its registering, or 0.
    """
    table = np.ascontiguousarray(ranges, dtype=np.uint64).reshape(-1, 2)
    states, errors = np.zeros(len(table), dtype=np.uint8), np.zeros(len(table), dtype=np.int32)
    lib.snap_watch(
        uffd, pagemap, ffi.from_buffer("struct snap_range[]", table), len(table), ffi.from_buffer("uint8_t[]", states),
        ffi.from_buffer("int32_t[]", errors),
    )  # fmt: skip
    return states, errors


class Scanner:
    """PAGEMAP_SCAN with one reused result buffer."""

    def __init__(self, max_regions: int = 1 << 16) -> None:
        self._vec = array.array("Q", bytes(max_regions * _REGION))
        self._address = self._vec.buffer_info()[0]
        self._table = np.frombuffer(self._vec, dtype=np.int64).reshape(-1, 3)
        self._max = max_regions
        self._arg = bytearray(_ARG.size)

    def is_watched(self, pagemap: int, start: int) -> bool:
        """Whether the VMA at `start` is registered with some userfaultfd of asynchronous write-protection."""
        # One page is asked about, nothing is changed: a VMA that is not registered is EPERM.
        _ARG.pack_into(
            self._arg, 0, _ARG.size, _PM_SCAN_CHECK_WPASYNC, start, start + 4096, 0, self._address, 1, 0,
            0, _PAGE_IS_WRITTEN, 0, _PAGE_IS_WRITTEN,
        )  # fmt: skip
        try:
            fcntl.ioctl(pagemap, PAGEMAP_SCAN, self._arg, True)
        except OSError as error:
            if error.errno in {errno.EPERM, errno.ENOMEM, errno.EFAULT}:
                return False
            raise
        return True

    def take(self, pagemap: int, start: int = 0, end: int = _TASK_SIZE) -> Runs:
        """Pages of [start, end) written since they were protected, and protect them again, atomically each.

        Ranges that are not registered are passed over. Rows of pages, ascending.
        """
        # "Written" alone would take the kernel's short cut, which also reports and marks pages that were never
        # touched; asking for "present or swapped" besides leaves those alone.
        return self._scan(pagemap, start, end, _PM_SCAN_WP_MATCHING)

    def marked(self, pagemap: int, start: int, end: int) -> Runs:
        """Pages of [start, end) that are marked as protected; changes nothing."""
        return self._scan(pagemap, start, end, 0, inverted=_PAGE_IS_WRITTEN)

    def _scan(self, pagemap: int, start: int, end: int, flags: int, inverted: int = 0) -> Runs:
        parts: list[Runs] = []
        while start < end:
            _ARG.pack_into(
                self._arg, 0, _ARG.size, flags, start, end, 0, self._address, self._max, 0,
                inverted, _PAGE_IS_WRITTEN, _PAGE_IS_PRESENT | _PAGE_IS_SWAPPED, _PAGE_IS_WRITTEN,
            )  # fmt: skip
            found = fcntl.ioctl(pagemap, PAGEMAP_SCAN, self._arg, True)
            if found:
                parts.append(self._table[:found, :2] >> 12)
            walked = _ARG.unpack(self._arg)[4]
            if found < self._max and walked >= end:
                break
            if walked <= start:
                raise OSError(errno.EIO, "PAGEMAP_SCAN does not advance")
            start = walked
        if not parts:
            return EMPTY
        return parts[0] if len(parts) == 1 else np.concatenate(parts)
