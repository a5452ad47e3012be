"""Dumping one address space: its pages planned, its VMAs and the kernel's notes about it put into an Mm.

Owns the order inside one process: `address_space` (smaps + map_files), `page_plan` (pagemap, tracker,
parent), `dump_mm` (the image). The orchestrator reads the planned pages through `reader`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from checkpoint.context import DumpContext, FrozenProcess
from checkpoint.kernel import distant
from checkpoint.kernel.mem import ProcMem
from checkpoint.kernel.pagemap import Content, PageMap
from checkpoint.model import pageplan
from checkpoint.model import vma as model
from checkpoint.model.pageplan import PagePlan, Runs
from checkpoint.model.vma import Mapping
from checkpoint.resources.memory import identity, shmem
from checkpoint.resources.memory.mappings import AddressSpace, Backings, Range, read_mappings, read_space
from images import codec, mm_pb2
from snapshotter.base.errors import SnapshotterError, TargetGoneError, wrap_os_error
from snapshotter.base.pages import PAGE_SIZE, Run
from snapshotter.base.runs import PageRuns

FORMAT_VERSION = 1
_KEY = "memory.parents"
_SEEN = "memory.seen"
_MCL_FUTURE, _MCL_ONFAULT = 2, 4
_MAX_AUXV_BYTES = 4096


class MmReader:
    """PageReader of an address space. Pages that went away are zeroed and remembered in `failed`.

    With `may_go` a process that ends (or makes an exec) meanwhile is remembered in `gone` instead of raised.
    """

    def __init__(self, mem: ProcMem, *, may_go: bool = False) -> None:
        self._mem = mem
        self._may_go = may_go
        self.failed: set[int] = set()
        self.gone = False

    def read_into(self, runs: PageRuns, buffer: memoryview) -> None:
        """PageReader."""
        try:
            failed = self._mem.read_runs(runs, buffer)
        except TargetGoneError:
            if not self._may_go:
                raise
            self.gone = True
            buffer[:] = bytes(len(buffer))
            return
        if failed:
            self.failed.update(failed)


def reader(mem: ProcMem | int, *, may_go: bool = False) -> MmReader:
    """A PageReader for the pages of a process, by its ProcMem or pid. Any thread may use it."""
    return MmReader(ProcMem(mem) if isinstance(mem, int) else mem, may_go=may_go)


def space_name(pid: int) -> str:
    """Name of an address space's image and page space."""
    return f"mm/{pid}"


def address_space(
    ctx: DumpContext,
    pid: int,
    *,
    frozen: bool = True,
    hidden: Iterable[Range] = (),
    known: Iterable[Mapping] = (),
    before: AddressSpace | None = None,
    backings: Backings | None = None,
) -> AddressSpace:
    """Read the VMAs of a process; in the frozen window shared objects are registered as well.

    Args:
        ctx: the dump.
        pid: the process.
        frozen: the frozen window; False in pre-copy, which registers nothing.
        known: the mappings as they were a moment ago, see mappings.refresh_mappings.
        before: see mappings.read_space.
        backings: the same.
        hidden: ranges of the parasite, which are not the job's.

    Raises:
        TargetGoneError, UnsupportedError: see mappings.read_space.
    """

    def register(path: str, stat: os.stat_result, link: bytes, role: mm_pb2.Shmem.Kind | None) -> str:
        if role == mm_pb2.Shmem.KEPT and shmem.keeps_enough(ctx, stat.st_size):
            return ""
        return shmem.register(ctx, path, stat, link, role=role).image_name

    space = read_space(
        pid, register if frozen else None, hidden, known=known, before=before, backings=backings
    )
    for text in space.warnings if frozen else ():
        ctx.warn(text)
    return space


def parent_vmas(ctx: DumpContext, pid: int) -> Sequence[mm_pb2.Vma] | None:
    """VMAs of the same process in the parent point; None when it has none that can be used."""
    cache = ctx.resources.setdefault(_KEY, {})
    name = space_name(pid)
    if name not in cache:
        cache[name] = None
        if ctx.parent is not None and ctx.parent.has_space(name):
            try:
                image = codec.parse(name, ctx.parent.images(name))
            except (KeyError, SnapshotterError):
                image = None
            if isinstance(image, mm_pb2.Mm):
                cache[name] = list(image.vmas)
    found: Sequence[mm_pb2.Vma] | None = cache[name]
    return found


@dataclass(frozen=True, slots=True)
class _Seen:
    """The last look at the pages of a process."""

    content: Content
    bounds: Runs
    """The private VMAs of then."""
    plan: PagePlan
    """With nothing known: everything is to be read."""


def page_plan(ctx: DumpContext, space: AddressSpace, written: Iterable[Run] | Runs | None = None) -> PagePlan:
    """Which pages the address space must store, and which must be read.

    Args:
        ctx: the dump; its parent point is compared with.
        space: the VMAs.
        written: (first page, nr_pages) that the tracker saw written since the parent's dump; None: it cannot tell,
            or the parent must not be used for this process.

    Side effect: Vma.guard_pages of the space are filled in.
    """
    seen: dict[int, _Seen] = ctx.resources.setdefault(_SEEN, {})
    last = seen.get(space.pid)
    try:
        with PageMap(space.pid) as pagemap:
            content = pagemap.content(space.anonymous, space.over_files, last.content if last else None)
    except (FileNotFoundError, ProcessLookupError) as error:
        raise TargetGoneError("has ended", where=f"task {space.pid}") from error
    except OSError as error:
        raise wrap_os_error(error, "cannot read the page map", where=f"task {space.pid}") from error
    _note_guards(space, content.guard)
    bounds = space.private
    if last is None or content is not last.content or not np.array_equal(bounds, last.bounds):
        plan = pageplan.plan(space.vmas, content.present, doubtful=content.doubtful, private=bounds)
        seen[space.pid] = last = _Seen(content, bounds, plan)
    if written is None:
        return last.plan
    return pageplan.plan(
        space.vmas,
        last.plan.present,
        pageplan.from_list(written),
        parent_vmas(ctx, space.pid),
        doubtful=content.doubtful,
        private=bounds,
    )


def _note_guards(space: AddressSpace, guard: Runs) -> None:
    if not len(guard) and not space.guarded:
        return
    space.guarded = bool(len(guard))
    for vma in space.vmas:
        del vma.guard_pages[:]
        if len(guard) and vma.kind in model.PRIVATE_KINDS:
            row = np.asarray([[vma.start // PAGE_SIZE, vma.end // PAGE_SIZE]], dtype=np.int64)
            vma.guard_pages.extend((pageplan.intersect(guard, row) * PAGE_SIZE).ravel().tolist())


def dump_mm(ctx: DumpContext, proc: FrozenProcess, space: AddressSpace) -> str:
    """Add the image of an address space; returns its name. The process is frozen."""
    _note_named(ctx, space)
    image = mm_pb2.Mm(format_version=FORMAT_VERSION)

    def answer() -> None:
        image.vmas.extend(space.vmas)
        image.files.extend(space.files)

    ctx.later.append(answer)
    _dump_fields(image, proc)
    _dump_exe(ctx, image, proc.pid)
    image.auxv = _read(proc.pid, "auxv")[:_MAX_AUXV_BYTES]
    image.brk = proc.brk
    for mapping in space.mappings:
        if model.kernel_kind(mapping) == model.VDSO and proc.mem is not None:
            image.vdso_build_id = vdso_build_id(proc.mem, mapping.start, mapping.end)
    image.mlockall_flags = _mlockall_flags(proc)
    name = space_name(proc.pid)
    ctx.images[name] = image
    return name


def _note_named(ctx: DumpContext, space: AddressSpace) -> None:
    """What a file is that one process maps shared and writable, it is for the others too, who only read it."""
    for vma in (space.vmas[position] for position in space.backed):
        if vma.kind in {model.FILE_SHARED, model.FILE_PRIVATE}:
            name = shmem.registered(ctx, vma.shared_dev, vma.shared_ino)
            if name:
                vma.kind = model.SHMEM_FILE if vma.kind == model.FILE_SHARED else model.SHMEM_PRIVATE
                vma.shmem, vma.file = name, 0
            elif vma.kind == model.FILE_SHARED:
                space.files[vma.file].kept = shmem.kept(ctx, vma.shared_dev, vma.shared_ino)


def _read(pid: int, name: str) -> bytes:
    try:
        with open(f"/proc/{pid}/{name}", "rb", buffering=0) as file:
            return file.read(1 << 20)
    except OSError as error:
        raise wrap_os_error(error, f"cannot read {name}", where=f"task {pid}") from error


def _dump_fields(image: mm_pb2.Mm, process: FrozenProcess) -> None:
    """Fields 26-28 and 45-51 of /proc/PID/stat (proc_pid_stat(5)), counted from 1."""
    assert process.leader is not None
    fields = process.leader.facts.stat_text.rpartition(b")")[2].split()
    numbers = [int(field) for field in fields[1:]]  # numbers[0] is field 4

    def field(number: int) -> int:
        return numbers[number - 4]

    image.start_code, image.end_code, image.start_stack = field(26), field(27), field(28)
    image.start_data, image.end_data, image.start_brk = field(45), field(46), field(47)
    image.arg_start, image.arg_end = field(48), field(49)
    image.env_start, image.env_end = field(50), field(51)


def _dump_exe(ctx: DumpContext, image: mm_pb2.Mm, pid: int) -> None:
    path = f"/proc/{pid}/exe"
    try:
        link = os.readlink(os.fsencode(path))
        stat = distant.stat(path, link)
    except OSError as error:
        raise wrap_os_error(error, "cannot look at the executable", where=f"task {pid}") from error
    plain = link.removesuffix(model.DELETED)
    image.exe.CopyFrom(identity.make(plain, stat, open_path=path))
    if not identity.leads_to(plain, stat):
        image.exe_shmem = shmem.register(ctx, path, stat, link).image_name


def vdso_build_id(mem: ProcMem, start: int, end: int) -> bytes:
    """Build id of the vdso mapped at [start, end) of a process."""

    def read(offset: int, size: int) -> bytes:
        size = max(0, min(size, end - start - offset))
        return mem.read(start + offset, size) if size else b""

    return identity.elf_build_id(read, in_memory=True)


def _mlockall_flags(proc: FrozenProcess) -> int:
    """MCL_FUTURE has no file in /proc: the kernel locks every new mapping, and the parasite's memory is one."""
    if b"VmLck:\t       0 kB" in _read(proc.pid, "status"):
        return 0
    place = proc.parasite.area.start
    for mapping in read_mappings(proc.pid):
        if mapping.start <= place < mapping.end and "lo" in mapping.flags:
            return _MCL_FUTURE | (_MCL_ONFAULT if "lf" in mapping.flags else 0)
    return 0
