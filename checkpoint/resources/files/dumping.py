"""Dumps the descriptor tables of a frozen job: every file description once, every table once.

Owns the run: which descriptors lead to the same description (kcmp), the order of passes, duplicates
for inspection. What one kind of description holds is its own module's.

Passes: 1. every table is read and every new description dumped; 2. `finish` of each description
(pipe contents, socket queues, epoll targets). A descriptor found in a socket's queue is described in
the same way, under snap's own pid, and stays open here until the end.

Told apart: descriptions are bucketed by everything /proc shows of them (device, inode, flags, offset,
link), and within a bucket kept sorted in kcmp's order, so that n descriptors cost n log n comparisons
at worst (many eventfds share one inode) and none at all in the common case.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Self

from checkpoint.kernel import descriptors as sys
from checkpoint.kernel import distant, sockdiag
from checkpoint.kernel import sys as ksys
from checkpoint.kernel.fdinfo import EpollTarget
from checkpoint.resources import locks
from checkpoint.resources.files import kinds, lookers, multicast, outside
from checkpoint.resources.files.kind import Seen, see, see_all, started_ns
from images import files_pb2
from snapshotter.base.errors import SnapshotterError, UnsupportedError, wrap_os_error

if TYPE_CHECKING:
    from checkpoint.context import DumpContext
    from checkpoint.resources.sharing import Tables

_BORROWED_MAX = 256
_DESCRIPTION_LOCKS = frozenset({"FLOCK", "OFDLCK", "LEASE"})


class FilesDump:
    """One dump of the descriptors of a job. A context manager: leaving it closes everything it fetched."""

    def __init__(self, ctx: DumpContext, shared: Tables) -> None:
        self.ctx = ctx
        self.shared = shared
        self.image = files_pb2.Files(format_version=1)
        self.pipes: dict[int, files_pb2.PipeBuffer] = {}
        self.tables: dict[int, dict[int, int]] = {}
        """First task that has a table -> descriptor -> description id."""
        self.examples: dict[int, Seen] = {}
        """description id -> one descriptor that leads to it."""
        self.by_inode: dict[tuple[int, int], list[int]] = {}
        """(dev, ino) -> descriptions of it."""
        self._buckets: dict[tuple[object, ...], list[int]] = {}
        self._systems: dict[int, int] = {}
        self._unfinished: list[int] = []
        self._pidfds: dict[int, int] = {}
        self._borrowed: dict[tuple[int, int], int] = {}
        self._owned: list[int] = []
        self._sockets: dict[int, sockdiag.UnixSocketInfo] | None = None
        self._udp: dict[int, dict[int, int] | None] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for fd in self._pidfds.values():
            os.close(fd)
        for fd in [*self._borrowed.values(), *self._owned]:
            distant.close(fd)
        self._borrowed.clear()
        self._pidfds.clear()
        self._owned.clear()

    @contextmanager
    def borrow(self, seen: Seen) -> Iterator[int]:
        """A duplicate in snap of a descriptor of the job: the same description. Runs no code in the job.

        The first ones stay open until the dump ends, for most descriptions are looked into more than once.
        """
        if seen.pid == os.getpid():
            yield seen.fd
            return
        key = (seen.pid, seen.fd)
        fd = self._borrowed.get(key)
        if fd is not None:
            yield fd
            return
        try:
            if seen.pid not in self._pidfds:
                flags = ksys.PIDFD_THREAD if seen.pid in self.shared.process_of else 0
                self._pidfds[seen.pid] = os.pidfd_open(seen.pid, flags)
            fd = ksys.pidfd_getfd(self._pidfds[seen.pid], seen.fd)
        except OSError as error:
            raise wrap_os_error(
                error, "cannot fetch a descriptor", where=f"task {seen.pid}, {seen.where}"
            ) from error
        if len(self._borrowed) < _BORROWED_MAX:
            self._borrowed[key] = fd
            yield fd
            return
        try:
            yield fd
        finally:
            distant.close(fd, seen.link)

    def keep(self, fd: int) -> Seen:
        """Takes over a descriptor of snap's own (from a socket's queue); it is closed when the dump ends."""
        self._owned.append(fd)
        seen = see(os.getpid(), fd)
        assert seen is not None  # it is ours and open
        return seen

    @property
    def sockets(self) -> dict[int, sockdiag.UnixSocketInfo]:
        """Every unix socket of the network namespace, fetched once."""
        if self._sockets is None:
            self._sockets = sockdiag.unix_sockets()
        return self._sockets

    @functools.cached_property
    def began_ns(self) -> int:
        """When the root of the job was started, see kind.started_ns."""
        return started_ns(self.ctx.processes[self.ctx.root_pid].start_time_ticks)

    @functools.cached_property
    def multicast_groups(self) -> list[multicast.Group]:
        """Every group that somebody in the network namespace is in."""
        return multicast.groups()

    def udp_shutdown(self, family: int, ino: int) -> int | None:
        """Which sides of a UDP socket are shut down (1: reading, 2: writing); None: the kernel cannot say."""
        if family not in self._udp:
            try:
                self._udp[family] = sockdiag.udp_shutdowns(family)
            except OSError:
                self._udp[family] = None
        known = self._udp[family]
        return None if known is None else known.get(ino, 0)

    def pipe_id(self, seen: Seen) -> int:
        """The number of the PipeBuffer of a pipe or FIFO."""
        key = (seen.stat.st_dev << 64) | seen.stat.st_ino
        number = self._pipe_numbers.setdefault(key, len(self._pipe_numbers) + 1)
        if number not in self.pipes:
            self.pipes[number] = files_pb2.PipeBuffer(id=number)
        return number

    @property
    def _pipe_numbers(self) -> dict[int, int]:
        numbers: dict[int, int] = self.ctx.resources.setdefault("files.pipes", {})
        return numbers

    def find_epoll_target(self, epoll: Seen, target: EpollTarget, nth: int) -> int | None:
        """The description that an epoll entry watches."""
        likely = self.tables.get(epoll.pid, {}).get(target.fd)
        others = self.by_inode.get((target.dev, target.ino), [])
        for number in dict.fromkeys([*([] if likely is None else [likely]), *others]):
            seen = self.examples[number]
            if sys.is_epoll_target(seen.pid, seen.fd, epoll.pid, epoll.fd, target.fd, nth):
                return number
        return None

    def describe(self, seen: Seen) -> int:
        """The id of the description behind a descriptor; dumps it when it is new."""
        link = seen.link if seen.stat.st_ino else b""
        info = seen.info
        key = (seen.stat.st_dev, seen.stat.st_ino, info.flags, info.pos, info.mnt_id, link)
        bucket = self._buckets.setdefault(key, [])
        low, high = 0, len(bucket)
        while low < high:
            middle = (low + high) // 2
            other = self.examples[bucket[middle]]
            order = ksys.kcmp(seen.pid, other.pid, ksys.KCMP_FILE, seen.fd, other.fd)
            if order == 0:
                return bucket[middle]
            if order == 3:
                raise SnapshotterError("the kernel gives descriptions no order (kcmp)", where=seen.where)
            low, high = (low, middle) if order == 1 else (middle + 1, high)
        number = self._dump(seen)
        bucket.insert(low, number)
        return number

    def _dump(self, seen: Seen) -> int:
        kind = kinds.kind_of(seen)
        finding = kinds.unknown(seen) if kind is None else kind.refusal(seen)
        if finding is not None or kind is None:
            assert finding is not None  # unknown() gives one
            raise UnsupportedError(
                finding.what, where=f"task {seen.pid}, {seen.where}", hint=finding.hint, findings=(finding,)
            )
        description = self.image.descriptions.add(
            id=len(self.image.descriptions) + 1, flags=seen.info.flags, offset=max(seen.info.pos, 0)
        )
        self.examples[description.id] = seen
        self.by_inode.setdefault((seen.stat.st_dev, seen.stat.st_ino), []).append(description.id)
        kind.dump(self, seen, description)
        locks.account(self.ctx, seen.info.locks)
        for lock in seen.info.locks:
            if lock.kind in _DESCRIPTION_LOCKS:
                description.locks.append(locks.message(lock))
        # Who takes a lease becomes the owner, if there is none.
        leased = any(lock.kind == "LEASE" for lock in seen.info.locks)
        if leased or seen.info.flags & os.O_ASYNC or kind.field in {"unix", "inet", "pipe", "terminal"}:
            self._owner(seen, description)
        self._unfinished.append(description.id)
        return description.id

    def _owner(self, seen: Seen, description: files_pb2.Description) -> None:
        """Who gets SIGIO (F_SETOWN, F_SETSIG)."""
        with self.borrow(seen) as fd:
            kind, pid = sys.get_owner(fd)
            signal = fcntl.fcntl(fd, sys.F_GETSIG)
            ids = (0, 0)
            if pid:
                with contextlib.suppress(OSError):  # a kernel without CONFIG_CHECKPOINT_RESTORE
                    ids = sys.owner_ids(fd)
        if pid or signal:
            description.owner.pid = pid
            description.owner.type = kind
            description.owner.signal = signal
            description.owner.uid, description.owner.euid = ids

    def run(self) -> None:
        """Dumps every table of the job into ctx.images."""
        for task in self.shared.owners():
            self._table(task)
        while self._unfinished:
            number = self._unfinished.pop(0)
            description = self.image.descriptions[number - 1]
            field: str | None = description.WhichOneof("kind")
            assert field is not None  # dump() filled it
            kinds.BY_FIELD[field].finish(self, self.examples[number], description)
        lookers.judge(self)
        outside.record_outside(self)
        self.image.pipes.extend(self.pipes.values())
        self.ctx.images["files"] = self.image

    def _table(self, task: int) -> None:
        table = files_pb2.FdTable(format_version=1)
        numbers = self.tables.setdefault(task, {})
        for seen in see_all(task, self._systems):
            if seen is None:  # cannot be: the job is frozen
                raise SnapshotterError("a descriptor of a frozen task vanished", where=f"task {task}")
            fd = seen.fd
            numbers[fd] = self.describe(seen)
            locks.account(self.ctx, seen.info.locks)
            entry = table.entries.add(fd=fd, description=numbers[fd], cloexec=seen.info.cloexec)
            entry.locks.extend(locks.message(lock) for lock in seen.info.locks if lock.kind == "POSIX")
        self.ctx.images[f"fdtable/{task}"] = table
