"""Jobs that have many of something (loads/): how long they stand still, and what criu needs for the same job."""

from __future__ import annotations

import contextlib
import math
import pathlib
import signal
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator

from tests.bench.measure import criu_program
from tests.jobs import Job, SnapFailedError, wait_until

LOADS = pathlib.Path(__file__).parent / "loads"
CROWDS: dict[str, tuple[str, int]] = {
    "descriptors": ("descriptors.c", 8000),
    "mappings": ("mappings.c", 25000),
    "threads": ("threads.c", 1500),
    "pool": ("pool.py", 5),
    "server": ("server.c", 3),
    "processes": ("processes.c", 500),
}
"""Name of the row -> its program, and how many of it."""
_READY_S = 60
_ROW_S = 150
"""A row that takes longer is given up, and counts as missed."""
_BACK = frozenset({"processes"})
"""Those that are rolled back, too."""


@contextlib.contextmanager
def crowd(name: str) -> Iterator[Job]:
    """One of them, running; everything of it is gone afterwards."""
    source, count = CROWDS[name]
    with tempfile.TemporaryDirectory(prefix="snap-bench-", dir="/var/tmp") as scratch:
        folder = pathlib.Path(scratch)
        if source.endswith(".c"):
            program = str(folder / name)
            subprocess.run(["gcc", "-O2", "-pthread", "-o", program, LOADS / source], check=True)
        else:
            program = f"{sys.executable} {LOADS / source}"
        job = Job(directory=folder / "job", store=folder / "store")
        # Job.start appends the directory: $0 of the shell.
        job.start(["/bin/sh", "-c", f'exec {program} {count} "$0"'])
        try:
            wait_until((job.directory / "ready").exists, f"{name} ready", _READY_S)
            yield job
        finally:
            job.destroy()


def frozen() -> dict[str, float]:
    """For each: milliseconds in which the second point had it stand still; criu's in the same run. Infinite: it failed, or took too
    long; standard error says why.
    """
    found: dict[str, float] = {}
    for name in CROWDS:
        row = {f"frozen_{name}_ms": math.inf}
        if name in _BACK:
            row[f"rollback_{name}_s"] = math.inf
        try:
            with crowd(name) as job, _at_most(_ROW_S, name):
                _measure(name, job, row)
        except (AssertionError, SnapFailedError, TimeoutError, OSError) as error:
            print(f"{name}: {error}", file=sys.stderr)
        found.update(row)
    return found


def _measure(name: str, job: Job, row: dict[str, float]) -> None:
    job.take()
    row[f"frozen_{name}_ms"] = job.take()["frozen_us"] / 1000
    if (time_ms := _criu_frozen_ms(job)) is not None:
        row[f"criu_{name}_ms"] = time_ms
    if name in _BACK:
        job.take("--kill")
        row[f"rollback_{name}_s"] = job.rollback()["duration_us"] / 1e6


@contextlib.contextmanager
def _at_most(seconds: int, what: str) -> Iterator[None]:
    """Raises TimeoutError in the main thread when the context takes longer; a command that is being waited for is killed."""

    def over(*_: object) -> None:
        raise TimeoutError(f"given up after {seconds} s ({what})")

    before = signal.signal(signal.SIGALRM, over)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _criu_frozen_ms(job: Job) -> float | None:
    """What criu says of itself: freezing_time and frozen_time of its statistics. None: there is none, or it cannot dump the job."""
    program = criu_program()
    if program is None:
        return None
    with tempfile.TemporaryDirectory(prefix="snap-bench-", dir="/var/tmp") as images:
        dump = [program, "dump", "-t", str(job.pid), "-D", images, "-v0", "--shell-job", "--leave-running"]
        dump += [
            "--tcp-established",
            "--ext-unix-sk",
            "--file-locks",
            "--link-remap",
            "--ghost-limit",
            "100M",
        ]
        if subprocess.run(dump, check=False, capture_output=True).returncode != 0:
            return None
        return _standing_us(pathlib.Path(images, "stats-dump").read_bytes()) / 1000


def _standing_us(stats: bytes) -> int:
    """freezing_time and frozen_time of criu's stats-dump: two magic numbers and a size of 32 bits each, then a stats_entry of its
    images/stats.proto. Read by hand, for crit wants a protobuf of its own age.
    """
    _, _, size = struct.unpack_from("<III", stats)
    (entry,) = (value for number, value in _fields(stats[12 : 12 + size]) if number == 1)
    assert isinstance(entry, bytes)
    times = dict(_fields(entry))
    freezing, frozen = times[1], times[2]
    assert isinstance(freezing, int)
    assert isinstance(frozen, int)
    return freezing + frozen


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of the integers and messages in a protobuf message."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(message):
        number, kind = divmod(varint(), 8)
        value = varint()
        if kind == 2:  # so many bytes
            yield number, message[at : at + value]
            at += value
        else:
            yield number, value
