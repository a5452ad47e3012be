"""VMAs as the engine thinks of them: parsed from /proc/PID/smaps, compared, turned into images and back.

Owns the meaning of a line of maps and of VmFlags. Pure: bytes in, frozen dataclasses out; what a mapped
file really is (device, inode, deleted or not) is asked for by checkpoint.resources.memory.mappings.

VmFlags are documented in Documentation/filesystems/proc.rst; unknown ones are kept and ignored, those that
stand for something this engine cannot rebuild are named by `refusal`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from images import mm_pb2

PAGE_SIZE = 4096
TASK_SIZE = (1 << 47) - PAGE_SIZE
"""End of the user address space without 5-level paging, which nothing uses unless it asks for it."""

PROT_READ, PROT_WRITE, PROT_EXEC = 1, 2, 4
READ_WRITE = PROT_READ | PROT_WRITE
MAP_SHARED, MAP_PRIVATE, MAP_DROPPABLE = 0x1, 0x2, 0x8
MAP_FIXED, MAP_ANONYMOUS, MAP_GROWSDOWN, MAP_NORESERVE = 0x10, 0x20, 0x100, 0x4000
MAP_FIXED_NOREPLACE = 0x100000

Kind = mm_pb2.Vma.Kind
ANON_PRIVATE = mm_pb2.Vma.ANON_PRIVATE
FILE_PRIVATE = mm_pb2.Vma.FILE_PRIVATE
FILE_SHARED = mm_pb2.Vma.FILE_SHARED
ANON_SHARED = mm_pb2.Vma.ANON_SHARED
SHMEM_FILE = mm_pb2.Vma.SHMEM_FILE
SHMEM_PRIVATE = mm_pb2.Vma.SHMEM_PRIVATE
VDSO, VVAR, VVAR_VCLOCK, VSYSCALL = (
    mm_pb2.Vma.VDSO,
    mm_pb2.Vma.VVAR,
    mm_pb2.Vma.VVAR_VCLOCK,
    mm_pb2.Vma.VSYSCALL,
)
DEV_ZERO_PRIVATE = mm_pb2.Vma.DEV_ZERO_PRIVATE
URING = mm_pb2.Vma.URING

PRIVATE_KINDS = frozenset({ANON_PRIVATE, FILE_PRIVATE, SHMEM_PRIVATE, DEV_ZERO_PRIVATE})
"""Kinds whose changed pages are in the mm's own page space."""
OVER_FILE_KINDS = frozenset({FILE_PRIVATE, SHMEM_PRIVATE})
"""Private kinds where an absent page is the file's, so that a zero page of the image must really be
written."""
SHMEM_KINDS = frozenset({ANON_SHARED, SHMEM_FILE, SHMEM_PRIVATE})
KERNEL_KINDS = frozenset({VDSO, VVAR, VVAR_VCLOCK, VSYSCALL})

IO_URING_HINT = (
    "start the program without io_uring: sysctl kernel.io_uring_disabled=2 turns it off for all; MariaDB has "
    "--innodb-use-native-aio=0"
)

KEPT_FLAGS = ("lo", "lf", "dc", "hg", "nh", "dd", "wf", "mg", "sr", "rr", "nr", "sl", "dp")
"""VmFlags that a system call of the job made and that are made again."""

_REFUSED_FLAGS = {
    "io": ("memory of a device (VM_IO)", "close the device or stop using it before the take"),
    "pf": ("a mapping of raw page frames (VM_PFNMAP)", "close the device or stop using it before the take"),
    "mm": (
        "a mapping of device pages (VM_MIXEDMAP, as DAX makes)",
        "keep the file on a file system without DAX",
    ),
    "ht": ("huge pages of hugetlbfs", "use transparent huge pages (MADV_HUGEPAGE) instead"),
    "ss": ("a shadow stack", "start the job with GLIBC_TUNABLES=glibc.cpu.x86_shstk=off"),
    "um": ("a range that userfaultfd serves page by page", "let the job finish with userfaultfd first"),
    "ui": ("a range that userfaultfd serves page by page", "let the job finish with userfaultfd first"),
    "sf": ("a synchronous DAX mapping (MAP_SYNC)", "map the file without MAP_SYNC"),
}

_LINE = re.compile(
    rb"^(?:([0-9a-f]+)-([0-9a-f]+) ([r-])([w-])([x-])([ps]) ([0-9a-f]+) "
    rb"([0-9a-f]+):([0-9a-f]+) (\d+) *([^\n]*)"
    rb"|VmFlags:([ a-z?0-9]*)|ProtectionKey: *(\d+))$",
    re.MULTILINE,
)
_ESCAPE = re.compile(rb"\\([0-7]{3})")
DELETED = b" (deleted)"


class MapsError(ValueError):
    """A line of maps or smaps that does not look like one."""


@dataclass(frozen=True, slots=True)
class Mapping:
    """One VMA as smaps shows it. `path` is unescaped and keeps its " (deleted)"."""

    start: int
    end: int
    prot: int
    shared: bool
    offset: int
    dev: int
    ino: int
    path: bytes
    flags: frozenset[str] = frozenset()
    pkey: int = 0

    @property
    def is_deleted(self) -> bool:
        """The kernel says that no name leads to it any more."""
        return self.path.endswith(DELETED)

    @property
    def plain_path(self) -> bytes:
        """The path without " (deleted)"."""
        return self.path.removesuffix(DELETED)

    @property
    def text(self) -> str:
        """For messages: "7f..-7f.. /path"."""
        name = self.path.decode(errors="backslashreplace") or "anonymous memory"
        return f"mapping {self.start:x}-{self.end:x} ({name})"


_HEAD_LINE = re.compile(rb"^[0-9a-f]+-[0-9a-f]+ [^\n]*\n", re.MULTILINE)


def maps_of(smaps: bytes) -> bytes:
    """What /proc/PID/maps says where smaps says this: the same head line for each VMA (show_map_vma() in the kernel)."""
    return b"".join(_HEAD_LINE.findall(smaps))


def parse_smaps(data: bytes) -> list[Mapping]:
    """Parse /proc/PID/smaps or /proc/PID/maps (then without flags).

    Raises:
        MapsError: a line is cut or is no line of smaps.
    """
    mappings: list[Mapping] = []
    head: tuple[bytes, ...] | None = None
    flags: bytes = b""
    pkey = 0
    for found in _LINE.finditer(data):
        fields = found.groups()
        if fields[0] is not None:
            if head is not None:
                mappings.append(_mapping(head, flags, pkey))
            head, flags, pkey = fields[:11], b"", 0
        elif head is None:
            raise MapsError("VmFlags before the first mapping")
        elif fields[11] is not None:
            flags = fields[11]
        else:
            pkey = int(fields[12])
    if head is not None:
        mappings.append(_mapping(head, flags, pkey))
    elif data.strip():
        raise MapsError(f"no line of maps or smaps: {data[:120]!r}")
    return mappings


def _mapping(head: tuple[bytes, ...], flags: bytes, pkey: int) -> Mapping:
    start, end, read, write, execute, share, offset, major, minor, ino, path = head
    if b"\\" in path:
        path = _ESCAPE.sub(lambda m: bytes([int(m[1], 8) & 0xFF]), path)
    return Mapping(
        start=int(start, 16),
        end=int(end, 16),
        prot=(read == b"r") * PROT_READ | (write == b"w") * PROT_WRITE | (execute == b"x") * PROT_EXEC,
        shared=share == b"s",
        offset=int(offset, 16),
        dev=int(major, 16) << 20 | int(minor, 16),
        ino=int(ino),
        path=path,
        flags=_flag_set(flags),
        pkey=pkey,
    )


@functools.lru_cache(maxsize=1024)
def _flag_set(flags: bytes) -> frozenset[str]:
    """Few different ones among thousands of VMAs."""
    return frozenset(flags.decode().split())


def refusal(mapping: Mapping) -> tuple[str, str] | None:
    """(what, hint) when nothing but the line and its flags says that the VMA cannot be rebuilt."""
    return _refusal(mapping.path, mapping.flags, mapping.prot, mapping.pkey)


@functools.lru_cache(maxsize=1024)
def _refusal(path: bytes, flags: frozenset[str], prot: int, pkey: int) -> tuple[str, str] | None:
    mapping = Mapping(0, 0, prot, False, 0, 0, 0, path, flags, pkey)
    if kernel_kind(mapping) is not None:
        return None
    if mapping.path.startswith(b"/SYSV") and mapping.is_deleted:
        return "a System V shared memory segment", "use POSIX shared memory or memfd_create instead of shmget"
    if mapping.path.startswith(b"/[aio]"):
        return "a ring of asynchronous I/O (io_setup)", "let the job call io_destroy, or use threads for I/O"
    if mapping.path == b"anon_inode:[io_uring]":
        return None  # its descriptor says what is wrong with it (files/uring.py)
    if mapping.path.startswith(b"/secretmem"):
        return (
            "secret memory (memfd_secret) that nobody but the job may read",
            "use ordinary memory with mlock",
        )
    if mapping.path.startswith((b"/anon_hugepage", b"/memfd:")) and "ht" in mapping.flags:
        return _REFUSED_FLAGS["ht"]
    if not mapping.flags.isdisjoint(_REFUSED_FLAGS):
        return next(found for flag, found in _REFUSED_FLAGS.items() if flag in mapping.flags)
    if mapping.path == b"[uprobes]":
        return "a probe of perf or BPF (uprobe) is active", "remove the probe before the take"
    if mapping.path.startswith(b"[") and not mapping.path.startswith((b"[heap]", b"[stack", b"[anon")):
        return f"a special mapping, {mapping.path.decode(errors='replace')}", "none known: the kernel made it"
    if mapping.pkey and mapping.prot != PROT_EXEC:
        return f"memory under protection key {mapping.pkey}", "let the job free the key (pkey_free) first"
    return None


_KERNEL_NAMES = {b"[vdso]": VDSO, b"[vvar]": VVAR, b"[vvar_vclock]": VVAR_VCLOCK, b"[vsyscall]": VSYSCALL}


def kernel_kind(mapping: Mapping) -> Kind | None:
    """VDSO, VVAR, VVAR_VCLOCK or VSYSCALL when the kernel made it."""
    return _KERNEL_NAMES.get(mapping.path)


def anon_name(path: bytes) -> bytes:
    """What PR_SET_VMA_ANON_NAME gave an anonymous VMA, or b""."""
    for prefix in (b"[anon:", b"[anon_shmem:"):
        if path.startswith(prefix) and path.endswith(b"]"):
            return path[len(prefix) : -1]
    return b""


def map_flags(mapping: Mapping, *, anonymous: bool) -> int:
    """MAP_* that make such a VMA (MAP_FIXED_NOREPLACE is the restorer's business)."""
    private = MAP_DROPPABLE if "dp" in mapping.flags else MAP_PRIVATE
    flags = MAP_SHARED if mapping.shared else private
    if anonymous:
        flags |= MAP_ANONYMOUS
    if "gd" in mapping.flags:
        flags |= MAP_GROWSDOWN
    if "nr" in mapping.flags:
        flags |= MAP_NORESERVE
    return flags


def same_pages(old: mm_pb2.Vma, new: mm_pb2.Vma) -> bool:
    """Whether a page at the same address of both is the same page of the same thing."""
    if old.kind != new.kind or old.kind in KERNEL_KINDS:
        return False
    if new.kind in {ANON_PRIVATE, DEV_ZERO_PRIVATE}:
        return True
    return (
        old.shared_dev == new.shared_dev
        and old.shared_ino == new.shared_ino
        and old.offset - old.start == new.offset - new.start
    )


def private_vmas(vmas: Iterable[mm_pb2.Vma]) -> Iterator[mm_pb2.Vma]:
    """Those whose changed pages are in the mm's page space: droppable ones lose theirs by design."""
    return (vma for vma in vmas if vma.kind in PRIVATE_KINDS and "dp" not in vma.madvise)


def holes(vma_sets: Iterable[Iterable[tuple[int, int]]], low: int, high: int) -> Iterator[tuple[int, int]]:
    """Address ranges of [low, high) that no [start, end) of any set touches, lowest first."""
    position = low
    for start, end in sorted(pair for vmas in vma_sets for pair in vmas):
        if start > position:
            yield position, min(start, high)
        position = max(position, end)
        if position >= high:
            return
    if position < high:
        yield position, high
