"""The vdso and its data pages: code of the kernel's that jobs call at addresses they remember.

Owns comparing the running kernel's vdso with the one in an image, and mapping it at its old address with
arch_prctl(ARCH_MAP_VDSO_64). A job may be in the middle of vdso code, and libc keeps pointers into it, so only
the same vdso (same size, same build id, same layout of data pages) will do; another kernel's is refused by name.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from checkpoint.model import vma as model
from checkpoint.resources.memory import identity
from images import mm_pb2
from snapshotter.base.errors import RestoreConflictError

if TYPE_CHECKING:
    from checkpoint.parasite import StubTask

ARCH_MAP_VDSO_64 = 0x2003
_KINDS = (model.VVAR, model.VVAR_VCLOCK, model.VDSO)


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the parts lie relative to the lowest one, in bytes."""

    parts: dict[int, tuple[int, int]]
    """Kind -> [start, end)."""
    build_id: bytes

    @property
    def size_bytes(self) -> int:
        """Of the whole group."""
        return max(end for _, end in self.parts.values())


_own: list[Layout | None] = []


def own_layout() -> Layout | None:
    """Of snap's own process; None when it has no vdso (vdso=0 on the kernel command line)."""
    if not _own:
        with open("/proc/self/maps", "rb") as file:
            found = {}
            for mapping in model.parse_smaps(file.read()):
                kind = model.kernel_kind(mapping)
                if kind in _KINDS:
                    found[int(kind)] = (mapping.start, mapping.end)
        _own.append(_layout(found) if int(model.VDSO) in found else None)
    return _own[0]


def _layout(found: dict[int, tuple[int, int]]) -> Layout:
    base = min(start for start, _ in found.values())
    vdso_start, vdso_end = found[int(model.VDSO)]
    fd = os.open("/proc/self/mem", os.O_RDONLY | os.O_CLOEXEC)
    try:
        code = os.pread(fd, vdso_end - vdso_start, vdso_start)
    finally:
        os.close(fd)
    build_id = identity.elf_build_id(lambda offset, size: code[offset : offset + size], in_memory=True)
    return Layout({kind: (start - base, end - base) for kind, (start, end) in found.items()}, build_id)


def parts_of(mm: mm_pb2.Mm) -> list[mm_pb2.Vma]:
    """The VMAs of an image that belong to the vdso."""
    return [vma for vma in mm.vmas if vma.kind in _KINDS]


def base_address(mm: mm_pb2.Mm) -> int:
    """Where the whole group must be mapped; 0 when the image has no vdso.

    Raises:
        RestoreConflictError: this kernel's vdso is not the one the job knows.
    """
    parts = parts_of(mm)
    code = [vma for vma in parts if vma.kind == model.VDSO]
    if not code:
        return 0
    layout = own_layout()
    if layout is None:
        raise RestoreConflictError(
            "this kernel has no vdso, but the job uses one", where="vdso", hint="boot without vdso=0"
        )
    base = code[0].start - layout.parts[int(model.VDSO)][0]
    same = all(layout.parts.get(vma.kind) == (vma.start - base, vma.end - base) for vma in parts)
    if not same or (mm.vdso_build_id and mm.vdso_build_id != layout.build_id):
        raise RestoreConflictError(
            f"this kernel's vdso (build id {layout.build_id.hex()}) is not the one that the job was using "
            f"({mm.vdso_build_id.hex() or 'another layout'})",
            where="vdso",
            hint="boot the kernel that ran when the point was taken",
        )
    return base


def map_vdso(stub: StubTask, mm: mm_pb2.Mm) -> None:
    """Map it in a stub whose memory is empty: the address is a hint, which the kernel takes only when all is
    free.
    """
    base = base_address(mm)
    layout = own_layout()
    if not base or layout is None:
        return
    batch = stub.batch()
    batch.call("arch_prctl", ARCH_MAP_VDSO_64, base)
    present = {vma.kind for vma in parts_of(mm)}
    for kind, (start, end) in layout.parts.items():
        if kind not in present:
            batch.call("munmap", base + start, end - start)
    stub.run(batch)
    verify_mapped(stub.pid, parts_of(mm))


def verify_mapped(pid: int, wanted: Sequence[mm_pb2.Vma]) -> None:
    """Raise unless the parts are where they should be."""
    with open(f"/proc/{pid}/maps", "rb") as file:
        there = {
            (mapping.start, mapping.end, model.kernel_kind(mapping))
            for mapping in model.parse_smaps(file.read())
        }
    for vma in wanted:
        if (vma.start, vma.end, vma.kind) not in there:
            raise RestoreConflictError(
                f"the kernel did not map the vdso at {vma.start:#x}",
                where=f"process {pid}",
                hint="report this",
            )
