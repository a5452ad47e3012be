"""Puts the opened descriptions under their numbers in a restore stub, and what needs the stub itself.

No temporary numbers are needed: the stub's table holds nothing but what restore.py keeps in it (the
supervisor's pidfd, above every number of the job). Entries are installed in ascending order, and the
kernel gives each arriving descriptor the lowest free number, which is never above its final one: either
it has arrived, or one dup3 moves it up, and no number that is in use is ever touched.
"""

from __future__ import annotations

import fcntl
import os
import resource
from typing import TYPE_CHECKING

from checkpoint.kernel import descriptors as sys
from checkpoint.resources import locks
from checkpoint.resources.files import regular
from checkpoint.resources.files.opening import Opening
from checkpoint.resources.locks import flock_operation, flock_struct
from images import files_pb2, task_pb2
from snapshotter.base.errors import SnapshotterError, wrap_os_error

if TYPE_CHECKING:
    from checkpoint.parasite import StubTask
    from checkpoint.restore_context import RestoreContext

_NR_MAX = 0xFFFFFFFF
_F_SETFD, _F_SETLK = 2, 6
_OF_DESCRIPTION = frozenset({"FLOCK", "LEASE"})
_TIOCSCTTY, _TIOCSPGRP, _TCSETS2 = 0x540E, 0x5410, 0x402C542B


def highest_fd(ctx: RestoreContext) -> int:
    """The highest descriptor number of the whole job: the supervisor's pidfd must be above it."""
    tables = (ctx.image(name, files_pb2.FdTable) for _, _, name in ctx.tables())
    return max((entry.fd for table in tables for entry in table.entries), default=2)


def install(ctx: RestoreContext, opening: Opening, stub: StubTask, name: str) -> None:
    """Makes one descriptor table, in a task that has it. Of a thread: what it has is a copy of its maker's."""
    table = sorted(ctx.image(name, files_pb2.FdTable).entries, key=lambda entry: entry.fd)
    supervisor = ctx.supervisor_fd
    if table and supervisor <= table[-1].fd:
        raise SnapshotterError(
            f"the supervisor's descriptor {supervisor} is in the way of the job's {table[-1].fd}",
            where="install",
        )
    _raise_limit(stub.pid, supervisor + 1)
    batch = stub.batch()
    if supervisor:
        batch.call("close_range", 0, supervisor - 1, 0)
    batch.call("close_range", supervisor + 1, _NR_MAX, 0)
    taken: set[int] = set()
    first: dict[int, int] = {}
    lowest = 0
    for entry in table:
        flags = os.O_CLOEXEC if entry.cloexec else 0
        if entry.description in first:
            batch.call("dup3", first[entry.description], entry.fd, flags)
        else:
            arrived = ctx.give(batch, opening.fds[entry.description])
            while lowest in taken:
                lowest += 1
            if lowest == entry.fd:
                if not entry.cloexec:
                    batch.call("fcntl", entry.fd, _F_SETFD, 0)
            else:
                batch.call("dup3", arrived, entry.fd, flags)
                batch.call("close", arrived)
            first[entry.description] = entry.fd
        taken.add(entry.fd)
    stub.run(batch)


def _raise_limit(pid: int, count: int) -> None:
    """RLIMIT_NOFILE of the stub must allow the numbers; the job's own limits are set later."""
    soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft <= count:
        wanted = count + 64
        try:
            top = hard if hard == resource.RLIM_INFINITY else max(hard, wanted)
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (wanted, top))
        except (OSError, ValueError) as error:
            raise SnapshotterError(
                f"cannot allow {wanted} descriptors (RLIMIT_NOFILE)",
                where=f"task {pid}",
                hint="raise ulimit -n",
            ) from error


def late(ctx: RestoreContext, opening: Opening) -> None:
    """What needs all tasks: owners of SIGIO, locks that belong to a process, the controlling terminals."""
    for tid, _, name in ctx.tables():
        for entry in ctx.image(name, files_pb2.FdTable).entries:
            description = opening.descriptions[entry.description]
            if description.HasField("owner") or description.flags & os.O_ASYNC:
                _owner(ctx, opening, description)
            for lock in entry.locks:
                taker = ctx.stubs.get(lock.pid)
                stub = taker if taker and ctx.processes[lock.pid].files == name else ctx.threads[tid]
                _lock(stub, description, "fcntl", entry.fd, _F_SETLK, flock_struct(lock))
    _lock_descriptions(ctx, opening)
    for description in opening.image.descriptions:
        if description.HasField("regular"):
            regular.KIND.settle(opening, description)
    for pid, stub in ctx.stubs.items():
        process = ctx.processes[pid]
        if process.sid == pid:
            _controlling_terminal(ctx, opening, stub, process, ctx.fd_table(process))


def _lock_descriptions(ctx: RestoreContext, opening: Opening) -> None:
    """flock(2) and leases are the description's, but /proc/locks has the process that took them, if that still has it open; of a
    lease that process may be told to give it up.
    """
    locked = {
        number: description
        for number, description in opening.descriptions.items()
        if any(lock.kind in _OF_DESCRIPTION for lock in description.locks)
    }
    if not locked:
        return
    places: dict[int, dict[int, tuple[StubTask, int]]] = {}
    for pid, stub in ctx.stubs.items():
        for entry in ctx.fd_table(ctx.processes[pid]).entries:
            if entry.description in locked:
                places.setdefault(entry.description, {}).setdefault(pid, (stub, entry.fd))
    for number, description in locked.items():
        found = places.get(number, {})
        for lock in description.locks:
            if lock.kind not in _OF_DESCRIPTION:
                continue
            how, lease = flock_operation(lock), fcntl.F_WRLCK if lock.write else fcntl.F_RDLCK
            if found:
                stub, fd = found.get(lock.pid) or next(iter(found.values()))
                if lock.kind == "LEASE":  # the stub is root's still
                    locks.check_lease(ctx, description, os.fstat(opening.fds[number]).st_uid)
                    _lock(stub, description, "fcntl", fd, fcntl.F_SETLEASE, lease)
                else:
                    _lock(stub, description, "flock", fd, how)
                continue
            # It is in a queue, or in a thread's own table.
            try:
                if lock.kind == "LEASE":
                    locks.check_lease(ctx, description, os.fstat(opening.fds[number]).st_uid)
                    fcntl.fcntl(opening.fds[number], fcntl.F_SETLEASE, lease)
                else:
                    fcntl.flock(opening.fds[number], how)
            except OSError as error:
                raise _locked_meanwhile(error, description) from error


def _lock(stub: StubTask, description: files_pb2.Description, call: str, *args: int | bytes) -> None:
    try:
        stub.call(call, *args)
    except OSError as error:
        raise _locked_meanwhile(error, description) from error


def _locked_meanwhile(error: OSError, description: files_pb2.Description) -> SnapshotterError:
    return wrap_os_error(
        error,
        "cannot lock it again as the job had",
        where=os.fsdecode(description.regular.identity.path),
        hint="end the process that has locked it",
    )


def _owner(ctx: RestoreContext, opening: Opening, description: files_pb2.Description) -> None:
    if description.id in opening.owned:
        return
    opening.owned.add(description.id)
    fd = opening.fds[description.id]
    try:
        if description.owner.pid:
            sys.set_owner(fd, description.owner.type, description.owner.pid, *_owner_ids(ctx, description))
        if description.owner.signal:
            fcntl.fcntl(fd, sys.F_SETSIG, description.owner.signal)
    except OSError as error:
        ctx.warn(f"the owner of a descriptor (process {description.owner.pid}) is gone: {error.strerror}")
    if description.flags & os.O_ASYNC:
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_ASYNC)


def _owner_ids(ctx: RestoreContext, description: files_pb2.Description) -> tuple[int, int]:
    """As whom the owner of a descriptor is set. Never as root for those who are not: by its signals they could kill anybody's process."""
    who = ctx.holders.of_description(description.id)
    users = {rights.uid for task in who for rights in task}
    owner = description.owner
    tasks = ctx.task_ids() | {
        process.pgid for process in ctx.processes.values() if process.pgid in ctx.processes
    }
    # The number of a process outside may be another's by now.
    if owner.pid in tasks and {owner.uid, owner.euid} <= users:
        return owner.uid, owner.euid
    least = max(task[0].uid for task in who)
    return least, least


def _controlling_terminal(
    ctx: RestoreContext, opening: Opening, stub: StubTask, process: task_pb2.Process, table: files_pb2.FdTable
) -> None:
    """A session leader of the job takes its terminal back, unless somebody else's session has it now."""
    for entry in table.entries:
        description = opening.descriptions[entry.description]
        if not description.HasField("terminal") or description.terminal.session != process.sid:
            continue
        name = os.fsdecode(description.terminal.identity.path)
        try:
            stub.call("ioctl", entry.fd, _TIOCSCTTY, 0)
            if description.terminal.foreground_pgrp > 0:
                group = description.terminal.foreground_pgrp.to_bytes(4, "little")
                stub.call("ioctl", entry.fd, _TIOCSPGRP, group)
            if description.terminal.termios:
                # The end of the old session hung the terminal up, which reset its settings.
                fcntl.ioctl(opening.fds[description.id], _TCSETS2, description.terminal.termios)
        except OSError as error:
            ctx.warn(f"{name} is not the job's controlling terminal any more: {error.strerror}")
        return
