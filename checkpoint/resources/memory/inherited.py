"""Memory that processes share copy-on-write, restored as such: filled in the parent before it forks, adapted in the child.

Owns which processes are filled early (`early`), and the first of the two stages in which every process gets its memory: its
vdso and writable anonymous memory (`settle`), out of what it inherited as far as that is the same. restore.py has the second.
RestoreContext.holds says whose pages a stub's memory has.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from checkpoint.model import inherited as model
from checkpoint.model import pageplan
from checkpoint.model.pageplan import Runs
from checkpoint.resources.memory import filling, vdso
from checkpoint.restore_context import RestoreContext
from images import mm_pb2, task_pb2
from snapshotter.base.pages import PAGE_SIZE

if TYPE_CHECKING:
    from checkpoint.parasite import StubTask

_WORTH_IT = 32
"""A fork copies page tables, some 40 ns a page; each page that is shared saves more than a microsecond, and its memory."""
_MADV_DONTNEED = 4


def early(ctx: RestoreContext, origins: Mapping[int, int]) -> set[int]:
    """The processes whose memory is put in place before they fork.

    Args:
        ctx: the restore.
        origins: as checkpoint.model.inherited.origins gives them.
    """
    found: set[int] = set()
    for pid, origin in origins.items():
        if origin not in found and _pays(ctx, ctx.processes[pid], ctx.processes[origin]):
            found.add(origin)
    return found


def _pays(ctx: RestoreContext, process: task_pb2.Process, origin: task_pb2.Process) -> bool:
    mine, theirs = ctx.mm(process), ctx.mm(origin)
    ranges = _ranges(model.kept(mine.vmas, theirs.vmas))
    all_there = pageplan.from_list(ctx.source.runs(origin.mm))
    if not len(ranges) or not len(all_there):
        return False
    there = pageplan.intersect(all_there, ranges)
    changed, dropped = (pageplan.from_list(runs) for runs in ctx.source.changes(process.mm, origin.mm))
    nr_same = pageplan.count(pageplan.subtract(pageplan.subtract(there, changed), dropped))
    return nr_same * _WORTH_IT > pageplan.count(all_there)


def settle(ctx: RestoreContext, stub: StubTask, process: task_pb2.Process) -> None:
    """Give a stub its vdso and its writable anonymous memory; all else but the arena is gone from it afterwards."""
    mm = ctx.mm(process)
    base = ctx.holds.get(process.pid, "")
    old = ctx.image(base, mm_pb2.Mm) if base else mm_pb2.Mm()
    kept = model.kept(mm.vmas, old.vmas)
    kept_starts = {piece.vma.start for piece in kept}
    fresh = [vma for vma in mm.vmas if model.is_inheritable(vma) and vma.start not in kept_starts]
    vdso_parts = vdso.parts_of(mm)
    has_vdso = bool(base) and [_place(vma) for vma in vdso_parts] == [
        _place(vma) for vma in vdso.parts_of(old)
    ]
    spared = [(piece.vma.start, piece.end) for piece in kept]
    spared += [(vma.start, vma.end) for vma in vdso_parts if has_vdso]
    stub.unmap_all_but_arena(spared)
    if not has_vdso:
        # First, since its address is only a hint to the kernel.
        vdso.map_vdso(stub, mm)
    pages = pageplan.from_list(ctx.source.runs(process.mm))
    ranges = _ranges(kept)
    wanted = pageplan.subtract(
        pageplan.intersect(pages, pageplan.of_vmas(filter(model.is_inheritable, mm.vmas))), ranges
    )
    with filling.huge_pages_held_back(stub, mm, pages) as sparse:
        _lengthen(stub, kept)
        filling.map_anonymous(stub, fresh, pages)
        if kept:
            changed, dropped = (pageplan.from_list(runs) for runs in ctx.source.changes(process.mm, base))
            _drop(stub, pageplan.intersect(dropped, ranges))
            wanted = pageplan.union(wanted, pageplan.intersect(changed, ranges))
        with filling.missing_pages(stub, fresh, pages, sparse=sparse) as missing:
            ctx.pages_written += filling.fill(ctx, stub, process.mm, pageplan.to_table(wanted), missing)
    ctx.holds[process.pid] = process.mm


def _place(vma: mm_pb2.Vma) -> tuple[int, int, int]:
    return vma.kind, vma.start, vma.end


def _ranges(kept: Iterable[model.Piece]) -> Runs:
    rows = [(piece.vma.start // PAGE_SIZE, piece.end // PAGE_SIZE) for piece in kept]
    return pageplan.normalise(np.asarray(rows, dtype=np.int64).reshape(-1, 2))


def _lengthen(stub: StubTask, kept: Iterable[model.Piece]) -> None:
    """In place, so that it stays one mapping: the kernel would not merge a new one with what was inherited."""
    batch = stub.batch()
    for piece in kept:
        start, end = piece.vma.start, piece.vma.end
        if piece.end < end:
            batch.call("mremap", start, piece.end - start, end - start, 0, 0)
    if len(batch):
        stub.run(batch)


def _drop(stub: StubTask, pages: Runs) -> None:
    batch = stub.batch()
    for first, end in pages.tolist():
        batch.call("madvise", first * PAGE_SIZE, (end - first) * PAGE_SIZE, _MADV_DONTNEED)
    if len(batch):
        stub.run(batch)


def rest_of(vmas: Iterable[mm_pb2.Vma]) -> Sequence[mm_pb2.Vma]:
    """What `settle` leaves to the second stage."""
    return [vma for vma in vmas if not model.is_inheritable(vma)]
