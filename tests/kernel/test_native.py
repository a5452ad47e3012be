"""The C helpers at the edges of what the kernel answers."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import signal

import pytest
from parasite_c._native import ffi, lib

from checkpoint.kernel import sys as ksys
from checkpoint.kernel import uffd
from checkpoint.kernel.mem import MissingPages, ProcMem
from snapshotter.base.pages import PAGE_SIZE
from tests.jobs import reap

pytestmark = pytest.mark.requires("root")


def test_an_old_errno_is_not_taken_for_an_interrupted_read():
    """The memory file of a process that has ended reads as 0 bytes, which sets no errno."""
    target = os.fork()
    if target == 0:
        while True:
            signal.pause()
    mem = ProcMem(target)
    os.kill(target, signal.SIGKILL)
    reap(target)
    reader = os.fork()  # one that never comes back can be killed
    if reader == 0:
        got = 0
        try:
            signal.alarm(10)
            runs = ffi.new("struct snap_run_pages[]", [(16, 1)])
            page = ffi.new("char[4096]")
            ffi.errno = errno.EINTR
            got = lib.snap_read_runs(target, mem.fileno(), -1, runs, 1, page, ffi.NULL, 0)
        finally:
            os._exit(0 if got == -errno.ESRCH else 1)
    mem.close()
    assert reap(reader) == 0


def test_pages_are_put_in_place_where_they_are_missing_and_written_elsewhere():
    """Runs that begin, end and lie across what the userfaultfd has, over pages that are there and pages that are not."""
    area = mmap.mmap(-1, 64 * PAGE_SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    start = ctypes.addressof(ctypes.c_char.from_buffer(area))
    first = start // PAGE_SIZE
    for page in (12, 30, 50):  # two of them in registered ranges
        area[page * PAGE_SIZE] = 255
    descriptor = ksys.userfaultfd(os.O_CLOEXEC | uffd.UFFD_USER_MODE_ONLY)
    try:
        uffd.enable_plain(descriptor)
        ranges = [(10, 8), (28, 4)]
        for page, nr_pages in ranges:
            uffd.register_missing(descriptor, start + page * PAGE_SIZE, start + (page + nr_pages) * PAGE_SIZE)
        missing = MissingPages(descriptor, [(first + page, nr_pages) for page, nr_pages in ranges])
        runs = [(11, 1), (14, 20), (5, 9), (40, 11)]
        pages = [page for begin, nr_pages in runs for page in range(begin, begin + nr_pages)]
        data = b"".join(bytes([page]) * PAGE_SIZE for page in pages)
        with ProcMem(os.getpid()) as mem:
            mem.write_runs([(first + begin, nr_pages) for begin, nr_pages in runs[:2]], data, missing)
            # Page 11 is there by now.
            mem.write_runs(
                [(first + begin, nr_pages) for begin, nr_pages in runs[2:]], data[21 * PAGE_SIZE :], missing
            )
    finally:
        os.close(descriptor)
    written = set(pages)
    for page in range(64):
        wanted = bytes([page if page in written else 0]) * PAGE_SIZE
        assert area[page * PAGE_SIZE : (page + 1) * PAGE_SIZE] == wanted, page
