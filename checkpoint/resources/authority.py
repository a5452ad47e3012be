"""The rule of every rollback: a task gets no access that its own credentials could not obtain now. SECURITY.md lists the exceptions.

Owns the judgement, in one place for everything with a path: descriptors, also those in flight, mapped files, executables, directories,
inotify watches, FIFOs, sockets. A file is looked for without following a link (paths.py) and held by an O_PATH descriptor, which
has no side effect. Each task that gets it must be able to reach it by its path, with its own ids, groups and capabilities, and
to open it for what it had it open for. What is then opened is what that descriptor stands for, with those rights.

The exception, which daemons need: one that may not is given the file all the same if somebody privileged had opened it and handed it down, that is
if it is provably the same file (proof.py) and nothing that decides about access has changed since the point: owner,
group, mode and access list of the file, owner and mode of the directories above it.

What has to be made again is made with the rights of one of the tasks that had it (`with_rights_of`).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from checkpoint.kernel import descriptors, rights
from checkpoint.kernel.fdinfo import O_PATH
from checkpoint.model.holders import Rights, Task, Who
from checkpoint.resources import paths, proof
from checkpoint.resources.proof import Sameness
from images import common_pb2
from snapshotter.base.errors import RestoreConflictError

if TYPE_CHECKING:
    from checkpoint.restore_context import RestoreContext

_Result = TypeVar("_Result")
_READ_WRITE = os.R_OK | os.W_OK
_NAMES = {
    0: "reach it",
    os.R_OK: "read it",
    os.W_OK: "write to it",
    _READ_WRITE: "read and write it",
    os.X_OK: "enter it",
    os.R_OK | os.X_OK: "read and execute it",
}


@dataclass(frozen=True, slots=True)
class Found:
    """A file that a job may have again: held, judged, not opened yet. Close `fd` when it is done with."""

    fd: int
    """O_PATH."""
    rights: Rights | None = None
    """With which it is to be opened; None: snap's own, which are the task's too, or the exception holds."""

    def close(self) -> None:
        """Let go of it."""
        os.close(self.fd)


def access_of(flags: int) -> int:
    """What an open file description can do, by its O_* flags, as access(2) asks for it. O_PATH: nothing."""
    if flags & O_PATH:
        return 0
    return {os.O_RDONLY: os.R_OK, os.O_WRONLY: os.W_OK}.get(flags & os.O_ACCMODE, _READ_WRITE)


def locate(
    ctx: RestoreContext,
    identity: common_pb2.FileIdentity,
    who: Who,
    access: int,
    *,
    had: str = "open",
) -> Found:
    """Find a file by its path, and judge.

    Raises:
        RestoreConflictError: it is gone, another one, or closed to a task that had it.
    """
    return judged(ctx, paths.locate(identity, had=had), identity, who, access)


def judged(
    ctx: RestoreContext,
    fd: int,
    identity: common_pb2.FileIdentity,
    who: Who,
    access: int,
    *,
    along_path: bool = True,
    proven: bool = False,
) -> Found:
    """Judge what an O_PATH descriptor stands for; takes it over.

    Args:
        ctx: the restore.
        fd: found without following a link.
        identity: what it was.
        who: the tasks that get it.
        access: os.R_OK, W_OK, X_OK, or'ed; 0: to hold it is enough (O_PATH).
        along_path: False for a file that was found without a path (by its handle).
        proven: the caller knows that it is what it was, by other means than proof.py's.

    Raises:
        RestoreConflictError: a task may not have it. The descriptor is closed.
    """
    try:
        first: Rights | None = None
        for task in sorted(who):
            able = _able(ctx, task, fd, identity.path if along_path else b"", access)
            if able is None:
                _check_exception(fd, identity, task, access, along_path=along_path, proven=proven)
                return Found(fd)
            first = first or able
        powerful = first is None or ctx.acting.is_all_powerful(first)
        return Found(fd, None if powerful else first)
    except BaseException:
        os.close(fd)
        raise


def _able(ctx: RestoreContext, task: Task, fd: int, path: bytes, access: int) -> Rights | None:
    """The first of its rights with which a task can open a file; None if it cannot."""

    def work() -> bool:
        if path:
            try:
                reached = descriptors.open_without_symlinks(path, O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
            except OSError:
                return False
            try:
                if not os.path.samestat(os.fstat(reached), os.fstat(fd)):
                    return False
            finally:
                os.close(reached)
        return not access or rights.may_access(fd, access)

    for own in task:
        if ctx.acting.is_all_powerful(own):
            return own
        if run(ctx, own, work):
            return own
    return None


def run(ctx: RestoreContext, own: Rights, work: Callable[[], _Result]) -> _Result:
    """Do something with the rights of a task.

    Raises:
        RestoreConflictError: snap may not take them on; or what `work` raises.
    """
    if ctx.acting.is_all_powerful(own):
        return work()
    try:
        ctx.acting.start(own)
    except PermissionError as error:
        raise RestoreConflictError(
            f"whether the job may have its files cannot be judged: {error.strerror}",
            where=f"user {own.uid}",
            hint="run the rollback as root, or as the user of the job",
        ) from error
    return ctx.acting.run(own, work)


def _check_exception(
    fd: int, identity: common_pb2.FileIdentity, task: Task, access: int, *, along_path: bool, proven: bool
) -> None:
    kind = paths.type_name(identity.mode)
    may_not = f"user {task[0].uid}, which the job runs as, may not {_NAMES.get(access, 'open it')} now"
    reason = proof.changed_rights(identity, fd, along_path=along_path)
    if not reason and not proven and proof.compare(identity, fd) is not Sameness.SAME:
        reason = "cannot be proven to be the same as at the point: its file system has neither generations nor birth times"
    if reason:
        raise RestoreConflictError(
            f"the {kind} that the job had {reason}, and {may_not}",
            where=paths.shown(identity.path),
            hint="give that user access again (chown, chmod, setfacl), or roll back to another point",
        )


def open_found(ctx: RestoreContext, found: Found, flags: int, where: str) -> int:
    """A new description of what was judged, with the rights that it was judged by."""
    if found.rights is None:
        return paths.reopen(found.fd, flags, where)
    return run(ctx, found.rights, lambda: paths.reopen(found.fd, flags, where))


def with_rights_of(ctx: RestoreContext, who: Who, work: Callable[[], _Result]) -> _Result:
    """Do something with the rights of one of these tasks: the first that may.

    Raises:
        OSError: what the last of them got.
    """
    refused = PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    for task in sorted(who):
        for own in task:
            try:
                return run(ctx, own, work)
            except PermissionError as error:
                refused = error
    raise refused


def dress(fd: int, uid: int, gid: int, mode: int) -> None:
    """Give a file that was just made the owner and mode that it had, with the rights of the calling thread.

    Raises:
        PermissionError: it may not give it to that user or group.
    """
    made = os.fstat(fd)
    if (made.st_uid, made.st_gid) != (uid, gid):
        descriptors.change_owner(fd, uid if made.st_uid != uid else -1, gid if made.st_gid != gid else -1)
    if made.st_mode & 0o7777 != mode:
        os.chmod(f"/proc/self/fd/{fd}", mode)
