"""Tracking by asynchronous write-protection: userfaultfd with WP_ASYNC, read and reset by PAGEMAP_SCAN.

A process's userfaultfd is made inside it by one remote call (it must be made by the owner of the memory), fetched
with pidfd_getfd and closed there in the same stop, so that nothing of it is left to see in the job. All else is
done from outside. The keeper holds it until the next take.

Why the answers are right:

- The kernel keeps the state per page: "written" is the absence of a mark that only a scan sets. A VMA that is new,
  was moved, or is of another program since exec or fork is not registered, which PAGEMAP_SCAN tells (EPERM with
  CHECK_WPASYNC). Such a VMA is written from end to end; it is registered in the next frozen window. Pages that a
  registered VMA grew by have no mark and are written.
- Marks that are left in a VMA that was never ours (kernels before 6.13 keep them over mremap) would look clean and
  stay so: they are looked for right after registering, and cleared.
- A process of which another userfaultfd has any VMA (EBUSY: the program's own, or that of a job that this process is
  part of as well) is not tracked: two that scan the same marks would take them from each other. Whoever came first
  keeps tracking; the other reads everything at every take.
- A scan takes only what is registered. A VMA that was replaced between the look and the scan while the job runs is
  missed by that scan, but not by the one of the frozen window, where nothing changes.

Registering happens only while every thread of the process stands still, with the VMAs as they are then: registering
a range that is no longer exactly a VMA would split one, and mremap(2) refuses ranges of several VMAs. What a program
maps later beside or inside a registered VMA does not merge with it: mremap(2) of both as one is EFAULT, which it is not without
tracking. Tried on 6.18: registering the newcomer, or unregistering both, merges them only as long as no page of the newcomer was
touched (after that their anon_vma differ, and nothing merges them any more). That instant is before any take could come, so there is
no cure from outside; the tracker compare leaves nothing behind. tests/kernel/test_mremap.py shows what a job sees, and what not.

Not seen are writes into a page that was looked up before the scan and is written later (O_DIRECT in flight). After each scan of a
job that runs, checkpoint/transfers.py waits for them; none is in flight when every task is stopped. checkpoint/tracking.md lists every
way in which a page can change.
"""

from __future__ import annotations

import errno
import functools
import mmap
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from checkpoint.context import FrozenProcess
from checkpoint.freeze import stopped_process
from checkpoint.kernel import proc, threads, uffd
from checkpoint.kernel import sys as ksys
from checkpoint.tracking import keeper
from checkpoint.tracking.base import Probe, Runs, Session, Tracker, new_nonce, pages_of
from snapshotter.base.errors import SnapshotterError, TargetGoneError

_O_CLOEXEC, _O_NONBLOCK = os.O_CLOEXEC, os.O_NONBLOCK


class WriteProtectSession(Session):
    """One take. Holds descriptors of the job's userfaultfds, and the job's lock."""

    def __init__(self, root_pid: int, tasks: Mapping[int, int], parent_nonce: str) -> None:
        self.root_pid = root_pid
        self.tasks = dict(tasks)
        self.nonce = ""
        self._lock = keeper.JobLock(root_pid)
        self._kept: keeper.Kept | None = None
        self._scanner = uffd.Scanner()
        self._pagemaps: dict[int, int] = {}
        self._refused: set[int] = set()
        self._fresh: dict[int, set[tuple[int, int]]] = {}
        self._changed = False
        self._valid: set[int] = set()
        """Processes whose marks tell what was written since the last collect that counts."""
        if not self._lock.acquire():
            return  # another take is under way: this one reads everything and leaves its tracking alone
        self._kept = keeper.find(root_pid, tasks[root_pid], WriteProtectTracker.name)
        if self._kept is None:
            self._kept = keeper.new(WriteProtectTracker.name)
            self._changed = True
        elif parent_nonce and self._kept.nonce == parent_nonce:
            self._valid = {pid for pid in self._kept.uffds if self._kept.tasks.get(pid) == tasks.get(pid)}
        for pid in [pid for pid in self._kept.uffds if self._kept.tasks.get(pid) != tasks.get(pid)]:
            os.close(self._kept.uffds.pop(pid))
        self.nonce = new_nonce()

    def tracks(self, pid: int) -> bool:
        """Those that a userfaultfd could be made in, at the first collect."""
        if self._kept is None or pid in self._refused:
            return False
        return pid in self._kept.uffds or pid not in self._sharers

    @functools.cached_property
    def _sharers(self) -> frozenset[int]:
        """Processes that share their descriptor table (CLONE_FILES): a descriptor made in one of them could be inherited from
        another that runs meanwhile, so that they wait for the frozen window.
        """
        first = threads.same(ksys.KCMP_FILES, list(self.tasks))
        sizes = Counter(first.values())
        return frozenset(pid for pid in first if sizes[first[pid]] > 1)

    def collect(
        self, pid: int, vmas: Sequence[tuple[int, int]], *, frozen: FrozenProcess | None = None
    ) -> Runs | None:
        """See Session.collect."""
        kept = self._kept
        if kept is None or pid in self._refused:
            return None
        if kept.nonce:
            kept.nonce = ""
        if len(vmas) > max_mappings():
            self._refuse(pid)
            return None
        try:
            if pid not in kept.uffds:
                if frozen is None and pid in self._sharers:
                    return None
                self._begin(pid, vmas, frozen)
            elif frozen is not None and not self._register(pid, vmas):
                # The address space of this userfaultfd is gone: the process has made an exec.
                self._drop(pid)
                self._begin(pid, vmas, frozen)
            runs = self._scan(pid, vmas)
        except TargetGoneError:
            raise
        except (OSError, SnapshotterError):
            # Not allowed in this process (no descriptor free, somebody else's ...): it is read in full at every take.
            self._refuse(pid)
            return None
        if pid in self._valid:
            return runs
        self._valid.add(pid)
        return None

    def _refuse(self, pid: int) -> None:
        """Track it no more in this take: it is read as a whole."""
        self._refused.add(pid)
        self._valid.discard(pid)
        self._drop(pid)

    def _drop(self, pid: int) -> None:
        """End the tracking of a process: the kernel clears every mark of this userfaultfd."""
        assert self._kept is not None
        if pid in self._kept.uffds:
            # The keeper's copy goes when confirm() starts another.
            os.close(self._kept.uffds.pop(pid))
            self._changed = True

    def _begin(self, pid: int, vmas: Sequence[tuple[int, int]], frozen: FrozenProcess | None) -> None:
        """Make a userfaultfd in the process and register everything."""
        self._valid.discard(pid)
        if frozen is not None:
            self._create(pid, frozen)
            self._register(pid, vmas)
            return
        with stopped_process(pid) as process:
            exact = private_ranges(pid)
            self._create(pid, process)
            self._register(pid, exact)

    def _create(self, pid: int, process: FrozenProcess) -> None:
        """A userfaultfd of the process, made and closed inside it, open here."""
        assert self._kept is not None
        if process.status.seccomp:
            raise SnapshotterError(
                "a seccomp filter could kill the task for userfaultfd", where=f"task {pid}"
            )
        flags = _O_CLOEXEC | _O_NONBLOCK | uffd.UFFD_USER_MODE_ONLY
        descriptor = process.parasite.make_descriptor("userfaultfd", flags, fault="track.created")
        try:
            uffd.enable(descriptor)
        except OSError:
            os.close(descriptor)
            raise
        self._kept.uffds[pid] = descriptor
        self._changed = True

    def _register(self, pid: int, vmas: Sequence[tuple[int, int]]) -> bool:
        """Register what is not yet ours; the process stands still. False: our descriptor is of another address space.

        Raises:
            SnapshotterError: a VMA is registered with somebody else's userfaultfd.
        """
        assert self._kept is not None
        descriptor, pagemap = self._kept.uffds[pid], self._pagemap(pid)
        fresh = self._fresh.setdefault(pid, set())
        states, errors = uffd.watch(descriptor, pagemap, vmas)
        watched = (states & uffd.WATCHED) != 0
        if np.any(~watched & ((errors == errno.ENOMEM) | (errors == errno.ESRCH))):
            return False
        if np.any(watched & (errors != 0)):
            raise SnapshotterError("somebody else tracks its memory", where=f"task {pid}")
        for at in np.flatnonzero(states == uffd.OURS).tolist():
            start, end = vmas[at]
            fresh.add((start, end))
            if len(self._scanner.marked(pagemap, start, end)):
                uffd.unprotect(descriptor, start, end)
        return True

    def _scan(self, pid: int, vmas: Sequence[tuple[int, int]]) -> Runs:
        """Read and reset. What is not registered, or was registered just now, is written."""
        pagemap = self._pagemap(pid)
        whole = list(self._fresh.pop(pid, ()))
        states, _ = uffd.watch(-1, pagemap, vmas)
        whole += [vmas[at] for at in np.flatnonzero(states == 0).tolist()]
        runs = self._scanner.take(pagemap)
        return np.concatenate((runs, pages_of(whole))) if whole else runs

    def _pagemap(self, pid: int) -> int:
        # Opened anew for each scan, not once: a pagemap descriptor stays with the address space it was opened on.
        fd = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        old = self._pagemaps.pop(pid, -1)
        if old >= 0:
            os.close(old)
        self._pagemaps[pid] = fd
        return fd

    def confirm(self) -> None:
        """Let a keeper hold what was made, and make the nonce valid."""
        kept = self._kept
        if kept is None:
            return
        if self._changed or kept.tasks != self.tasks:
            keeper.keep(kept, self.root_pid, self.tasks[self.root_pid], self.tasks)
        kept.nonce = self.nonce

    def distrust(self, pid: int) -> None:
        """See Session.distrust."""
        if self._kept is not None:
            self._valid.discard(pid)
            self._drop(pid)

    def add(self, pid: int, start_time_ticks: int) -> None:
        """A process that was found only in the frozen window."""
        self.tasks.setdefault(pid, start_time_ticks)

    def forget(self, pid: int) -> None:
        """A process that has ended during the take."""
        self.tasks.pop(pid, None)

    def close(self) -> None:
        """Close our descriptors and unlock the job."""
        for fd in self._pagemaps.values():
            os.close(fd)
        self._pagemaps.clear()
        if self._kept is not None:
            self._kept.close()
            self._kept = None
        self._lock.release()


def max_mappings() -> int:
    """Private mappings of a process that may still be tracked: three quarters of vm.max_map_count.

    New mappings do not merge with registered ones, so that a heap that grows between takes costs one more for each of them. A job
    must not reach the kernel's limit by that.
    """
    return int(Path("/proc/sys/vm/max_map_count").read_text(encoding="ascii")) * 3 // 4


def private_ranges(pid: int) -> list[tuple[int, int]]:
    """Private mappings of a process that stands still."""
    return [
        (entry.start, entry.end)
        for entry in proc.read_maps(pid)
        if entry.perms.endswith("p") and not entry.path.startswith("[v")
    ]


class WriteProtectTracker(Tracker):
    """userfaultfd WP_ASYNC + PAGEMAP_SCAN (Linux 6.7)."""

    name: ClassVar[str] = "write_protect"

    @classmethod
    def probe(cls) -> Probe:
        """A round trip on eight pages of our own: exactly those written come back."""
        return _probe()

    def session(self, root_pid: int, tasks: Mapping[int, int], parent_nonce: str) -> WriteProtectSession:
        """Begin a take."""
        return WriteProtectSession(root_pid, tasks, parent_nonce)


@functools.cache
def _probe() -> Probe:
    size = 8 * mmap.PAGESIZE
    descriptor = pagemap = -1
    try:
        descriptor = ksys.userfaultfd(_O_CLOEXEC | _O_NONBLOCK | uffd.UFFD_USER_MODE_ONLY)
        uffd.enable(descriptor)
        pagemap = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
            memory[:] = b"x" * size
            table = np.frombuffer(memory, dtype=np.uint8)
            start = table.ctypes.data
            scanner = uffd.Scanner(16)
            uffd.register(descriptor, start, start + size)
            scanner.take(pagemap, start, start + size)
            table_writable = memoryview(memory)
            table_writable[mmap.PAGESIZE] = 1
            table_writable[5 * mmap.PAGESIZE] = 1
            found = (scanner.take(pagemap, start, start + size) - (start >> 12)).tolist()
            del table, table_writable
        if found != [[1, 2], [5, 6]]:
            return Probe(WriteProtectTracker.name, ok=False, note=f"a round trip gave {found}")
    except OSError as error:
        return Probe(WriteProtectTracker.name, ok=False, note=f"{error.strerror} (needs Linux 6.7)")
    finally:
        for fd in (descriptor, pagemap):
            if fd >= 0:
                os.close(fd)
    return Probe(WriteProtectTracker.name, ok=True)
