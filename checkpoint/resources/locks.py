"""Locks on files that no descriptor of the job accounts for: mostly those of a file that was opened, locked, mapped and closed.

A lock of flock(2) or of an open file description (F_OFD_SETLK) lasts as long as its description, and a mapping keeps that: Java locks its
counters in /tmp so, for other Javas to see that it lives. /proc/locks has all locks; those that fdinfo shows with some descriptor are the
descriptors' matter (files/). Of the others, those on what the job maps are noted with the mapping, and taken again by the description that
snap maps it from. What else is the job's by its pid, and nobody else's by any descriptor, is named in a warning.

/proc/locks is read before the freeze and after the thaw, never in between: reading it waits for every processor (5-15 ms; percpu_down_write
in fs/locks.c), unless somebody has done so a moment ago, for which `kept_ready` sees. What stands in both was there all the time: a lock
like these comes and goes with a descriptor only.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from checkpoint.kernel import descriptors, fdinfo
from checkpoint.kernel.fdinfo import LockLine
from checkpoint.resources import paths
from images import files_pb2, mm_pb2
from snapshotter.base.errors import RestoreConflictError

if TYPE_CHECKING:
    from checkpoint.context import DumpContext
    from checkpoint.parasite import Batch, Ref, Results
    from checkpoint.resources.memory import AddressSpace
    from checkpoint.restore_context import RestoreContext

_BEFORE, _SEEN = "locks.before", "locks.seen"
_READY_S = 0.006
"""Less than a grace period of RCU."""
_KEPT = frozenset({"FLOCK", "OFDLCK"})
_ON_FILES = frozenset({"FLOCK", "OFDLCK", "POSIX", "LEASE"})
_MAP_PRIVATE = 2
_CAP_LEASE = 1 << 28


def account(ctx: DumpContext, locks: Iterable[LockLine]) -> None:
    """What fdinfo shows of a descriptor of the job."""
    ctx.resources.setdefault(_SEEN, set()).update(locks)


def prepare(ctx: DumpContext) -> None:
    """Note what there is just before the freeze."""
    ctx.resources[_BEFORE] = _read()


def dump(ctx: DumpContext, spaces: Mapping[int, AddressSpace]) -> None:
    """Have found out after the thaw what there was in the frozen window, and what is to be done about it."""
    ctx.later.append(lambda: _answer(ctx, spaces, set(ctx.resources[_BEFORE]).intersection(_read())))


@contextlib.contextmanager
def kept_ready() -> Iterator[None]:
    """For a moment the file can be read without a wait: a thread does so all the time."""
    over = threading.Event()

    def keep() -> None:
        with contextlib.suppress(OSError), open("/proc/locks", "rb", buffering=0) as file:
            while not over.is_set():
                file.seek(0)
                file.read(1)
                over.wait(_READY_S)

    thread = threading.Thread(target=keep, name="snap-locks", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()


def _read() -> list[LockLine]:
    try:
        with open("/proc/locks", "rb", buffering=0) as file:
            return fdinfo.parse_locks(file.readall())
    except OSError:
        return []


@dataclass(frozen=True, slots=True)
class Mapped:
    """A mapping of a file that has a lock."""

    pid: int
    index: int
    """Of the VMA in the image."""
    path: bytes
    is_shared: bool


def _answer(ctx: DumpContext, spaces: Mapping[int, AddressSpace], held: Iterable[LockLine]) -> None:
    seen: Collection[LockLine] = ctx.resources.get(_SEEN, ())
    unseen = [lock for lock in held if lock.kind in _ON_FILES and lock not in seen]
    if not unseen:
        return
    mapped = mapped_places(spaces, {lock.place for lock in unseen})
    unseen = [lock for lock in unseen if lock.pid in ctx.processes or lock.place in mapped]
    for lock in sorted(set(unseen) - held_outside(set(unseen), ctx.processes), key=str):
        found = sorted(mapped.get(lock.place, ()), key=lambda one: (one.pid != lock.pid, not one.is_shared))
        if found and lock.kind in _KEPT:
            image = ctx.images[f"mm/{found[0].pid}"]
            assert isinstance(image, mm_pb2.Mm)
            image.locks.add(vma=found[0].index, lock=message(lock))
            continue
        what = os.fsdecode(found[0].path) if found else f"file {lock.place}"
        ctx.warn(
            f"task {lock.pid}: its lock on {what} ({lock.kind}), to which no descriptor of the job leads, is not kept"
        )


def mapped_places(spaces: Mapping[int, AddressSpace], places: Collection[str]) -> dict[str, list[Mapped]]:
    """Who maps these files."""
    found: dict[str, list[Mapped]] = {}
    for pid, space in spaces.items():
        for index, (vma, mapping) in enumerate(zip(space.vmas, space.mappings, strict=True)):
            if mapping.ino:
                place = f"{mapping.dev >> 20:02x}:{mapping.dev & 0xFFFFF:02x}:{mapping.ino}"
                if place in places:
                    shared = not vma.flags & _MAP_PRIVATE
                    found.setdefault(place, []).append(Mapped(pid, index, mapping.path, shared))
    return found


def held_outside(wanted: set[LockLine], job: Collection[int]) -> set[LockLine]:
    """Which of these locks a descriptor of a process outside the job accounts for. Reads until it has found all of them."""
    found: set[LockLine] = set()
    if not wanted:
        return found
    likely = {lock.pid for lock in wanted}
    others = [int(name) for name in os.listdir("/proc") if name.isdigit() and int(name) not in job]
    for pid in sorted(others, key=lambda pid: pid not in likely):
        try:
            names = os.listdir(f"/proc/{pid}/fdinfo")
        except OSError:
            continue
        for name in names:
            try:
                with open(f"/proc/{pid}/fdinfo/{name}", "rb", buffering=0) as file:
                    text = file.read(1 << 16)
            except OSError:
                continue
            if b"\nlock:" in text:
                found.update(wanted.intersection(fdinfo.parse_fdinfo(text).locks))
        if found == wanted:
            break
    return found


# -- restore ----------------------------------------------------------------------------------------------------


def check(ctx: RestoreContext, image: files_pb2.Files) -> None:
    """Whether somebody outside the old job has locked what the job had locked.

    On file systems whose stat(2) gives another device number than /proc/locks (btrfs, overlayfs) nothing is found; taking the lock tells then.

    Raises:
        RestoreConflictError: somebody has; each file is named.
    """
    wanted = [
        (_place(description), lock, description)
        for description in image.descriptions
        for lock in description.locks
        if description.HasField("regular")
    ]
    for _, lock, description in wanted:
        if lock.kind == "LEASE":
            with contextlib.suppress(FileNotFoundError):  # made again, for its owner; or a conflict by itself
                check_lease(ctx, description, os.lstat(description.regular.identity.path).st_uid)
    by_id = {description.id: description for description in image.descriptions}
    for _, _, name in ctx.tables():
        for entry in ctx.image(name, files_pb2.FdTable).entries:
            wanted += [
                (_place(by_id[entry.description]), lock, by_id[entry.description]) for lock in entry.locks
            ]
    if not wanted:
        return
    present = _read()
    clashes = {line: one for place, lock, one in wanted for line in present if _clash(place, lock, line)}
    outside = held_outside(set(clashes), {*ctx.old, os.getpid()})
    names = dict.fromkeys(clashes[line].regular.identity.path for line in sorted(outside, key=str))
    if names:
        holders = ", ".join(sorted({f"process {line.pid}" for line in outside if line.pid > 0}))
        raise RestoreConflictError(
            "another process has locked it, and the job had it locked",
            where=", ".join(os.fsdecode(name) for name in names),
            hint=f"end {holders or 'that process (see /proc/locks)'}, then roll back",
        )


def check_lease(ctx: RestoreContext, description: files_pb2.Description, owner: int) -> None:
    """Whether a task that gets a description may take a lease on it (fcntl(2)): as the file's owner, or by CAP_LEASE.

    Raises:
        RestoreConflictError: none may.
    """
    who = ctx.holders.of_description(description.id)
    if not any(own.uid == owner or own.capabilities & _CAP_LEASE for task in who for own in task):
        raise RestoreConflictError(
            f"the job had a lease on it, and it belongs to user {owner} now: no task that has it may take one",
            where=paths.shown(description.regular.identity.path),
            hint="give the file its owner again (chown), or roll back to another point",
        )


def _place(description: files_pb2.Description) -> str:
    dev = description.regular.identity.dev
    return f"{os.major(dev):02x}:{os.minor(dev):02x}:{description.regular.identity.ino}"


def _clash(place: str, wanted: files_pb2.FileLock, line: LockLine) -> bool:
    """Whether a lock that is there keeps one from being taken by somebody else."""
    if line.place != place or not (wanted.write or line.write) or "LEASE" in {wanted.kind, line.kind}:
        return False
    if "FLOCK" in {wanted.kind, line.kind}:  # of its own, whatever ranges are locked
        return wanted.kind == line.kind
    return (wanted.to_end or line.start <= wanted.end) and (line.end is None or wanted.start <= line.end)


def restore(batch: Batch, mm: mm_pb2.Mm, vmas: Iterable[mm_pb2.Vma], fd: Ref) -> list[Ref]:
    """Take the locks of mappings that a stub makes from this descriptor of its own: they keep them when it is closed."""
    if not mm.locks:
        return []
    starts = {vma.start for vma in vmas}
    taken = []
    for lock in (one.lock for one in mm.locks if mm.vmas[one.vma].start in starts):
        if lock.kind == "FLOCK":
            taken.append(batch.call("flock", fd, flock_operation(lock), check=False))
        else:
            taken.append(batch.call("fcntl", fd, descriptors.F_OFD_SETLK, flock_struct(lock), check=False))
    return taken


def warn_of_untaken(ctx: RestoreContext, results: Results, taken: Iterable[Ref], pid: int) -> None:
    """The job cannot ask for such a lock, which it has no descriptor of. Java's are tried by other Javas, for a moment."""
    for ref in taken:
        if results[ref] < 0:
            ctx.warn(
                f"task {pid}: a lock that only a mapping of its held is not taken again: {os.strerror(-results[ref])}"
            )


# -- their images -----------------------------------------------------------------------------------------------


def message(line: LockLine) -> files_pb2.FileLock:
    """A lock in an image."""
    return files_pb2.FileLock(
        kind=line.kind,
        write=line.write,
        start=line.start,
        end=line.end or 0,
        to_end=line.end is None,
        pid=max(line.pid, 0),
    )


def flock_operation(lock: files_pb2.FileLock) -> int:
    """The operation of flock(2) for a lock."""
    return (fcntl.LOCK_EX if lock.write else fcntl.LOCK_SH) | fcntl.LOCK_NB


def flock_struct(lock: files_pb2.FileLock) -> bytes:
    """The struct flock of fcntl(2) for a lock."""
    length = 0 if lock.to_end else lock.end - lock.start + 1
    return struct.pack(
        "=hh4xqqi4x", fcntl.F_WRLCK if lock.write else fcntl.F_RDLCK, os.SEEK_SET, lock.start, length, 0
    )
