"""Paths that nobody can turn: opened one component after the other, and refused where a stranger could swap one.

Root reads files and writes stores where it is told to. A directory on the way that another user may write lets them
put a link or a file of their own there. So each component is opened without following it, and judged by what the
kernel says of the opened object. The rules:

- A directory belongs to somebody trusted (root, the caller, and whom the caller named), and neither its group nor others
  may write it. (An access list that lets somebody write shows in the group's bits, acl(5).)
- Exception: a sticky directory, as /tmp, may be writable. There, what is opened next must belong to somebody trusted:
  others cannot rename or remove it.
- Exception: a user's own private group may write (umask 002 with a group per user), but not root's.
- A symbolic link is followed only out of a directory that only trusted users may write, and it belongs to one of them.
- Where other owners are tolerated, a link that one of them could have made leads only to a file of theirs. The file is not read before.

What was checked so cannot be changed by others afterwards, so that using the path by name is safe from then on.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path

from snapshotter.base.errors import PermissionDeniedError, SnapshotterError

_MAX_LINKS = 40
_PATH = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC


def callers() -> frozenset[int]:
    """Whom every run trusts: root, and who runs it."""
    return frozenset({0, os.geteuid()})


@dataclass(slots=True)
class _Walk:
    """A path that is being opened."""

    trusted: AbstractSet[int]
    tolerant: bool
    strangers: set[int]
    """Owners that are not trusted, where they are tolerated."""
    hint: str
    led: bool = False
    """A link was followed that one of the strangers could have put there."""

    def belongs(self, status: os.stat_result, where: str) -> None:
        if status.st_uid in self.trusted:
            return
        if not self.tolerant:
            raise PermissionDeniedError(
                f"belongs to uid {status.st_uid}, who could put something else in its place",
                where=where,
                hint=self.hint,
            )
        self.strangers.add(status.st_uid)

    def directory(self, status: os.stat_result, where: str) -> bool:
        """Judge a directory that is searched. Returns whether its entries can be swapped by their owners only (sticky)."""
        self.belongs(status, where)
        writable = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        if not writable:
            return False
        if status.st_mode & stat.S_ISVTX:
            return True
        if writable == stat.S_IWGRP and _is_private_group(status):
            return False
        raise PermissionDeniedError(
            f"others may write this directory (mode {stat.S_IMODE(status.st_mode):04o}) and put something else in the place of what is in it",
            where=where,
            hint=f"chmod go-w {where}",
        )


def _is_private_group(status: os.stat_result) -> bool:
    """Whether a group is the caller's own, of nobody else: named like the user, without further members."""
    import grp
    import pwd

    if status.st_uid != os.geteuid() or not status.st_uid:
        return False
    try:
        user, group = pwd.getpwuid(status.st_uid), grp.getgrgid(status.st_gid)
    except KeyError:
        return False
    return (
        user.pw_gid == status.st_gid and group.gr_name == user.pw_name and set(group.gr_mem) <= {user.pw_name}
    )


def _open(path: Path, walk: _Walk) -> int:
    """An O_PATH descriptor of what `path` means. OSErrors are the caller's."""
    todo = _parts(os.path.abspath(path))
    links, where = 0, ""
    at = os.open("/", _PATH | os.O_DIRECTORY)
    try:
        while todo:
            name = todo.pop()
            status = os.fstat(at)
            if not stat.S_ISDIR(status.st_mode):
                raise NotADirectoryError(20, os.strerror(20), where)
            sticky = walk.directory(status, where or "/")
            found = os.open(name, _PATH, dir_fd=at)
            try:
                status = os.fstat(found)
                here = os.path.normpath(f"{where}/{name}")
                if sticky:
                    walk.belongs(status, here)
                if stat.S_ISLNK(status.st_mode):
                    links += 1
                    if sticky or links > _MAX_LINKS:
                        raise PermissionDeniedError(
                            "is a symbolic link in a directory that others may write"
                            if sticky
                            else "too many links",
                            where=here,
                            hint="name what it leads to",
                        )
                    walk.belongs(status, here)
                    walk.led = walk.led or bool(walk.strangers)
                    target = os.readlink("", dir_fd=found)
                    todo += _parts(target)
                    if not target.startswith("/"):
                        continue
                    where, found, old = "", os.open("/", _PATH | os.O_DIRECTORY), found
                    os.close(old)
                else:
                    where = here
                at, found = found, at
            finally:
                os.close(found)
        return at
    except BaseException:
        os.close(at)
        raise


def _parts(text: str) -> list[str]:
    """The components, last one first."""
    return [part for part in reversed(text.split("/")) if part not in {"", "."}]


@contextlib.contextmanager
def opened(path: Path, trusted: AbstractSet[int], *, hint: str) -> Iterator[int]:
    """An O_PATH descriptor of a file or directory that nobody but `trusted` can have put there.

    Raises:
        PermissionDeniedError: a stranger could have; names the component.
        OSError: it cannot be opened.
    """
    fd = _open(path, _Walk(trusted, tolerant=False, strangers=set(), hint=hint))
    try:
        yield fd
    finally:
        os.close(fd)


def check_way(path: Path, trusted: AbstractSet[int], *, hint: str) -> None:
    """The same for as much of a path as exists."""
    with contextlib.suppress(FileNotFoundError), opened(path, trusted, hint=hint):
        pass


@dataclass(frozen=True, slots=True)
class Content:
    """A small file that was read, and who besides the trusted could have written it."""

    data: bytes
    status: os.stat_result
    strangers: frozenset[int]


def read(path: Path, trusted: AbstractSet[int], *, limit: int, hint: str, tolerant: bool = False) -> Content:
    """Up to `limit` bytes of a regular file; never waits, whatever stands there.

    Args:
        path: The file.
        trusted: Whose files and directories are believed.
        limit: A longer file is refused.
        hint: What to do when it is refused.
        tolerant: Allow other owners, and name them in the result. Where others may write is refused all the same.

    Raises:
        PermissionDeniedError: somebody else could have written it; names the component.
        SnapshotterError: it is no regular file, or too long.
        OSError: it cannot be opened or read.
    """
    walk = _Walk(trusted, tolerant=tolerant, strangers=set(), hint=hint)
    fd = _open(path, walk)
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise SnapshotterError("is no regular file", where=str(path), hint="name a file")
        walk.belongs(status, str(path))
        if walk.led and status.st_uid not in walk.strangers:
            # Else a user could have root read any file for them.
            who = ", ".join(str(uid) for uid in sorted(walk.strangers))
            raise PermissionDeniedError(
                f"a link that uid {who} could have made leads to a file of uid {status.st_uid}",
                where=str(path),
                hint=hint,
            )
        if status.st_mode & stat.S_IWOTH or (status.st_mode & stat.S_IWGRP and not _is_private_group(status)):
            raise PermissionDeniedError(
                f"others may write it (mode {stat.S_IMODE(status.st_mode):04o})",
                where=str(path),
                hint=f"look at what it says, then: chmod go-w {path}",
            )
        # What O_PATH found, not what has the name by now.
        reading = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    finally:
        os.close(fd)
    with open(reading, "rb") as file:
        data = file.read(limit + 1)
        status = os.fstat(file.fileno())
    if len(data) > limit:
        raise SnapshotterError(f"is longer than {limit} bytes", where=str(path), hint="is it the right file?")
    return Content(data, status, frozenset(walk.strangers))
