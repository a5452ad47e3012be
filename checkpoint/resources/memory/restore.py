"""Putting an address space back: check what it needs, map it, fill it, give it its last attributes.

Owns `check`, `arena_hole`, `restore_mm` and `finish`. The order inside one process matters:

1. Everything of the stub but the arena is unmapped; vdso and writable anonymous memory come first, in some processes
   before they fork (inherited.py).
2. Every other VMA is mapped at its place. MAP_FIXED_NOREPLACE: a collision is an error, never a silent overwrite.
   VMAs that are not writable but have changed pages are made writable over those pages only, so that a large
   reservation is not charged. Huge page advice comes before the pages.
3. Their pages are written from the source's threads. A zero page over a file is written too: the source leaves
   zeros out.
4. Final protection, advice, guard pages, locks, names; brk, auxv, executable; mseal and mlockall last.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from checkpoint.model import pageplan
from checkpoint.model import vma as model
from checkpoint.model.pageplan import Runs
from checkpoint.resources import locks
from checkpoint.resources.memory import filling, identity, inherited, mapped, rings, set_mm, shmem, vdso
from checkpoint.restore_context import RestoreContext
from images import mm_pb2, task_pb2
from snapshotter.base.errors import RestoreConflictError, VerificationError, wrap_os_error
from snapshotter.base.pages import PAGE_SIZE
from snapshotter.base.runs import as_table

if TYPE_CHECKING:
    from checkpoint.parasite import Ref, StubTask

_FILES = "memory.files"
_ARENA_LOW = 1 << 32
_GUARD_GAP = 2 << 20
"""Kept free around every VMA: the kernel keeps 1 MiB below a stack free when it chooses addresses."""
_ZEROS_AT_ONCE = 256

_MADV_LATE = {"dc": 10, "dd": 16, "wf": 18, "mg": 12, "sr": 2, "rr": 1}
_MADV_GUARD_INSTALL = 102
_MLOCK_ONFAULT = 1
_PR_SET_VMA, _PR_SET_VMA_ANON_NAME = 0x53564D41, 0


def check(ctx: RestoreContext) -> None:
    """Whether files, executables and the vdso are still what the job's memory relies on. Touches nothing.

    The files stay open until `finish` or `release`.

    Raises:
        RestoreConflictError: names what changed.
    """
    seen: set[str] = set()
    for process in ctx.processes.values():
        if process.mm and process.mm not in seen:
            seen.add(process.mm)
            mm = ctx.mm(process)
            mapped.check(ctx, process.mm, mm)
            _check_objects(ctx, process.mm, mm)
            _verify_pages(process.mm, mm, pageplan.from_list(ctx.source.runs(process.mm)))
            vdso.base_address(mm)
    shmem.check(ctx)


def _check_objects(ctx: RestoreContext, space: str, mm: mm_pb2.Mm) -> None:
    names = {vma.shmem for vma in mm.vmas if vma.kind in model.SHMEM_KINDS}
    if mm.exe_shmem:
        names.add(mm.exe_shmem)
    names.update(file.kept for file in mm.files if file.kept)
    for name in names:
        if name not in ctx.names:
            raise VerificationError(f"maps shared memory {name!r}, which the point lacks", where=space)
        ctx.image(name, mm_pb2.Shmem)


def arena_hole(mms: Iterable[mm_pb2.Mm], size_bytes: int, avoid: Iterable[tuple[int, int]] = ()) -> int:
    """An address where `size_bytes` are free in all address spaces, with room to their stacks.

    Args:
        mms: the address spaces.
        size_bytes: how much.
        avoid: further ranges that must stay free, such as the stub's own mappings.

    Raises:
        RestoreConflictError: there is none.
    """
    taken = [
        [(vma.start - _GUARD_GAP, vma.end + _GUARD_GAP) for vma in mm.vmas if vma.kind != model.VSYSCALL]
        for mm in mms
    ]
    taken.append([(start - _GUARD_GAP, end + _GUARD_GAP) for start, end in avoid])
    for low in (_ARENA_LOW, 1 << 20):
        for start, end in model.holes(taken, low, model.TASK_SIZE):
            address = (start + PAGE_SIZE - 1) & -PAGE_SIZE
            if end - address >= size_bytes:
                return address
    raise RestoreConflictError(
        f"no {size_bytes} bytes of addresses are free in every address space of the job"
    )


def restore_mm(ctx: RestoreContext, stub: StubTask, process: task_pb2.Process) -> None:
    """Give a stub the memory of a process. Its descriptors are installed already; it has one thread yet."""
    mm = ctx.mm(process)
    try:
        pages = pageplan.from_list(ctx.source.runs(process.mm))
        _verify_pages(process.mm, mm, pages)
        if ctx.holds.get(process.pid) != process.mm:
            inherited.settle(ctx, stub, process)
        rest = inherited.rest_of(mm.vmas)
        with filling.huge_pages_held_back(stub, mm, pages):
            _map_all(ctx, stub, mm, rest, pages)
            ctx.pages_written += _fill(ctx, stub, process.mm, rest, pages)
        rings.map_all(ctx, stub, mm)
        _finish_vmas(stub, mm, pages)
    except OSError as error:
        raise wrap_os_error(error, "cannot rebuild its memory", where=f"process {process.pid}") from error
    set_mm.set_mm(ctx, stub, mm)
    _lock_down(stub, mm)


def finish(ctx: RestoreContext) -> None:
    """After the last process: the seals that had to wait, and snap's descriptors closed. Also after a
    failure.
    """
    try:
        shmem.seal_late(ctx)
    finally:
        release(ctx)


def release(ctx: RestoreContext) -> None:
    """Close snap's descriptors of everything that is mapped. Safe to call twice."""
    shmem.release(ctx)
    mapped.release(ctx)
    for fd in ctx.state.pop(_FILES, {}).values():
        identity.safe_close(fd)


def _verify_pages(space: str, mm: mm_pb2.Mm, pages: Runs) -> None:
    stray = pageplan.subtract(pages, pageplan.of_vmas(model.private_vmas(mm.vmas)))
    if len(stray):
        raise VerificationError(
            f"has a page at {int(stray[0, 0]) * PAGE_SIZE:#x}, outside all VMAs", where=space
        )


def _map_all(
    ctx: RestoreContext, stub: StubTask, mm: mm_pb2.Mm, rest: Iterable[mm_pb2.Vma], pages: Runs
) -> None:
    groups: dict[tuple[int, str, bool], list[mm_pb2.Vma]] = {}
    for vma in rest:
        if vma.kind in model.KERNEL_KINDS or vma.kind == model.URING:
            continue
        writable = vma.writable_fd and not vma.flags & model.MAP_PRIVATE
        if vma.kind in {model.FILE_PRIVATE, model.FILE_SHARED}:
            key = (vma.file, "", writable)
        elif vma.kind in model.SHMEM_KINDS:
            key = (-1, vma.shmem, writable)
        else:
            key = (-1, "/dev/zero" if vma.kind == model.DEV_ZERO_PRIVATE else "", False)
        groups.setdefault(key, []).append(vma)
    batch = stub.batch()
    locked: list[Ref] = []
    for (file, name, writable), vmas in groups.items():
        if file < 0 and not name:
            for vma in vmas:
                filling.map_one(batch, vma, -1, pages)
            continue
        remote_fd = ctx.give(batch, _local_fd(ctx, mm, file, name, writable=writable))
        locked += locks.restore(batch, mm, vmas, remote_fd)
        for vma in vmas:
            filling.map_one(batch, vma, remote_fd, pages)
        batch.call("close", remote_fd)
    locks.warn_of_untaken(ctx, stub.run(batch), locked, stub.pid)


def _local_fd(ctx: RestoreContext, mm: mm_pb2.Mm, file: int, name: str, *, writable: bool) -> int:
    """Snap's descriptor of a mapped file or object, opened once per restore; `finish` closes it."""
    if file >= 0:
        return mapped.descriptor(ctx, mm.files[file], writable=writable)
    opened = ctx.state.setdefault(_FILES, {})
    key = (name, writable)
    if key not in opened:
        if name == "/dev/zero":
            opened[key] = os.open(name, os.O_RDONLY | os.O_CLOEXEC)
        elif writable:
            return shmem.open_shared(ctx, name)
        else:
            opened[key] = shmem.open_read_only(ctx, name)
    found: int = opened[key]
    return found


def _fill(ctx: RestoreContext, stub: StubTask, space: str, rest: Iterable[mm_pb2.Vma], pages: Runs) -> int:
    """Write the pages of the other VMAs; returns how many."""
    private = list(model.private_vmas(rest))
    wanted = pageplan.intersect(pages, pageplan.of_vmas(private))
    over_files = pageplan.intersect(
        wanted, pageplan.of_vmas(v for v in private if v.kind in model.OVER_FILE_KINDS)
    )
    handed = [pageplan.EMPTY]
    nr_pages = filling.fill(
        ctx, stub, space, pageplan.to_table(wanted), seen=lambda runs: handed.append(as_table(runs))
    )
    written = pageplan.from_list(np.concatenate(handed))
    for first, nr_zero in pageplan.to_list(pageplan.subtract(over_files, written)):
        for at in range(first, first + nr_zero, _ZEROS_AT_ONCE):
            size = min(_ZEROS_AT_ONCE, first + nr_zero - at)
            stub.mem.write_runs([(at, size)], memoryview(bytes(size * PAGE_SIZE)))
            nr_pages += size
    return nr_pages


def _finish_vmas(stub: StubTask, mm: mm_pb2.Mm, pages: Runs) -> None:
    batch = stub.batch()
    for vma in mm.vmas:
        if vma.kind in model.KERNEL_KINDS or "dp" in vma.madvise:
            continue
        length = vma.end - vma.start
        if vma.prot & model.READ_WRITE != model.READ_WRITE and filling.hull(vma, pages) is not None:
            batch.call("mprotect", vma.start, length, vma.prot)
        for flag, advice in _MADV_LATE.items():
            if flag in vma.madvise:
                batch.call("madvise", vma.start, length, advice, ok=(errno.EINVAL,) if flag == "mg" else ())
        for start, end in zip(vma.guard_pages[::2], vma.guard_pages[1::2], strict=True):
            batch.call("madvise", start, end - start, _MADV_GUARD_INSTALL)
        if vma.anon_name:
            batch.call(
                "prctl",
                _PR_SET_VMA,
                _PR_SET_VMA_ANON_NAME,
                vma.start,
                length,
                vma.anon_name + b"\0",
                ok=(errno.EINVAL,),
            )
        if "lf" in vma.madvise:
            batch.call("mlock2", vma.start, length, _MLOCK_ONFAULT)
        elif "lo" in vma.madvise:
            # ENOMEM: locked, but a page of it (a guard page, PROT_NONE) cannot be brought in. It was so
            # before, too.
            batch.call("mlock", vma.start, length, ok=(errno.ENOMEM,))
    stub.run(batch)


def _lock_down(stub: StubTask, mm: mm_pb2.Mm) -> None:
    """What must come last: sealed VMAs cannot be changed, and mlockall would lock whatever is mapped after
    it.
    """
    batch = stub.batch()
    for vma in mm.vmas:
        if "sl" in vma.madvise:
            batch.call("mseal", vma.start, vma.end - vma.start, 0)
    if mm.mlockall_flags:
        batch.call("mlockall", mm.mlockall_flags)
    try:
        stub.run(batch)
    except OSError as error:
        raise wrap_os_error(error, "cannot lock or seal its memory", where=f"process {stub.pid}") from error
