"""Another process's memory: /proc/PID/mem for single pieces, runs of pages in C without the GIL.

`/proc/PID/mem` passes page protections (it writes read-only pages of private mappings, copying them first), and stays
with its address space. process_vm_readv takes half as long, but pins pages: a page that a forked child still shares with its
parent would be copied for that, until the job has all of its memory twice (KERNEL_FACTS.md has the numbers). So it reads
what the page map says nobody else maps.
"""

from __future__ import annotations

import errno
import os
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

from parasite_c._native import ffi, lib

from snapshotter.base.errors import SnapshotterError, wrap_os_error
from snapshotter.base.pages import PAGE_SIZE, Run
from snapshotter.base.runs import PageRuns, as_table

if TYPE_CHECKING:
    from types import TracebackType


class MissingPages:
    """A userfaultfd (the caller's, who closes it) and the ranges that it is registered for.

    Args:
        uffd: of the memory that is written.
        ranges: (first page, nr_pages), ascending and disjoint, each inside one mapping.
    """

    def __init__(self, uffd: int, ranges: Sequence[Run]) -> None:
        self._table = ffi.new("struct snap_run_pages[]", [(int(first), int(nr)) for first, nr in ranges])
        self.native = ffi.new("struct snap_missing *", (uffd, len(ranges), self._table))


_LOOK_FROM = 16
"""LOOK_FROM in native.c: with fewer pages the page map is not looked at."""


def _tables(runs: PageRuns, buffer: bytes | bytearray | memoryview) -> tuple[Any, int, Any]:
    """As C wants it: the runs, how many pages there are in the buffer, and room for the numbers of those that fail."""
    table = as_table(runs)
    nr_pages = memoryview(buffer).nbytes // PAGE_SIZE
    return (
        ffi.from_buffer("struct snap_run_pages[]", table),
        nr_pages,
        ffi.new("uint64_t[]", min(nr_pages, 65536)),
    )


def _open_pagemap(pid: int) -> int:
    """Its page map, or -1: then everything is read through /proc/PID/mem."""
    try:
        return os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return -1


class ProcMem:
    """Reads and writes memory of process `pid`. A context manager. The open descriptor stays with the address space
    it was opened for: after an exec or the end of the process everything is TargetGoneError.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        try:
            self._fd = os.open(f"/proc/{pid}/mem", os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError as error:
            gone = ProcessLookupError(errno.ESRCH, "ESRCH")
            raise wrap_os_error(gone, "cannot open its memory", where=f"task {pid}") from error
        except OSError as error:
            raise wrap_os_error(error, "cannot open its memory", where=f"task {pid}") from error
        self._finalizer = weakref.finalize(self, os.close, self._fd)
        self._pagemap: int | None = None
        """Opened when it is worth looking at; -1: it cannot be had."""

    def fileno(self) -> int:
        return self._fd

    def read(self, addr: int, n: int) -> bytes:
        """N bytes at addr; OSError (EIO) when a page of them is not there, TargetGoneError when all is gone."""
        data = os.pread(self._fd, n, addr)
        if len(data) == n:  # n is 0, too
            return data
        parts = [data]
        done = len(data)
        while done < n:
            piece = os.pread(self._fd, n - done, addr + done)
            if not piece:
                raise self._gone()
            parts.append(piece)
            done += len(piece)
        return b"".join(parts)

    def write(self, addr: int, data: bytes | bytearray | memoryview) -> None:
        """Write all of data at addr, read-only pages included."""
        done = os.pwrite(self._fd, data, addr)
        view = memoryview(data)
        while done < len(view):
            put = os.pwrite(self._fd, view[done:], addr + done)
            if not put:
                raise self._gone()
            done += put

    def _gone(self) -> SnapshotterError:
        """For a transfer of 0 bytes: an unmapped address is EIO, but this address space exists no more."""
        return wrap_os_error(
            ProcessLookupError(errno.ESRCH, "ESRCH"), "its memory is gone", where=f"task {self.pid}"
        )

    def read_runs(self, runs: PageRuns, buffer: memoryview | bytearray) -> list[int]:
        """Fill `buffer` with the pages of `runs`, in order. Returns the page numbers that could not be read;
        their place in the buffer is zeroed.
        """
        table, room, bad = _tables(runs, buffer)
        if not len(table):
            return []
        if self._pagemap is None and len(bad) >= _LOOK_FROM:
            self._pagemap = _open_pagemap(self.pid)
            if self._pagemap >= 0:
                self._pagemap_finalizer = weakref.finalize(self, os.close, self._pagemap)
        pagemap = -1 if self._pagemap is None else self._pagemap
        data = ffi.from_buffer("char[]", buffer, require_writable=True)
        result = lib.snap_read_runs(self.pid, self._fd, pagemap, table, len(table), data, room, bad, len(bad))
        return self._failed(result, bad, "read")

    def write_runs(
        self,
        runs: PageRuns,
        data: bytes | bytearray | memoryview,
        missing: MissingPages | None = None,
    ) -> None:
        """Write the pages of `runs`, in order, from `data`; an error names the first page that is not writable.

        `missing`: where pages that are not there yet can be put in place, which costs half of writing into fresh memory.
        """
        table, size, bad = _tables(runs, data)
        if not len(table):
            return
        where = missing.native if missing is not None else ffi.NULL
        view = ffi.from_buffer("char[]", data)
        result = lib.snap_write_runs(self.pid, self._fd, where, table, len(table), view, size, bad, len(bad))
        if failed := self._failed(result, bad, "written"):
            raise SnapshotterError(
                f"{len(failed)} pages cannot be written, the first at {failed[0] * PAGE_SIZE:#x}",
                where=f"task {self.pid}",
            )

    def _failed(self, result: int, bad: Any, done: str) -> list[int]:
        if result == -errno.EOVERFLOW:
            raise ValueError("the buffer has fewer pages than the runs")
        if result < 0:
            error = OSError(-result, os.strerror(-result))
            raise wrap_os_error(error, "cannot reach its memory", where=f"task {self.pid}") from error
        if result > len(bad):
            raise SnapshotterError(f"{result} pages cannot be {done}", where=f"task {self.pid}")
        return list(bad[0:result]) if result else []

    def close(self) -> None:
        self._finalizer()
        if self._pagemap is not None and self._pagemap >= 0:
            self._pagemap_finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
