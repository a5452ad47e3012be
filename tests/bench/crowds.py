"""Jobs that have many of something (loads/): how long they stand still, and what criu needs for the same job."""

from __future__ import annotations

import contextlib
import json
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator

from tests.bench.measure import criu_program
from tests.jobs import Job, wait_until

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
_READY_S = 120
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
    """For each: milliseconds in which the second point had it stand still; criu's in the same run."""
    found: dict[str, float] = {}
    for name in CROWDS:
        with crowd(name) as job:
            job.take()
            found[f"frozen_{name}_ms"] = job.take()["frozen_us"] / 1000
            if (time_ms := _criu_frozen_ms(job)) is not None:
                found[f"criu_{name}_ms"] = time_ms
            if name in _BACK:
                job.take("--kill")
                found[f"rollback_{name}_s"] = job.rollback()["duration_us"] / 1e6
    return found


def _criu_frozen_ms(job: Job) -> float | None:
    """What criu says of itself: freezing_time and frozen_time of its statistics. None: there is none, or it cannot dump the job."""
    program = criu_program()
    if program is None:
        return None
    with tempfile.TemporaryDirectory(prefix="snap-bench-", dir="/var/tmp") as images:
        dump = [program, "dump", "-t", str(job.pid), "-D", images, "-v0", "--shell-job", "--leave-running"]
        dump += ["--tcp-established", "--ext-unix-sk", "--file-locks", "--ghost-limit", "100M"]
        if subprocess.run(dump, check=False, capture_output=True).returncode != 0:
            return None
        crit = pathlib.Path(program).resolve().parent.parent / "crit" / "crit"
        command = [sys.executable, str(crit)] if crit.exists() else ["crit"]
        decode = [*command, "decode", "-i", f"{images}/stats-dump"]
        try:
            text = subprocess.run(decode, check=True, capture_output=True, text=True).stdout
        except (OSError, subprocess.CalledProcessError):
            return None
        stats = json.loads(text)["entries"][0]["dump"]
        return float(stats["freezing_time"] + stats["frozen_time"]) / 1000
