"""The measurements: each returns numbers of one run; __main__ repeats, takes medians and compares with the goals."""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import zstandard

from store.compress import FAST_LEVEL
from tests.jobs import Job, snap, wait_until

HERE = pathlib.Path(__file__).parent


class Load(Job):
    """load.c, obeying orders."""

    def order(self, letter: str) -> str:
        """Give an order, wait for its answer."""
        answers = self.directory / "answers"
        before = answers.read_text().count("\n")
        with open(self.directory / "orders", "w") as orders:
            orders.write(letter)
        wait_until(lambda: answers.read_text().count("\n") > before, f"answer to {letter}")
        return answers.read_text().splitlines()[-1]

    def stored_bytes(self) -> int:
        """What the store's files occupy."""
        return sum(path.stat().st_blocks * 512 for path in self.store.rglob("*") if path.is_file())


@contextlib.contextmanager
def load(size_mib: int, nr_children: int = 0, *, quiet: bool = False) -> Iterator[Load]:
    """A running load; everything of it is gone afterwards. `quiet`: no thread of it keeps a processor busy."""
    with tempfile.TemporaryDirectory(prefix="snap-bench-", dir="/var/tmp") as scratch:
        folder = pathlib.Path(scratch)
        program = folder / "load"
        subprocess.run(["gcc", "-O2", "-pthread", "-o", program, HERE / "load.c"], check=True)
        job = Load(directory=folder / "job", store=folder / "store")
        # Job.start appends the directory: $0 of the shell.
        job.start(
            ["/bin/sh", "-c", f'exec {program} "$0" {size_mib} {nr_children} {"quiet" if quiet else ""}']
        )
        try:
            wait_until((job.directory / "ready").exists, "load ready", 120)
            yield job
        finally:
            job.destroy()


def pauses(size_mib: int) -> dict[str, float]:
    """What the job itself sees of a first point and of an increment; and what it sees without snap."""
    with load(size_mib) as job:
        found = {"noise_ms": _pause_ms(job, lambda: time.sleep(0.3))}
        found["pause_first_ms"] = _pause_ms(job, job.take)
        job.order("d")
        found["pause_increment_ms"] = _pause_ms(job, job.take)
    return found


def first_take(size_mib: int) -> dict[str, float]:
    """A first take until it is on disk against bare zstd of the same bytes, and a restore of it."""
    with load(size_mib, quiet=True) as job:
        pages = _memory_of(job.pid, size_mib << 20)
        _compress(pages)  # once for nothing: its buffers are fresh
        with load(1, quiet=True) as small:  # making a store is not part of a take
            snap("take", small.pid, store=job.store)
        # Before and after: a virtual machine's speed changes from second to second.
        bare = _compress(pages) / 2
        point = job.take()
        bare += _compress(pages) / 2
        del pages
        took = point["duration_us"] / 1e6
        disk = _write_durably(job.store.parent / "bare", point["bytes_stored"])
        job.take("--kill")
        restored = job.rollback()["duration_us"] / 1e6
    return {
        "take_first_s": took,
        "zstd_s": bare,
        "disk_s": disk,
        "take_to_zstd": took / bare,
        "restore_s": restored,
    }


def idle_increment(size_mib: int = 64, nr_points: int = 30) -> dict[str, float]:
    """What an increment of an idle job adds to the store, everything included."""
    with load(size_mib, quiet=True) as job:
        for _ in range(12):  # the index of what the first point stored is made when there are some packs
            job.take()
        before = job.stored_bytes()
        for _ in range(nr_points):
            job.take()
        return {"idle_increment_bytes": (job.stored_bytes() - before) / nr_points}


def forked_tree(nr_children: int = 50, size_mib: int = 64) -> dict[str, float]:
    """Bytes stored of a tree that shares its memory, over those of one process."""
    with load(size_mib, quiet=True) as one:
        alone = one.take()["bytes_stored"]
    with load(size_mib, nr_children) as job:
        point = job.take()
        return {"tree_to_one": point["bytes_stored"] / alone, "tree_take_s": point["duration_us"] / 1e6}


def long_chain(nr_points: int, size_mib: int) -> dict[str, float]:
    """Restoring the last point of a chain, with 1 % of the pages dirty each time, against the first."""
    with load(size_mib, quiet=True) as job:
        for _ in range(nr_points - 1):
            job.take()
            job.order("d")
        job.take("--kill")
        durations: dict[str, list[float]] = {"first": [], "last": []}
        for _ in range(6):
            for name, point in (("first", job.points[0]), ("last", job.points[-1])):
                durations[name].append(job.rollback(point["id"])["duration_us"] / 1e6)
        # The first pair warms the page cache.
        first, last = (statistics.median(values[1:]) for values in durations.values())
        return {"chain_first_s": first, "chain_last_s": last, "chain_last_to_first": last / first}


def criu(size_mib: int) -> dict[str, float]:
    """The same pause and restore with criu (SNAP_BENCH_CRIU, or on PATH); empty where there is none or it does not work."""
    program = criu_program()
    if program is None:
        return {}
    with load(size_mib) as job, tempfile.TemporaryDirectory(prefix="snap-bench-", dir="/var/tmp") as images:
        common = ["-D", images, "-v0", "--shell-job"]
        dump = [program, "dump", "-t", str(job.pid), *common]
        status: list[int] = []
        pause = _pause_ms(
            job, lambda: status.append(subprocess.run([*dump, "--leave-running"], check=False).returncode)
        )
        if status != [0] or subprocess.run(dump, check=False).returncode != 0:
            return {}
        job.wait_gone()
        started = time.perf_counter()
        done = subprocess.run([program, "restore", "-d", *common], check=False)
        restored = time.perf_counter() - started
        return {"criu_pause_first_ms": pause, "criu_restore_s": restored} if done.returncode == 0 else {}


def criu_program() -> str | None:
    """Where criu is: the path in SNAP_BENCH_CRIU, or what PATH has."""
    return os.environ.get("SNAP_BENCH_CRIU") or shutil.which("criu")


def _pause_ms(job: Load, action: object) -> float:
    job.order("g")
    action()  # type: ignore[operator]
    return int(job.order("r")) / 1e6


def _memory_of(pid: int, least: int) -> bytes:
    """The largest mapping of the job."""
    for line in pathlib.Path(f"/proc/{pid}/maps").read_text().splitlines():
        start, end = (int(text, 16) for text in line.split()[0].split("-"))
        if end - start >= least:
            with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
                memory.seek(start)
                return b"".join(memory.read(1 << 20) for _ in range((end - start) >> 20))
    raise AssertionError("the load has no such mapping")


def _write_durably(path: pathlib.Path, size: int) -> float:
    """Seconds that the disk itself wants for so many bytes: no take can be on disk sooner."""
    piece = os.urandom(1 << 20)
    started = time.perf_counter()
    with open(path, "wb", buffering=0) as file:
        file.writelines(piece for _ in range((size >> 20) + 1))
        os.fsync(file.fileno())
    taken = time.perf_counter() - started
    path.unlink()
    return taken


def _compress(data: bytes) -> float:
    """Seconds that bare zstd takes at the store's own level on both cores, in pieces of 1 MiB."""
    view = memoryview(data)
    started = time.perf_counter()

    def half(number: int) -> int:
        compressor = zstandard.ZstdCompressor(level=FAST_LEVEL)
        return sum(
            len(compressor.compress(view[at : at + (1 << 20)]))
            for at in range(number << 20, len(view), 2 << 20)
        )

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(half, range(2)))
    return time.perf_counter() - started
