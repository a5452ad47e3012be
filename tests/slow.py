"""Slow places to read from, so that a transfer stays in flight for as long as a test needs it."""

from __future__ import annotations

import contextlib
import os
import pathlib
import time
from collections.abc import Iterator

_BLKIO = pathlib.Path("/sys/fs/cgroup/blkio")


def _whole_disk(path: os.PathLike[str] | str) -> str:
    """MAJOR:MINOR of the disk that a path lies on: throttling is of disks, not of partitions."""
    device = os.stat(path).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    place = pathlib.Path(f"/sys/dev/block/{number}").resolve()
    if (place / "partition").exists():
        number = (place.parent / "dev").read_text().strip()
    return number


@contextlib.contextmanager
def disk(pid: int, path: os.PathLike[str] | str, bytes_per_s: int) -> Iterator[bool]:
    """Reads by process `pid` from the disk below `path` go at that speed. False: this machine cannot throttle them.

    By the blkio controller of control groups version 1 (Documentation/admin-guide/cgroup-v1/blkio-controller.rst).
    """
    group = _BLKIO / f"snap-test-{os.getpid()}-{pid}"
    try:
        group.mkdir()
    except OSError:
        yield False
        return
    try:
        (group / "blkio.throttle.read_bps_device").write_text(f"{_whole_disk(path)} {bytes_per_s}")
        (group / "cgroup.procs").write_text(str(pid))
        yield True
    finally:
        for member in (group / "cgroup.procs").read_text().split():
            with contextlib.suppress(OSError):
                (_BLKIO / "cgroup.procs").write_text(member)
        end = time.monotonic() + 10
        while time.monotonic() < end:
            try:
                group.rmdir()
                break
            except OSError:
                time.sleep(0.01)
