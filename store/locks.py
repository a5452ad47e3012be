"""flock()s of the store: they end with their process, so nothing is ever left locked.

The store's lock is shared by takes and readers and exclusive for what removes packs; a job's lock is held by
the one take or rollback that works on it. Lock files stay where they are (removing them would race).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from snapshotter.base.errors import LockedError
from store.files import give, wrapped


def _open(path: Path) -> int:
    flags = os.O_CLOEXEC | os.O_NOFOLLOW
    with wrapped("cannot open a lock file", path):
        try:
            fd = os.open(path, flags | os.O_RDWR | os.O_CREAT, 0o600)
            give(fd, path.parent)
            return fd
        except OSError as first:
            try:
                return os.open(path, flags | os.O_RDONLY)  # a read-only file system can still be read
            except FileNotFoundError:
                raise first from None  # the full or read-only disk is the reason, not the file that it refused


class Lock:
    """One held flock; `release` (or leaving the `with` block) ends it."""

    def __init__(self, path: Path, *, exclusive: bool, wait_s: float, what: str, hint: str) -> None:
        self._fd = _open(path)
        mode = (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB
        deadline = time.monotonic() + wait_s
        while True:
            try:
                fcntl.flock(self._fd, mode)
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    self.release()
                    raise LockedError(what, where=str(path.parent.parent), hint=hint) from None
                time.sleep(min(0.02, wait_s))
            except BaseException:
                self.release()
                raise
            else:
                return

    def release(self) -> None:
        """Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError, OSError):
            self.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.release()


def lock_store(directory: Path, *, exclusive: bool, wait_s: float = 10.0) -> Lock:
    """Shared: nothing is removed meanwhile. Exclusive: nobody reads or writes packs meanwhile."""
    return Lock(
        directory / "store",
        exclusive=exclusive,
        wait_s=wait_s,
        what="other snaps are using the store" if exclusive else "a prune of the store is running",
        hint="try again when they have ended",
    )


ORPHANED_S = 1.0
"""A snap that was killed may leave a child between its fork and its exec, which has the lock until then."""


def lock_job(directory: Path, job: str, *, wait_s: float) -> Lock:
    """One take or rollback of a job at a time. The name is hashed: it may hold slashes or be long."""
    name = "job-" + hashlib.blake2b(job.encode(errors="surrogateescape"), digest_size=12).hexdigest()
    return Lock(
        directory / name,
        exclusive=True,
        wait_s=wait_s,
        what=f"another snap is at work on job {job!r}",
        hint="wait for it to end",
    )


@contextlib.contextmanager
def try_lock(directory: Path, name: str) -> Iterator[bool]:
    """Yields whether the lock was free; for work that may be skipped."""
    try:
        lock = Lock(directory / name, exclusive=True, wait_s=0.0, what="busy", hint="")
    except LockedError:
        yield False
        return
    with lock:
        yield True
