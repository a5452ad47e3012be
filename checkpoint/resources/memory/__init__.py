"""Memory: VMAs, pages, shared objects, the vdso and the kernel's notes about an address space.

Dump (checkpoint.dump calls, in this order):
    look(pid, report)                                  before anything, reads /proc only
    space = address_space(ctx, pid, frozen=False); plan = page_plan(ctx, space, written)   pre-copy, any number of times
    space = address_space(ctx, pid, known=...); plan = page_plan(ctx, space, written)      frozen
    sink.put(space_name(pid), to_table(plan.to_read), reader(mem)); sink.close_space(..., to_table(plan.present))
    dump_mm(ctx, proc, space)                          ctx.images["mm/<pid>"]
    shmem.put_all(ctx)                                 frozen, after the descriptors (which register memfds)
    sink.drain(), then shmem.close_all(ctx)

Restore (checkpoint.restore calls, in this order):
    check(ctx)                                         nothing touched yet
    arena_hole(mms, size)
    shmem.open_shared(ctx, name)                       also by the descriptors: one object for all
    early(ctx, origins); settle(ctx, stub, process)    the tree: what forks share, put in place before they fork
    restore_mm(ctx, stub, process)                     per process, its descriptors are installed already
    finish(ctx)                                        after the last process: late seals, closes
    release(ctx)                                       closes what check() opened when nothing is restored
"""

from __future__ import annotations

from checkpoint.resources.memory import shmem
from checkpoint.resources.memory.dump import (
    MmReader,
    address_space,
    dump_mm,
    page_plan,
    parent_vmas,
    reader,
    space_name,
)
from checkpoint.resources.memory.inherited import early, settle
from checkpoint.resources.memory.mappings import (
    AddressSpace,
    Backings,
    look,
    look_sharing,
    read_mappings,
    take_looked,
)
from checkpoint.resources.memory.restore import arena_hole, check, finish, release, restore_mm

__all__ = [
    "AddressSpace",
    "Backings",
    "MmReader",
    "address_space",
    "arena_hole",
    "check",
    "dump_mm",
    "early",
    "finish",
    "look",
    "look_sharing",
    "page_plan",
    "parent_vmas",
    "read_mappings",
    "reader",
    "release",
    "restore_mm",
    "settle",
    "shmem",
    "space_name",
    "take_looked",
]
