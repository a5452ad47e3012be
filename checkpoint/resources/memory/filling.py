"""Mapping anonymous memory in a stub and filling it with the point's pages.

Owns the two ways for a page to get there (put in place through a userfaultfd of the stub, or written through its memory
file), and that filling makes no huge pages where the job had small ones.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from checkpoint.kernel import uffd
from checkpoint.kernel.mem import MissingPages
from checkpoint.model import pageplan
from checkpoint.model import vma as model
from checkpoint.model.pageplan import Runs
from checkpoint.restore_context import RestoreContext
from images import mm_pb2
from snapshotter.base.pages import PAGE_SIZE
from snapshotter.base.runs import PageRuns

if TYPE_CHECKING:
    from checkpoint.parasite import Batch, Ref, StubTask

_MADV_EARLY = {"hg": 14, "nh": 15}
_PR_SET_THP_DISABLE = 41
_HUGE_SIZE = 2 << 20
_HUGE_NR_PAGES = _HUGE_SIZE // PAGE_SIZE
_WORTH_A_USERFAULTFD = 4 << 20


def map_anonymous(stub: StubTask, vmas: Iterable[mm_pb2.Vma], pages: Runs) -> None:
    """Map anonymous VMAs, ready to be filled."""
    batch = stub.batch()
    for vma in vmas:
        map_one(batch, vma, -1, pages)
    if len(batch):
        stub.run(batch)


def map_one(batch: Batch, vma: mm_pb2.Vma, fd: int | Ref, pages: Runs) -> None:
    """Map a VMA at its place, writable where it has pages to be filled; `fd` -1: of anonymous memory."""
    length = vma.end - vma.start
    flags = vma.flags | model.MAP_FIXED_NOREPLACE
    if fd != -1:
        flags &= ~model.MAP_ANONYMOUS
    batch.call("mmap", vma.start, length, vma.prot, flags, fd, vma.offset if fd != -1 else 0)
    for flag, advice in _MADV_EARLY.items():
        if flag in vma.madvise:
            batch.call("madvise", vma.start, length, advice, ok=(errno.EINVAL,))
    found = hull(vma, pages)
    if found is not None and vma.prot & model.READ_WRITE != model.READ_WRITE:
        batch.call("mprotect", found[0], found[1] - found[0], model.READ_WRITE)


def hull(vma: mm_pb2.Vma, pages: Runs) -> tuple[int, int] | None:
    """First to last byte of the VMA's pages in the image; None without any."""
    if vma.kind not in model.PRIVATE_KINDS or not len(pages):
        return None
    first, end = vma.start // PAGE_SIZE, vma.end // PAGE_SIZE
    low = int(np.searchsorted(pages[:, 1], first, side="right"))
    high = int(np.searchsorted(pages[:, 0], end, side="left"))
    if low >= high:
        return None
    return max(int(pages[low, 0]), first) * PAGE_SIZE, min(int(pages[high - 1, 1]), end) * PAGE_SIZE


def fill(
    ctx: RestoreContext,
    stub: StubTask,
    space: str,
    only: PageRuns,
    missing: MissingPages | None = None,
    seen: Callable[[PageRuns], None] | None = None,
) -> int:
    """Write pages of a space; returns how many. `seen` is told each piece, one at a time."""
    lock = threading.Lock()
    mem = stub.mem

    def write(runs: PageRuns, data: memoryview) -> None:
        mem.write_runs(runs, data, missing=missing)
        if seen is not None:
            with lock:
                seen(runs)

    return ctx.source.fill(space, write, only)


@contextlib.contextmanager
def missing_pages(
    stub: StubTask, vmas: Iterable[mm_pb2.Vma], pages: Runs, *, sparse: bool
) -> Iterator[MissingPages | None]:
    """For putting the pages of fresh anonymous VMAs in place; None where that is not to be had, or not worth it.

    Only the stub has this memory, and it stands still: nobody waits for a page. What gets huge pages is left out, since a page
    put in place is a small one: VMAs that asked for them, and all where the system gives them without asking and they
    are wanted (`sparse`: they are not).

    Registered are whole VMAs: the kernel splits a mapping where the registered range begins, and where both sides have got
    their anon_vma (mm/vma.c, is_mergeable_anon_vma) it stays so. Inside a VMA of the job no mremap would reach over that.
    """
    huge = not sparse and _huge_pages_for_everybody()
    filled = [
        (vma.start, vma.end, found[1] - found[0])
        for vma in vmas
        if "hg" not in vma.madvise
        and (not huge or "nh" in vma.madvise)
        and (found := hull(vma, pages)) is not None
    ]
    if sum(size_bytes for _, _, size_bytes in filled) < _WORTH_A_USERFAULTFD:
        yield None
        return
    try:
        descriptor = stub.make_descriptor("userfaultfd", os.O_CLOEXEC | uffd.UFFD_USER_MODE_ONLY)
    except OSError:  # not built in, or a container's filter
        yield None
        return
    registered = []
    try:
        with contextlib.suppress(OSError):
            uffd.enable_plain(descriptor)
            for start, end, _ in filled:
                uffd.register_missing(descriptor, start, end)
                registered.append((start // PAGE_SIZE, (end - start) // PAGE_SIZE))
        yield MissingPages(descriptor, registered)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def huge_pages_held_back(stub: StubTask, mm: mm_pb2.Mm, pages: Runs) -> Iterator[bool]:
    """No huge pages meanwhile, where they would bloat the process; whether that is so."""
    sparse = huge_pages_would_bloat(mm, pages)
    if sparse:
        stub.call("prctl", _PR_SET_THP_DISABLE, 1, 0, 0, 0)
    yield sparse
    if sparse:
        stub.call("prctl", _PR_SET_THP_DISABLE, 0, 0, 0, 0)


def huge_pages_would_bloat(mm: mm_pb2.Mm, pages: Runs) -> bool:
    """Whether filling would make huge pages of which much was never there.

    Only where the system gives huge pages to everybody ("always"), nothing of the job asked for them, and less than
    nine tenths of the huge pages that the fill would touch are pages of the image.
    """
    if any("hg" in vma.madvise for vma in mm.vmas) or not _huge_pages_for_everybody():
        return False
    whole = [
        (-(-vma.start // _HUGE_SIZE) * _HUGE_NR_PAGES, vma.end // _HUGE_SIZE * _HUGE_NR_PAGES)
        for vma in mm.vmas
        if vma.kind in {model.ANON_PRIVATE, model.DEV_ZERO_PRIVATE} and "nh" not in vma.madvise
    ]
    inside = pageplan.intersect(pages, pageplan.normalise(np.asarray(whole, dtype=np.int64).reshape(-1, 2)))
    touched = inside.copy()
    touched[:, 0] -= touched[:, 0] % _HUGE_NR_PAGES
    touched[:, 1] += -touched[:, 1] % _HUGE_NR_PAGES
    return 10 * pageplan.count(inside) < 9 * pageplan.count(pageplan.normalise(touched))


def _huge_pages_for_everybody() -> bool:
    try:
        with open("/sys/kernel/mm/transparent_hugepage/enabled", "rb") as file:
            return b"[always]" in file.read()
    except OSError:
        return False
