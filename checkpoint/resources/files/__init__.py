"""File descriptors: what the job has open, dumped and made again.

One module per kind of descriptor (regular, directory, device, terminal, pipe, eventfd, timerfd, signalfd,
epoll, inotify, unixsock, inet, pidfd), each with its refusals, dump and restore side by side; kinds.py is their
table. Dump: dumping.py (and outside.py, which finds what ties a job to other processes). Restore:
opening.py makes every description once in snap, install.py hands them to the stubs.

This module is all that the engine's orchestrators call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from checkpoint.kernel import proc
from checkpoint.resources import proof, sharing
from checkpoint.resources.files import install as _install
from checkpoint.resources.files import kinds, looking, outside
from checkpoint.resources.files.dumping import FilesDump
from checkpoint.resources.files.fleeting import of_job as look_fleeting
from checkpoint.resources.files.install import highest_fd
from checkpoint.resources.files.kind import descriptors, see
from checkpoint.resources.files.opening import Opening
from images import files_pb2
from snapshotter.base.errors import Finding, TargetGoneError, wrap_os_error

if TYPE_CHECKING:
    from checkpoint.context import DumpContext
    from checkpoint.restore_context import RestoreContext

__all__ = [
    "check",
    "close_all",
    "dump_files",
    "highest_fd",
    "install",
    "install_own",
    "late",
    "look",
    "look_fleeting",
    "look_job",
    "open_all",
]

_STATE = "files"


def look(pid: int, report: list[Finding]) -> None:
    """Adds to `report` each descriptor of a process that cannot be dumped. The process may be running."""
    try:
        for task in sharing.descriptor_tables(pid):
            for fd in descriptors(task):
                seen = see(task, fd)
                if seen is None:
                    continue
                try:
                    finding = kinds.refusal(seen)
                    if seen.link.startswith(b"/") and seen.stat.st_nlink:
                        proof.prepare(f"/proc/{task}/fd/{fd}", seen.stat)
                except FileNotFoundError:
                    continue  # closed meanwhile
                if finding is not None:
                    report.append(finding)
    except (FileNotFoundError, ProcessLookupError):
        return  # the process ended: look at the tree says so
    except PermissionError as error:
        raise wrap_os_error(
            error, "cannot read its descriptors", where=f"task {pid}", hint="run as root, or as its user"
        ) from error


def look_job(pids: Sequence[int], report: list[Finding]) -> None:
    """What only the whole job shows: sockets to processes outside, epoll entries of what nobody has open any more."""
    living = [pid for pid in pids if not _has_ended(pid)]
    outside.look_job(living, report)
    looking.look_job(living, kinds.KINDS, report)


def _has_ended(pid: int) -> bool:
    """Gone or a zombie: it has no descriptors (and kcmp finds those of two zombies equal)."""
    try:
        return proc.read_stat(pid).is_zombie
    except TargetGoneError:
        return True


def dump_files(ctx: DumpContext) -> None:
    """Dumps the descriptors of the whole frozen job: ctx.images["files"] and one "fdtable/<pid>" per table.

    The Process messages are there already; they and their threads get what they share.
    """
    tables = sharing.dump(ctx)
    with FilesDump(ctx, tables) as job:
        job.run()


def _opening(ctx: RestoreContext) -> Opening:
    opening = ctx.state.get(_STATE)
    if opening is None:
        opening = ctx.state[_STATE] = Opening(ctx, ctx.image("files", files_pb2.Files))
    assert isinstance(opening, Opening)
    return opening


def check(ctx: RestoreContext) -> None:
    """Before anything is touched: are the files, devices and terminals still there? Raises RestoreConflictError."""
    _opening(ctx).check()


def open_all(ctx: RestoreContext) -> None:
    """Makes every description, once, in snap. The processes of the job must exist already (pidfds)."""
    _opening(ctx).open_all()


def install(ctx: RestoreContext) -> None:
    """Gives every process its descriptor table; closes what else the stubs have but the supervisor's."""
    for tid, pid, name in ctx.tables():
        if tid == pid:
            _install.install(ctx, _opening(ctx), ctx.stubs[pid], name)


def install_own(ctx: RestoreContext) -> None:
    """The same for threads that do not share with their process; they have just been made."""
    for tid, pid, name in ctx.tables():
        if tid != pid:
            _install.install(ctx, _opening(ctx), ctx.threads[tid], name)


def late(ctx: RestoreContext) -> None:
    """Once all threads exist: owners of SIGIO, locks, the controlling terminal."""
    _install.late(ctx, _opening(ctx))


def close_all(ctx: RestoreContext) -> None:
    """Closes the descriptions in snap, when every stub has its own. Safe to call twice."""
    opening = ctx.state.pop(_STATE, None)
    if isinstance(opening, Opening):
        opening.close()
