"""Working directory, root and umask of a process.

Restore: the directories are found by path without following a link (paths.py), before anything is touched, and stay open until
the stubs have them. A working directory that is another one now is a warning; a root must be the very one.
"""

from __future__ import annotations

import errno
import os
import stat as stat_module
from typing import TYPE_CHECKING

from checkpoint.kernel import distant
from checkpoint.resources import authority, nameless, paths, proof
from checkpoint.resources.files import lookers
from images import common_pb2, task_pb2
from snapshotter.base.errors import Finding, RestoreConflictError, UnsupportedError

if TYPE_CHECKING:
    from checkpoint.parasite import Batch
    from checkpoint.restore_context import RestoreContext

_DIRECTORIES = "task.directories"
_DELETED = " (deleted)"
_OF_PROCESS = {
    "cwd": "its working directory is one of a process ({})",
    "root": "its root directory is one of a process ({})",
}
_ROOT_DELETED, _ROOT_HINT = "its root directory was deleted", "end it, or start it anew"


def look(pid: int, report: list[Finding], tid: int = 0) -> None:
    """What cannot be found again. A working directory that was deleted can be made again (nameless.py).

    With `tid`: of a thread, which may have directories of its own.
    """
    folder = f"/proc/{pid}/task/{tid or pid}"
    root, cwd = os.readlink(f"{folder}/root"), os.readlink(f"{folder}/cwd")
    if _is_deleted(root, distant.stat(f"{folder}/root", os.fsencode(root))):
        report.append(Finding(pid, "root", _ROOT_DELETED, _ROOT_HINT))
    for name, link in (("cwd", cwd), ("root", root)):
        if lookers.process_of(os.fsencode(link)):
            report.append(Finding(pid, name, _OF_PROCESS[name].format(link), "let it chdir elsewhere first"))


def _is_deleted(target: str, info: os.stat_result) -> bool:
    return target.endswith(_DELETED) and not paths.leads_to(os.fsencode(target), info.st_dev, info.st_ino)


def dump(pid: int, message: task_pb2.Process) -> None:
    """Add cwd and root; the umask stands in a file that the task resource reads anyway."""
    message.cwd.CopyFrom(_directory(pid, pid, "cwd"))
    message.root.CopyFrom(_directory(pid, pid, "root"))


def dump_thread(pid: int, tid: int, umask: int, message: task_pb2.FsContext) -> None:
    """The same of a thread that has its own (unshare(CLONE_FS))."""
    message.cwd.CopyFrom(_directory(pid, tid, "cwd"))
    message.root.CopyFrom(_directory(pid, tid, "root"))
    message.umask = umask


def _directory(pid: int, tid: int, link: str) -> common_pb2.FileIdentity:
    path = f"/proc/{pid}/task/{tid}/{link}"
    target = os.readlink(path)
    info = distant.stat(path, os.fsencode(target))
    if lookers.process_of(os.fsencode(target)):
        finding = Finding(pid, link, _OF_PROCESS[link].format(target), "let it chdir elsewhere first")
        raise UnsupportedError.of([finding], pid)
    identity = common_pb2.FileIdentity(
        path=os.fsencode(target), dev=info.st_dev, ino=info.st_ino, mode=info.st_mode
    )
    proof.record(identity, info, path)
    if _is_deleted(target, info):
        if link == "root":
            raise UnsupportedError(_ROOT_DELETED, where=f"task {tid}", hint=_ROOT_HINT)
        identity.path = os.fsencode(target.removesuffix(_DELETED))
        identity.deleted, identity.uid, identity.gid = True, info.st_uid, info.st_gid
    return identity


def check(ctx: RestoreContext, process: task_pb2.Process) -> None:
    """Working directory and root must be there. Touches nothing; the directories stay open until `release`."""
    _check(ctx, process.pid, process)
    for thread in process.threads:
        if thread.HasField("fs"):
            _check(ctx, thread.tid, thread.fs)


def _check(ctx: RestoreContext, tid: int, place: task_pb2.Process | task_pb2.FsContext) -> None:
    own_root, who = os.stat("/"), ctx.holders.of_directories(tid)
    for what, identity in (("working directory", place.cwd), ("root directory", place.root)):
        path, opened = paths.shown(identity.path), _directories(ctx)
        where = f"task {tid}"
        known = _place(identity) in opened
        if identity.deleted:
            if not stat_module.S_ISDIR(identity.mode) or identity is place.root:
                raise RestoreConflictError(f"its {what} is a deleted file", where=where)
            if not known:
                opened[_place(identity)] = os.dup(nameless.make(ctx, identity))
            continue
        try:
            if not known:
                opened[_place(identity)] = paths.find(identity.path)
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise paths.through_a_link(identity.path) from error
            raise RestoreConflictError(
                f"its {what} {path} cannot be opened: {error.strerror}",
                where=where,
                hint="make it again, then roll back",
            ) from error
        info = os.fstat(opened[_place(identity)])
        if not stat_module.S_ISDIR(info.st_mode):
            raise RestoreConflictError(
                f"its {what} {path} is no directory any more",
                where=where,
                hint="put the directory back, then roll back",
            )
        if (info.st_dev, info.st_ino) != (own_root.st_dev, own_root.st_ino):
            # In the root one is without asking; a directory is of use to who may enter it.
            fd = os.dup(opened[_place(identity)])
            authority.judged(ctx, fd, identity, who, os.X_OK).close()
        if proof.compare(identity, opened[_place(identity)]) is not proof.Sameness.OTHER:
            continue
        if identity is place.root:
            raise RestoreConflictError(
                f"its {what} {path} is another directory now than at the point",
                where=where,
                hint="put the old one back: programs trust what they find below their root",
            )
        ctx.warn(f"task {tid}: its {what} {path} is another directory now than at the point")


def _directories(ctx: RestoreContext) -> dict[tuple[bytes, int, int], int]:
    found: dict[tuple[bytes, int, int], int] = ctx.state.setdefault(_DIRECTORIES, {})
    return found


def _place(identity: common_pb2.FileIdentity) -> tuple[bytes, int, int]:
    return identity.path, identity.dev, identity.ino


def release(ctx: RestoreContext) -> None:
    """Close the directories that `check` opened. Safe to call twice."""
    for fd in ctx.state.pop(_DIRECTORIES, {}).values():
        os.close(fd)


def restore(ctx: RestoreContext, batch: Batch, place: task_pb2.Process | task_pb2.FsContext) -> None:
    """Root, cwd, umask: of a process, or of a thread that has its own."""
    own_root = os.stat("/")
    for identity, chroot in ((place.root, True), (place.cwd, False)):
        if chroot and (identity.dev, identity.ino) == (own_root.st_dev, own_root.st_ino):
            continue
        remote = ctx.give(batch, _directories(ctx)[_place(identity)])
        batch.call("fchdir", remote)
        if chroot:
            batch.call("chroot", b".\0")
        batch.call("close", remote)
    batch.call("umask", place.umask)
