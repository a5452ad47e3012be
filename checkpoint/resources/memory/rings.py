"""The two areas of an io_uring instance that a process has mapped.

The kernel lets nobody choose their address, not even with MAP_FIXED or mremap: so every other hole of the address space is
filled for a moment, and the only one that is left is where the area was. Which instance a mapping is of, its inode says. The
instance itself is a descriptor's (files/uring.py), which hands it over here.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from typing import TYPE_CHECKING

from checkpoint.kernel import proc
from checkpoint.model import vma as model
from checkpoint.restore_context import RestoreContext
from images import mm_pb2
from snapshotter.base.errors import Finding, RestoreConflictError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from checkpoint.model.vma import Mapping
    from checkpoint.parasite import StubTask

NAME = b"anon_inode:[io_uring]"
_KEY = "memory.rings"
_LOWEST = 1 << 16
"""vm.mmap_min_addr at most: nothing is ever mapped below."""
_FILLING = model.MAP_PRIVATE | model.MAP_ANONYMOUS | model.MAP_NORESERVE | model.MAP_FIXED_NOREPLACE


def look(pid: int, mappings: Iterable[Mapping], report: list[Finding]) -> None:
    """Name rings that are mapped and whose descriptor was closed."""
    found = {mapping.ino: mapping for mapping in mappings if mapping.path == NAME}
    if not found:
        return
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            found.pop(os.stat(f"/proc/{pid}/fd/{name}").st_ino, None)
    closed = "a ring of io_uring whose descriptor was closed"
    report += [Finding(pid, mapping.text, closed, model.IO_URING_HINT) for mapping in found.values()]


def put(ctx: RestoreContext, ino: int, fd: int) -> None:
    """Snap's descriptor of an instance that was made again, by the inode that it had. It stays the caller's."""
    ctx.state.setdefault(_KEY, {})[ino] = fd


def map_all(ctx: RestoreContext, stub: StubTask, mm: mm_pb2.Mm) -> None:
    """Map what a process has of rings, once all else is mapped.

    Raises:
        RestoreConflictError: one came to lie elsewhere, or there is no such ring.
    """
    wanted = [vma for vma in mm.vmas if vma.kind == model.URING]
    if not wanted:
        return
    known: dict[int, int] = ctx.state.get(_KEY, {})
    taken = [(entry.start, entry.end) for entry in proc.read_maps(stub.pid)]
    places = [(vma.start, vma.end) for vma in wanted]
    holes = list(model.holes([taken], _LOWEST, model.TASK_SIZE))
    batch = stub.batch()
    for start, end in holes:
        batch.call("mmap", start, end - start, 0, _FILLING, -1, 0)
    got = []
    for vma in wanted:
        if vma.shared_ino not in known:
            raise RestoreConflictError(
                "has a ring of io_uring mapped that no descriptor is of", where=f"{vma.start:#x}"
            )
        batch.call("munmap", vma.start, vma.end - vma.start)
        fd = ctx.give(batch, known[vma.shared_ino])
        got.append(batch.call("mmap", 0, vma.end - vma.start, vma.prot, model.MAP_SHARED, fd, vma.offset))
        batch.call("close", fd)
    for start, end in itertools.chain.from_iterable(model.holes([places], *hole) for hole in holes):
        batch.call("munmap", start, end - start)
    results = stub.run(batch)
    for vma, ref in zip(wanted, got, strict=True):
        if results[ref] != vma.start:
            raise RestoreConflictError(
                f"this kernel maps a ring of io_uring at {results[ref]:#x} instead", where=f"{vma.start:#x}"
            )
