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

_T = TypeVar("_T")


def make(root: Path) -> None:
    """Put the reserve in place, if there is room for it. Never fails: without it everything works but on a full disk."""
    path = root / NAME
    with contextlib.suppress(OSError):
        if path.stat().st_size >= SIZE_BYTES:
            return
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)
        fd = open_new(path)
        try:
            os.posix_fallocate(fd, 0, SIZE_BYTES)  # blocks, not a hole
        except OSError:
            path.unlink()
        finally:
            os.close(fd)


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
    except NoSpaceError:
        if not release(root):
            raise
    try:
        return work()
    finally:
        make(root)
