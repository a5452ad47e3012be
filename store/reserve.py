"""Room that is kept for a full disk: forgetting and pruning need some before they free any.

SQLite writes a journal before it changes a page, and a repacked pack exists twice for a moment. So the store holds a file
of real blocks, which is removed when something that frees space meets ENOSPC, and made again afterwards. On a file system
that copies on write (btrfs, zfs) the blocks of a removed file may come back late; there it is a help, no promise.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from store.files import NoSpaceError, open_new

NAME = "reserve"
SIZE_BYTES = 4 << 20
"""The journal of a transaction over some hundred points, or a small pack."""
LEAST_BYTES = 256 << 10
"""What a take sets aside before it writes: enough for the journal of forgetting some points."""

_T = TypeVar("_T")


def make(root: Path, most_bytes: int = SIZE_BYTES) -> None:
    """Have a reserve of `most_bytes`, or of as much as there is room for. Never fails: without it everything works but on a full disk."""
    path = root / NAME
    with contextlib.suppress(OSError):
        have = path.stat().st_size if path.exists() else 0
        if have >= most_bytes:
            return
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC) if path.exists() else open_new(path)
        try:
            size = most_bytes
            while size > have and size >= LEAST_BYTES and not _grow(fd, have, size):
                size //= 2
        finally:
            empty = not os.fstat(fd).st_size
            os.close(fd)
        if empty:
            path.unlink()


def _grow(fd: int, have: int, size: int) -> bool:
    """Give the file blocks, not a hole. What it has stays where there is no room for more."""
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError:
        os.ftruncate(fd, have)
        return False
    return True


def release(root: Path) -> bool:
    """Give its room back. Returns whether there was any."""
    try:
        (root / NAME).unlink()
    except OSError:
        return False
    return True


def use(root: Path, work: Callable[[], _T]) -> _T:
    """Do what frees space; once more without the reserve if the disk is full."""
    try:
        return work()
    except NoSpaceError as error:
        if not release(root):
            raise _without_room(error) from error
    try:
        return work()
    except NoSpaceError as error:
        raise _without_room(error) from error
    finally:
        make(root)


def _without_room(error: NoSpaceError) -> NoSpaceError:
    """The error of a command that frees space: its hint cannot be to run that command."""
    hint = "make 1 MiB free on this file system by other means (remove another file, or enlarge it), then run this again"
    return NoSpaceError(error.what, where=error.where, hint=hint)
