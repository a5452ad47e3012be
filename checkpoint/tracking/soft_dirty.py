"""Tracking by soft-dirty bits: "4" into /proc/PID/clear_refs, then bit 55 of /proc/PID/pagemap.

Needs CONFIG_MEM_SOFT_DIRTY (Debian's kernels have it), nothing inside the job and no descriptor kept open; a keeper
holds the nonce alone. See Documentation/admin-guide/mm/soft-dirty.rst.

Read and reset are two steps here, and a write between them would be lost: so collect() stops a process that runs for
the time of both (milliseconds per GiB, once per take besides the frozen window).

New VMAs are soft-dirty as a whole (VM_SOFTDIRTY), so mmap, mremap and exec need no care. A fork's child inherits clean
bits: dump.py uses no parent for a task that is not older than the parent's dump. A process that is part of two jobs
has one set of bits: whoever resets them makes the other job's nonce invalid first. Another tool that writes clear_refs
(or a snap with another SNAP_RUNTIME_DIR) destroys the knowledge without a trace: do not mix them.
"""

from __future__ import annotations

import contextlib
import functools
import mmap
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

import numpy as np

from checkpoint.context import FrozenProcess
from checkpoint.freeze import stopped_process
from checkpoint.tracking import keeper
from checkpoint.tracking.base import EMPTY, Probe, Runs, Session, Tracker, new_nonce
from snapshotter.base.errors import SnapshotterError, TargetGoneError, wrap_os_error

_SOFT_DIRTY = 1 << 55
_PRESENT_OR_SWAPPED = 3 << 62
_ENTRIES_AT_ONCE = 1 << 17


class SoftDirtySession(Session):
    """One take."""

    def __init__(self, root_pid: int, tasks: Mapping[int, int], parent_nonce: str) -> None:
        self.root_pid = root_pid
        self.tasks = dict(tasks)
        self.nonce = ""
        self._valid: set[int] = set()
        self._kept: keeper.Kept | None = None
        self._others: dict[int, list[tuple[int, int]]] = {}
        self._changed = False
        # A process of two jobs has one set of bits: nobody else may reset them before this take has confirmed its nonce.
        self._locks: dict[int, keeper.JobLock] = {}
        if not all(self._lock(pid) for pid in sorted({root_pid, *tasks})):
            self._unlock()
            return
        self._kept = keeper.find(root_pid, tasks[root_pid], SoftDirtyTracker.name)
        if self._kept is None:
            self._kept = keeper.new(SoftDirtyTracker.name)
            self._changed = True
        elif parent_nonce and self._kept.nonce == parent_nonce:
            self._valid = {pid for pid, start in self._kept.tasks.items() if tasks.get(pid) == start}
        self.nonce = new_nonce()
        self._others = keeper.others(root_pid, SoftDirtyTracker.name)

    def tracks(self, pid: int) -> bool:
        """Every process of the job, unless another take is under way."""
        return self._kept is not None

    def collect(
        self, pid: int, vmas: Sequence[tuple[int, int]], *, frozen: FrozenProcess | None = None
    ) -> Runs | None:
        """See Session.collect."""
        kept = self._kept
        if kept is None:
            return None
        if not self._lock(pid):
            self._valid.discard(pid)
            return None
        if kept.nonce:
            kept.nonce = ""
        for root, start in self._others.pop(pid, ()):
            keeper.invalidate(root, start, SoftDirtyTracker.name)
        still: contextlib.AbstractContextManager[object] = (
            contextlib.nullcontext() if frozen is not None else stopped_process(pid)
        )
        try:
            with still:
                runs = read_soft_dirty(pid, vmas) if pid in self._valid else None
                clear_soft_dirty(pid)
        except FileNotFoundError as error:
            raise TargetGoneError("has ended", where=f"task {pid}") from error
        except OSError as error:
            raise wrap_os_error(error, "cannot read or reset soft-dirty bits", where=f"task {pid}") from error
        self._valid.add(pid)
        return runs

    def distrust(self, pid: int) -> None:
        """See Session.distrust."""
        self._valid.discard(pid)

    def add(self, pid: int, start_time_ticks: int) -> None:
        """A process that was found only in the frozen window."""
        self.tasks.setdefault(pid, start_time_ticks)

    def forget(self, pid: int) -> None:
        """A process that has ended during the take."""
        self.tasks.pop(pid, None)

    def confirm(self) -> None:
        """Let a keeper hold the nonce, and make it valid."""
        kept = self._kept
        if kept is None:
            return
        # Of the others the bits are not this take's.
        reset = {pid: start for pid, start in self.tasks.items() if pid in self._valid}
        if self._changed or kept.tasks != reset:
            keeper.keep(kept, self.root_pid, self.tasks[self.root_pid], reset)
        kept.nonce = self.nonce

    def close(self) -> None:
        """Close our descriptors and unlock the job."""
        if self._kept is not None:
            self._kept.close()
            self._kept = None
        self._unlock()

    def _lock(self, pid: int) -> bool:
        """Whether the bits of this process are this take's."""
        if pid not in self._locks:
            lock = keeper.JobLock(pid)
            if not lock.acquire():
                return False
            self._locks[pid] = lock
        return True

    def _unlock(self) -> None:
        for lock in self._locks.values():
            lock.release()
        self._locks.clear()


def clear_soft_dirty(pid: int) -> None:
    """Reset the bits of a whole address space."""
    with open(f"/proc/{pid}/clear_refs", "wb", buffering=0) as file:
        file.write(b"4")


def read_soft_dirty(pid: int, vmas: Sequence[tuple[int, int]]) -> Runs:
    """Pages of these ranges that have content and the bit."""
    parts: list[Runs] = []
    fd = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        for start, end in vmas:
            parts += _dirty_of(fd, start >> 12, end >> 12)
    finally:
        os.close(fd)
    return np.concatenate(parts) if parts else EMPTY


def _dirty_of(fd: int, first: int, end: int) -> Iterator[Runs]:
    for at in range(first, end, _ENTRIES_AT_ONCE):
        data = os.pread(fd, min(end - at, _ENTRIES_AT_ONCE) * 8, at * 8)
        entries = np.frombuffer(data[: len(data) & ~7], dtype="<u8")
        dirty = ((entries & _SOFT_DIRTY) != 0) & ((entries & _PRESENT_OR_SWAPPED) != 0)
        edges = np.flatnonzero(np.diff(dirty.astype(np.int8), prepend=0, append=0))
        if len(edges):
            yield edges.reshape(-1, 2).astype(np.int64) + at


class SoftDirtyTracker(Tracker):
    """clear_refs and bit 55."""

    name: ClassVar[str] = "soft_dirty"

    @classmethod
    def probe(cls) -> Probe:
        """A round trip on our own memory: without CONFIG_MEM_SOFT_DIRTY the write succeeds and no bit ever shows."""
        return _probe()

    def session(self, root_pid: int, tasks: Mapping[int, int], parent_nonce: str) -> SoftDirtySession:
        """Begin a take."""
        return SoftDirtySession(root_pid, tasks, parent_nonce)


@functools.cache
def _probe() -> Probe:
    """In a child: resetting the bits of this process could hide its writes from a tracker that watches it."""
    try:
        found = _probe_in_child()
    except (OSError, SnapshotterError) as error:
        return Probe(SoftDirtyTracker.name, ok=False, note=str(error))
    if found != b"1,5":
        return Probe(
            SoftDirtyTracker.name, ok=False, note="no soft-dirty bits (CONFIG_MEM_SOFT_DIRTY is not set)"
        )
    return Probe(SoftDirtyTracker.name, ok=True)


def _probe_in_child() -> bytes:
    reader, writer = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        try:
            memory = mmap.mmap(-1, 8 * mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            memory[:] = b"x" * len(memory)
            start = np.frombuffer(memory, dtype=np.uint8).ctypes.data
            clear_soft_dirty(os.getpid())
            memory[mmap.PAGESIZE] = 1
            memory[5 * mmap.PAGESIZE] = 1
            rows = read_soft_dirty(os.getpid(), [(start, start + len(memory))]) - (start >> 12)
            os.write(writer, ",".join(str(first) for first, _ in rows.tolist()).encode())
        finally:
            os._exit(0)
    os.close(writer)
    try:
        os.waitpid(pid, 0)
        return os.read(reader, 100)
    finally:
        os.close(reader)
