"""The VMAs of a living address space, as the image wants them.

Owns reading /proc/PID/smaps together with what the mapped files are (map_files), and `look`, which names
every mapping that cannot be dumped. Reads /proc only; never stops or touches a task.

Files: a mapping whose path still leads to the same inode is kept by identity. One whose file was deleted, or
whose path leads elsewhere (replaced by an upgrade, another mount namespace), is stored with its content as a
Shmem. So is a file of a tmpfs that is mapped shared and writable (shm_open, named semaphores): it is memory of the
job's that happens to have a name. A small file of a disk that is mapped so is kept by identity, and its content besides, in case it
is gone at the rollback: Java's and Valgrind's counters in /tmp are removed when they end, Java's by any other Java.
"""

from __future__ import annotations

import functools
import itertools
import os
import stat as stat_module
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from checkpoint.kernel import distant
from checkpoint.kernel.sys import KCMP_VM, kcmp
from checkpoint.kernel.tasks import children, task_ids
from checkpoint.model import pageplan
from checkpoint.model import vma as model
from checkpoint.model.pageplan import Runs
from checkpoint.model.vma import Mapping
from checkpoint.resources import proof
from checkpoint.resources.memory import identity, named, rings
from images import common_pb2, mm_pb2
from snapshotter.base.errors import Finding, TargetGoneError, UnsupportedError, wrap_os_error

_LOOKS = 5
_ZERO_DEVICE = os.makedev(1, 5)
Range = tuple[int, int]
Register = Callable[[str, os.stat_result, bytes, "mm_pb2.Shmem.Kind | None"], str]
"""(path that opens the object, its stat, the link's text, NAMED or KEPT if that path leads to it) -> image name of the Shmem."""


_Key = tuple[int, int, bytes]
"""What a line of maps says of a file: device, inode, path."""


@dataclass(frozen=True, slots=True)
class _Backing:
    """The file behind a mapping."""

    stat: os.stat_result
    link: bytes
    found: bool
    """The path still leads to it."""

    def is_like(self, other: _Backing) -> bool:
        """The same file in the same place; it may have been written to."""
        return all(
            (
                os.path.samestat(self.stat, other.stat),
                self.stat.st_mode == other.stat.st_mode,
                (self.stat.st_nlink == 0) == (other.stat.st_nlink == 0),
                (self.link, self.found) == (other.link, other.found),
            )
        )

    @property
    def written(self) -> tuple[int, int]:
        """What a write to the file changes."""
        return self.stat.st_size, self.stat.st_mtime_ns


Backings = dict[_Key, _Backing]
"""Files that were looked at in one frozen window, for all processes of the job: nothing about them changes in it."""


@dataclass
class AddressSpace:
    """VMAs and files of one process at one instant."""

    pid: int
    vmas: list[mm_pb2.Vma] = field(default_factory=list)
    files: list[common_pb2.FileIdentity] = field(default_factory=list)
    """FileIdentity, indexed by Vma.file."""
    mappings: list[Mapping] = field(default_factory=list)
    """The lines the VMAs came from, one each."""
    warnings: list[str] = field(default_factory=list)
    text: bytes = b""
    """/proc/PID/maps of that instant: the same text again is the same VMAs."""
    backed: list[int] = field(default_factory=list)
    """Positions of VMAs over files."""
    backings: Backings = field(default_factory=dict)
    index: dict[_Key, int] = field(default_factory=dict)
    """Which of `files` it is."""
    guarded: bool = False
    """Some VMA has guard pages noted."""

    def prepare(self) -> AddressSpace:
        """Work out all of the following, so that the frozen window finds it done."""
        _ = self.anonymous, self.over_files, self.private
        return self

    @functools.cached_property
    def anonymous(self) -> Runs:
        """Pages of private memory without a file."""
        kinds = {model.ANON_PRIVATE, model.DEV_ZERO_PRIVATE}
        return pageplan.of_vmas(vma for vma in self.vmas if vma.kind in kinds)

    @functools.cached_property
    def over_files(self) -> Runs:
        """Pages of private memory over a file."""
        return pageplan.of_vmas(vma for vma in self.vmas if vma.kind in model.OVER_FILE_KINDS)

    @functools.cached_property
    def private_ranges(self) -> list[tuple[int, int]]:
        """[start, end) of each VMA whose changed pages are stored with it."""
        return [(vma.start, vma.end) for vma in model.private_vmas(self.vmas)]

    @functools.cached_property
    def private(self) -> Runs:
        """Their pages."""
        return pageplan.of_ranges(self.private_ranges)


def read_mappings(pid: int) -> list[Mapping]:
    """Parse /proc/PID/smaps.

    Raises:
        TargetGoneError: no such process, or it has no address space any more.
    """
    return model.parse_smaps(_text(pid, "smaps"))


def _text(pid: int, name: str) -> bytes:
    """Smaps or maps, whole."""
    try:
        with open(f"/proc/{pid}/{name}", "rb", buffering=0) as file:
            parts = []
            while part := file.read(1 << 20):
                parts.append(part)
    except (FileNotFoundError, ProcessLookupError) as error:
        raise TargetGoneError("has ended", where=f"task {pid}") from error
    except OSError as error:
        raise wrap_os_error(error, f"cannot read {name}", where=f"task {pid}", hint="run as root") from error
    return b"".join(parts)


def refresh_mappings(text: bytes, known: Iterable[Mapping]) -> list[Mapping] | None:
    """The mappings that /proc/PID/maps shows, with what smaps said of these VMAs a moment ago; None: it has to be read again.

    smaps walks every page (17 ms per GiB), which is too long for a frozen job, and nothing else shows VmFlags. So
    flags are taken from `known` as long as every line of maps is still the same; an madvise of exactly one whole VMA
    in that moment is the price. With any other change smaps is read again.
    """
    flags = {_key(mapping): mapping for mapping in known}
    lines = model.parse_smaps(text)
    found = [flags.get(_key(line)) for line in lines if model.kernel_kind(line) != model.VSYSCALL]
    if None in found:
        return None
    return [mapping for mapping in found if mapping is not None]


def _key(mapping: Mapping) -> tuple[object, ...]:
    """A line of maps."""
    return (
        mapping.start, mapping.end, mapping.prot, mapping.shared, mapping.offset, mapping.dev, mapping.ino, mapping.path,
    )  # fmt: skip


_looked: dict[int, list[Mapping]] = {}
"""pid -> what smaps said at the last look."""


def take_looked(pid: int) -> list[Mapping]:
    """What smaps said at the look, once: it spares pre-copy its first reading. Empty: nothing is known."""
    return _looked.pop(pid, [])


def look(pid: int, report: list[Finding]) -> None:
    """Name every mapping of a process that cannot be dumped."""
    mappings = _looked[pid] = read_mappings(pid)
    rings.look(pid, mappings, report)
    for mapping in mappings:
        found = model.refusal(mapping) or _file_refusal(pid, mapping)
        if found is not None:
            report.append(Finding(pid, mapping.text, *found))
    found_vdso = vdso_refusal(mappings)
    if found_vdso is not None:
        report.append(
            Finding(pid, "mapping [vdso]", found_vdso, "let the job keep the vdso where the kernel put it")
        )


def vdso_refusal(mappings: Iterable[Mapping]) -> str | None:
    """What is wrong when vvar, vvar_vclock and vdso do not follow each other as the kernel lays them out."""
    parts = [m for m in mappings if model.kernel_kind(m) in {model.VDSO, model.VVAR, model.VVAR_VCLOCK}]
    for one, two in itertools.pairwise(parts):
        if one.end > two.start or two.start - one.end > 1 << 20:
            return "vdso and vvar are not beside each other"
    return None


def look_sharing(pids: Iterable[int], report: list[Finding]) -> None:
    """Name every process of a job, its root first, that shares its address space with another, in the job or beside it."""
    pids = list(pids)
    # kcmp(2) orders as well, so that equal ones become neighbours: a job may have thousands of processes.
    ordered = sorted(pids, key=functools.cmp_to_key(_compare_mm))
    pairs = list(itertools.pairwise(ordered))
    if pids:
        outside = set(_relatives(pids[0])) - set(pids)
        pairs += [(pids[0], other) for other in sorted(outside)]
    for pid, other in pairs:
        if _compare_mm(pid, other) == 0:
            report.append(
                Finding(
                    pid,
                    "address space",
                    f"is shared with process {other} (vfork, or clone with CLONE_VM but not CLONE_THREAD)",
                    "take the point when the child has called execve or ended",
                )
            )


def _compare_mm(one: int, two: int) -> int:
    """Order of two address spaces; 0: the same one."""
    try:
        return {0: 0, 1: -1}.get(kcmp(one, two, KCMP_VM), 1)
    except OSError:  # ended meanwhile, a zombie, or not ours to look at: it cannot be part of this job
        return -1 if one < two else 1


def _relatives(pid: int) -> list[int]:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            parent = int(file.read().rpartition(b")")[2].split()[1])
    except OSError:
        return []
    found = [parent] if parent > 1 else []
    for process in (pid, parent):
        if process > 1:
            found += children(process, task_ids(process))
    return found


def _file_refusal(pid: int, mapping: Mapping) -> tuple[str, str] | None:
    if not _has_file(mapping):
        return None
    try:
        stat = distant.stat(map_files_path(pid, mapping), mapping.path)
    except OSError:
        return None
    identity.build_id(map_files_path(pid, mapping), stat, mapping.path)
    proof.prepare(map_files_path(pid, mapping), stat)
    return _kind_refusal(mapping, stat)


def _kind_refusal(mapping: Mapping, stat: os.stat_result) -> tuple[str, str] | None:
    if stat_module.S_ISREG(stat.st_mode):
        return None
    if stat_module.S_ISCHR(stat.st_mode) and stat.st_rdev == _ZERO_DEVICE:
        return None
    if stat_module.S_ISCHR(stat.st_mode) or stat_module.S_ISBLK(stat.st_mode):
        return "memory of a device", "close the device before the take"
    return "is mapped from something that is not a file", "close it before the take"


def _has_file(mapping: Mapping) -> bool:
    if model.kernel_kind(mapping) is not None or mapping.path == rings.NAME:
        return False
    return mapping.shared or not (not mapping.path or mapping.path.startswith(b"["))


def map_files_path(pid: int, mapping: Mapping) -> str:
    """The link that opens what is mapped there."""
    return f"/proc/{pid}/map_files/{mapping.start:x}-{mapping.end:x}"


def read_space(
    pid: int,
    register: Register | None = None,
    hidden: Iterable[Range] = (),
    *,
    known: Iterable[Mapping] = (),
    before: AddressSpace | None = None,
    backings: Backings | None = None,
) -> AddressSpace:
    """Read the VMAs of a process.

    Args:
        pid: the process.
        known: what read_mappings() gave a moment ago: spares reading smaps (see refresh_mappings).
        before: the space as it was a moment ago; where nothing has changed it is brought up to date and returned.
        backings: in the frozen window: files that were looked at in it, and those that are now.
        register: takes shared memory objects; None leaves Vma.shmem empty (pre-copy, looking).
        hidden: ranges that are not the job's (the parasite's own memory).

    Raises:
        TargetGoneError: the process has ended.
        UnsupportedError: a mapping cannot be dumped; `findings` names each. Or they change too fast to be looked at.
    """
    for _ in range(_LOOKS):
        try:
            return _read_space(pid, register, hidden, known, before, backings)
        except _ChangedError:  # it maps and unmaps while it is looked at
            known, before = (), None
    raise UnsupportedError(
        "its mappings changed while they were looked at", where=f"task {pid}", hint="try again"
    )


class _ChangedError(Exception):
    """A mapping went away between two looks at it."""


def _read_space(
    pid: int,
    register: Register | None,
    hidden: Iterable[Range],
    known: Iterable[Mapping],
    before: AddressSpace | None,
    backings: Backings | None,
) -> AddressSpace:
    hidden = sorted(hidden)
    if before is not None:
        text = _text(pid, "maps")
        if text == before.text and not hidden and _bring_up_to_date(before, register, backings):
            return before
        known = before.mappings
    elif known:
        text = _text(pid, "maps")
    mappings = refresh_mappings(text, known) if known else None
    if mappings is None:
        smaps = _text(pid, "smaps")
        mappings, text = model.parse_smaps(smaps), model.maps_of(smaps)
    space = AddressSpace(pid, text=text)
    findings: list[Finding] = []
    for mapping in mappings:
        found = model.refusal(mapping)
        for start, end in _without(mapping.start, mapping.end, hidden):
            if model.kernel_kind(mapping) == model.VSYSCALL:
                continue
            vma = _plain(mapping, start, end)
            if mapping.path == rings.NAME:
                vma.kind, vma.flags, vma.offset = model.URING, model.MAP_SHARED, mapping.offset
                vma.shared_ino = mapping.ino
            if found is None and _has_file(mapping):
                space.backed.append(len(space.vmas))
                found = _with_file(space, vma, mapping, register, backings)
            space.vmas.append(vma)
            space.mappings.append(mapping)
        if found is not None:
            findings.append(Finding(pid, mapping.text, *found))
    if findings:
        raise UnsupportedError(str(findings[0]), findings=tuple(findings))
    return space


def _bring_up_to_date(space: AddressSpace, register: Register | None, backings: Backings | None) -> bool:
    """Look again at what the lines of maps do not say, the files behind them. False: another file, or in another state."""
    fresh: Backings = {}
    for position in space.backed:
        mapping = space.mappings[position]
        key = _file_key(mapping)
        if key in fresh:
            continue
        known = space.backings.get(key)
        now, open_path = _backing(space.pid, mapping, backings)
        if known is None or now is None or not now.is_like(known):
            return False
        fresh[key] = now
        if now.written != known.written and key in space.index:
            space.files[space.index[key]] = identity.make(now.link, now.stat, open_path=open_path)
    space.backings = fresh
    for position in space.backed if register is not None else ():
        vma = space.vmas[position]
        if (vma.kind in model.SHMEM_KINDS or vma.writable_fd) and (
            _with_file(space, vma, space.mappings[position], register, backings) is not None
        ):
            return False
    return True


def _without(start: int, end: int, hidden: Iterable[Range]) -> list[Range]:
    """[start, end) less the hidden ranges: the parasite's memory may have merged with the job's."""
    parts = []
    for low, high in hidden:
        if high <= start or low >= end:
            continue
        if low > start:
            parts.append((start, low))
        start = max(start, high)
    if start < end:
        parts.append((start, end))
    return parts


def _plain(mapping: Mapping, start: int, end: int) -> mm_pb2.Vma:
    kind, flags, anon_name, madvise = _traits(mapping.path, mapping.flags, mapping.shared)
    return mm_pb2.Vma(
        start=start,
        end=end,
        prot=mapping.prot,
        flags=flags,
        kind=kind,
        anon_name=anon_name,
        madvise=madvise,
    )


@functools.lru_cache(maxsize=1024)
def _traits(
    path: bytes, flags: frozenset[str], shared: bool
) -> tuple[model.Kind, int, bytes, tuple[str, ...]]:
    """Kind, MAP_*, name and advice of memory without a file: few different ones among thousands of VMAs."""
    mapping = Mapping(0, 0, 0, shared, 0, 0, 0, path, flags, 0)
    kind = model.kernel_kind(mapping)
    kept = () if kind is not None else tuple(flag for flag in model.KEPT_FLAGS if flag in flags)
    map_flags = model.map_flags(mapping, anonymous=True)
    return model.ANON_PRIVATE if kind is None else kind, map_flags, model.anon_name(path), kept


def _file_key(mapping: Mapping) -> _Key:
    return mapping.dev, mapping.ino, mapping.path


def _backing(pid: int, mapping: Mapping, backings: Backings | None) -> tuple[_Backing | None, str]:
    """The file behind a mapping, and a path that opens it; None: it cannot be looked at.

    Raises:
        _ChangedError: it is not mapped any more.
    """
    open_path = map_files_path(pid, mapping)
    key = _file_key(mapping)
    if backings is not None and key in backings:
        return backings[key], open_path
    try:
        link = os.readlink(os.fsencode(open_path))
        stat = distant.stat(open_path, link)
    except (FileNotFoundError, ProcessLookupError):
        raise _ChangedError from None
    except PermissionError:  # map_files takes CAP_CHECKPOINT_RESTORE; a path that leads to the inode will do
        try:
            stat, link = distant.stat(mapping.path), mapping.path
        except OSError:
            return None, ""
        if stat.st_ino != mapping.ino:
            return None, ""
        open_path = os.fsdecode(mapping.path)
    found = _Backing(stat, link, identity.leads_to(link.removesuffix(model.DELETED), stat))
    if backings is not None and not link.endswith(model.DELETED):
        backings[key] = found  # two deleted files may read the same in two processes
    return found, open_path


def _with_file(
    space: AddressSpace,
    vma: mm_pb2.Vma,
    mapping: Mapping,
    register: Register | None,
    backings: Backings | None,
) -> tuple[str, str] | None:
    """Fill in what the mapping is backed by. Returns a refusal or None."""
    key = _file_key(mapping)
    link_path = map_files_path(space.pid, mapping)
    if key not in space.backings:
        backing, link_path = _backing(space.pid, mapping, backings)
        if backing is None:
            return "what is mapped cannot be looked at (map_files)", "run as root"
        space.backings[key] = backing
    stat, link, found = space.backings[key].stat, space.backings[key].link, space.backings[key].found
    refused = _kind_refusal(mapping, stat)
    if refused is not None:
        return refused
    vma.offset = mapping.offset + (vma.start - mapping.start)
    vma.shared_dev, vma.shared_ino = stat.st_dev, stat.st_ino
    if stat_module.S_ISCHR(stat.st_mode):
        vma.kind = model.DEV_ZERO_PRIVATE
        return None
    vma.readable_fd = True
    vma.writable_fd = mapping.shared and "mw" in mapping.flags
    role = named.mapped_role(link_path, stat, link) if found and vma.writable_fd else None
    in_memory = role == mm_pb2.Shmem.NAMED
    if found and not in_memory:
        vma.kind = model.FILE_SHARED if mapping.shared else model.FILE_PRIVATE
        vma.flags = model.map_flags(mapping, anonymous=False)
        if key not in space.index:
            space.index[key] = len(space.files)
            space.files.append(identity.make(link, stat, open_path=link_path))
        vma.file = space.index[key]
        if role is not None and register is not None:
            register(link_path, stat, link, role)
        return None
    is_zero = link == b"/dev/zero (deleted)"
    if not mapping.shared:
        vma.kind = model.SHMEM_PRIVATE
    else:
        vma.kind = model.ANON_SHARED if is_zero else model.SHMEM_FILE
    vma.flags = model.map_flags(mapping, anonymous=is_zero and mapping.shared)
    if not link.endswith(model.DELETED) and not in_memory:
        space.warnings.append(
            f"task {space.pid}: {os.fsdecode(link)} is mapped, but that path leads to another file now; "
            "the point keeps the content of the one that is mapped"
        )
    if register is not None:
        try:
            vma.shmem = register(link_path, stat, link, role)
        except UnsupportedError as error:
            return error.what, error.hint
    return None
