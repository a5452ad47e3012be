"""The C helpers at the edges of what the kernel answers."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import signal
import struct
import time

import pytest
from parasite_c._native import ffi, lib

from checkpoint.kernel import sys as ksys
from checkpoint.kernel import uffd
from checkpoint.kernel.mem import MissingPages, ProcMem
from snapshotter.base.errors import TargetGoneError
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
            got = lib.snap_read_runs(target, mem.fileno(), -1, runs, 1, page, 1, ffi.NULL, 0)
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


@pytest.fixture
def sharer():
    """(pid, first page): 64 pages of pattern, of which a parent and its child share the odd groups of 8; read by a third."""
    area = mmap.mmap(-1, 2048 * PAGE_SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for page in range(64):
        area[page * PAGE_SIZE : (page + 1) * PAGE_SIZE] = bytes([page + 1]) * PAGE_SIZE
    area[1500 * PAGE_SIZE : 1540 * PAGE_SIZE] = b"\xee" * (40 * PAGE_SIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(area))
    ready, told = os.pipe()
    child = os.fork()
    if child == 0:
        for group in range(0, 8, 2):  # its own from here on, of the same content
            for page in range(group * 8, group * 8 + 8):
                area[page * PAGE_SIZE] = page + 1
        os.write(told, b"r")
        while True:
            signal.pause()
    os.read(ready, 1)
    os.close(ready)
    os.close(told)
    yield child, start // PAGE_SIZE
    os.kill(child, signal.SIGKILL)
    reap(child)
    area.close()


def own_pages(pid, first):
    """Those of the area that nobody else maps."""
    with open(f"/proc/{pid}/pagemap", "rb", buffering=0) as file:
        entries = struct.unpack("2048Q", os.pread(file.fileno(), 2048 * 8, first * 8))
    return {page for page, entry in enumerate(entries) if entry >> 56 & 1}


@pytest.mark.parametrize(
    "runs",
    [
        [(0, 64)],
        [(0, 8), (8, 8), (16, 24), (40, 24)],
        [(page, 1) for page in range(64)],
        [(0, 20), (1500, 40)],  # further apart than is looked at at once
        [(1500, 40), (0, 64), (1510, 3)],  # not in order
        [(0, 0), (3, 2), (5, 0), (16, 8)],
    ],
)
def test_reading_copies_nothing_for_the_job(sharer, runs):
    """A pinned page that is shared copy-on-write would become a copy of its own, in the job."""
    pid, first = sharer
    before = own_pages(pid, first)
    assert before == {page for page in range(64) if page // 8 % 2 == 0}
    nr_pages = sum(count for _, count in runs)
    buffer = bytearray(nr_pages * PAGE_SIZE)
    with ProcMem(pid) as mem:
        for _ in range(3):
            buffer[:] = bytes(len(buffer))
            assert mem.read_runs([(first + page, count) for page, count in runs], buffer) == []
            wanted = b"".join(
                (b"\xee" if page >= 1500 else bytes([page + 1])) * PAGE_SIZE
                for begin, count in runs
                for page in range(begin, begin + count)
            )
            assert bytes(buffer) == wanted
    assert own_pages(pid, first) == before


def test_pages_that_are_not_there_are_zeroed_and_named(sharer):
    pid, first = sharer
    hole = first + 2048  # behind the mapping, or in what lies there
    with open(f"/proc/{pid}/maps") as file:
        ranges = [[int(text, 16) // PAGE_SIZE for text in line.split()[0].split("-")] for line in file]
    while any(start <= hole < end for start, end in ranges):
        hole = next(end for start, end in ranges if start <= hole < end)
    buffer = bytearray(b"\xff" * (21 * PAGE_SIZE))
    with ProcMem(pid) as mem:
        assert mem.read_runs([(first, 10), (hole, 1), (first + 1500, 10)], buffer) == [hole]
    assert buffer[10 * PAGE_SIZE : 11 * PAGE_SIZE] == bytes(PAGE_SIZE)
    assert buffer[11 * PAGE_SIZE :] == b"\xee" * (10 * PAGE_SIZE)


def test_another_process_under_the_same_pid_is_not_read():
    """The address space is what counts: after an exec the pid leads to another."""
    out, told = os.pipe()
    target = os.fork()
    if target == 0:
        area = mmap.mmap(-1, 64 * PAGE_SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        area[:] = b"x" * len(area)
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
        os.write(told, b"%d\n" % ctypes.addressof(ctypes.c_char.from_buffer(area)))
        signal.sigwait([signal.SIGUSR1])
        os.execv("/bin/sleep", ["sleep", "60"])
    first = int(os.read(out, 64)) // PAGE_SIZE
    try:
        with ProcMem(target) as mem:
            buffer = bytearray(64 * PAGE_SIZE)
            assert mem.read_runs([(first, 64)], buffer) == []
            assert buffer == b"x" * len(buffer)
            os.kill(target, signal.SIGUSR1)
            deadline = time.monotonic() + 10
            while b"sleep" not in open(f"/proc/{target}/cmdline", "rb").read():  # noqa: SIM115
                assert time.monotonic() < deadline
            with open(f"/proc/{target}/maps") as file:
                ranges = [
                    [int(text, 16) for text in line.split()[0].split("-")]
                    for line in file
                    if "[vsyscall]" not in line
                ]
            for start, end in ranges:
                nr_pages = min((end - start) // PAGE_SIZE, 64)
                with pytest.raises(TargetGoneError):
                    mem.read_runs([(start // PAGE_SIZE, nr_pages)], buffer)
    finally:
        os.kill(target, signal.SIGKILL)
        reap(target)
        os.close(out)
        os.close(told)


def test_runs_that_do_not_fit_the_buffer_are_refused_before_anything_is_touched():
    area = mmap.mmap(-1, 4 * PAGE_SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    first = ctypes.addressof(ctypes.c_char.from_buffer(area)) // PAGE_SIZE
    with ProcMem(os.getpid()) as mem:
        for runs in ([(first, 3)], [(first, 1), (first + 2, 2)], [(first, 1 << 62)] * 4):
            with pytest.raises(ValueError, match="fewer pages"):
                mem.write_runs(runs, b"\xff" * (2 * PAGE_SIZE))
            buffer = bytearray(b"\xee" * (2 * PAGE_SIZE))
            with pytest.raises(ValueError, match="fewer pages"):
                mem.read_runs(runs, buffer)
            assert set(buffer) == {0xEE}
        with pytest.raises(ValueError, match="fewer pages"):
            mem.write_runs([(first, 1)], b"")
        mem.write_runs([], b"")
        assert mem.read_runs([], bytearray()) == []
    assert area[:] == bytes(4 * PAGE_SIZE)
    area.close()
