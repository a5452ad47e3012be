"""The one error tree: what failed, where, and what to do about it.

Owns every error that may reach a user. An error carries `what` (the sentence), `where` (task,
descriptor, mapping or file it concerns) and `hint` (the next step). The exit status is the class's;
the table of statuses is in README.md. OSErrors are wrapped once, at the kernel or store edge.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import ClassVar, Self

from snapshotter.base.obstacles import Obstacle


class SnapshotterError(Exception):
    """Something a user must be told. `str()` gives "where: what; hint" without empty parts."""

    code: ClassVar[str] = "failed"
    exit_status: ClassVar[int] = 1

    def __init__(self, what: str, *, where: str = "", hint: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.hint = hint

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        return f"{text}; {self.hint}" if self.hint else text


class UsageError(SnapshotterError):
    """The command line or an API call makes no sense."""

    code = "usage"
    exit_status = 2


class TargetGoneError(SnapshotterError):
    """The job or one of its tasks ended (ESRCH): an ordinary outcome."""

    code = "target_gone"
    exit_status = 4


class JobEndedError(SnapshotterError):
    """The job of a pid file has ended: nothing is left to take. Cron needs a status for it, not a failure."""

    code = "ended"
    exit_status = 8


class UnsupportedError(SnapshotterError):
    """The job uses something that cannot be dumped or restored; `findings` names each."""

    code = "unsupported"
    exit_status = 5

    def __init__(
        self, what: str, *, where: str = "", hint: str = "", findings: tuple[Finding, ...] = ()
    ) -> None:
        super().__init__(what, where=where, hint=hint)
        self.findings = findings

    @classmethod
    def of(cls, findings: Sequence[Finding], root_pid: int) -> Self:
        """The refusal of a job: says the first finding and carries all."""
        first, more = findings[0], len(findings) - 1
        rest = f" (and {more} more finding{'s' if more > 1 else ''})" if more else ""
        return cls(
            first.what + rest,
            where=first.place,
            hint=first.hint or f"`snap check {root_pid}` lists everything",
            findings=tuple(findings),
        )


class PermissionDeniedError(SnapshotterError):
    """The kernel or the file system refused (EPERM, EACCES)."""

    code = "permission"
    exit_status = 6


class NoStoreError(SnapshotterError):
    """There is no store here, or it is not one that this version can open."""

    code = "no_store"
    exit_status = 10


class OutdatedStoreError(NoStoreError):
    """The store's schema is older than this snap's, and it was opened without being upgraded."""

    code = "outdated_store"


class OtherProgramError(SnapshotterError):
    """A job's name was given to a process that is not a restart of the job."""

    code = "other_program"
    exit_status = 2


class LockedError(SnapshotterError):
    """Another snap is at work on the same job or store."""

    code = "locked"
    exit_status = 11


class VerificationError(SnapshotterError):
    """Bytes read back are not the bytes that were written, or not those that are needed."""

    code = "verification"
    exit_status = 12


class NoSuchPointError(SnapshotterError):
    """No point has this id, or more than one has."""

    code = "no_such_point"
    exit_status = 13


class InterruptedByUserError(SnapshotterError):
    """Ctrl-C or SIGTERM."""

    code = "interrupted"
    exit_status = 130


class RestoreConflictError(SnapshotterError):
    """Something on this machine stands in the way of a restore: a taken pid, a changed file, a lesser CPU."""

    code = "restore_conflict"
    exit_status = 7

    def __init__(
        self, what: str, *, where: str = "", hint: str = "", obstacles: tuple[Obstacle, ...] = ()
    ) -> None:
        super().__init__(what, where=where, hint=hint)
        self.obstacles = obstacles
        """Where killing the living job is what stands in the way: each reason."""

    @classmethod
    def of(cls, obstacles: Sequence[Obstacle]) -> Self:
        """The refusal to kill a living job: says all reasons."""
        return cls(
            "; ".join(dict.fromkeys(str(one) for one in obstacles)),
            hint="; ".join(dict.fromkeys(one.hint for one in obstacles)) + "; nothing was touched",
            obstacles=tuple(obstacles),
        )


class StoreError(SnapshotterError):
    """The store could not be read or written (ENOSPC, EROFS, EIO ...)."""

    code = "store"
    exit_status = 1


class MissingPagesError(StoreError):
    """A dump left out pages that the parent point does not have either; one that reads everything succeeds."""

    code = "missing_pages"


class Finding:
    """One thing that stands in the way of a dump: `pid`, `where`, `what`, `hint`."""

    __slots__ = ("hint", "pid", "what", "where")

    def __init__(self, pid: int, where: str, what: str, hint: str = "") -> None:
        self.pid = pid
        self.where = where
        self.what = what
        self.hint = hint

    @property
    def place(self) -> str:
        """The task, and what of it."""
        return f"task {self.pid}" if self.where == "task" else f"task {self.pid}, {self.where}"

    def as_dict(self) -> dict[str, object]:
        """For --json."""
        return {"pid": self.pid, "where": self.where, "what": self.what, "hint": self.hint}

    def __str__(self) -> str:
        text = f"{self.place}: {self.what}"
        return f"{text}; {self.hint}" if self.hint else text


def wrap_os_error(error: OSError, what: str, *, where: str = "", hint: str = "") -> SnapshotterError:
    """The tree's class for an errno; use as `raise wrap_os_error(e, "cannot ...") from e`."""
    import errno as codes

    name = codes.errorcode.get(error.errno or 0, "?")
    text = f"{what}: {os.strerror(error.errno or 0)} ({name})"
    if error.errno == codes.ESRCH:
        return TargetGoneError(text, where=where, hint=hint)
    if error.errno in {codes.EPERM, codes.EACCES}:
        return PermissionDeniedError(text, where=where, hint=hint)
    return SnapshotterError(text, where=where, hint=hint)
