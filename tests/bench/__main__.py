"""python -m tests.bench [--json] [--runs N] [--small]: the table of goals, medians of 5."""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import statistics
import sys

from tests.bench import crowds, measure

GOALS: tuple[tuple[str, str, str, float | None], ...] = (
    ("pause_first_ms", "pause the job sees, first point", "ms", 25),
    ("pause_increment_ms", "pause, increment with 1 % of pages dirty", "ms", 10),
    ("noise_ms", "the same clock without snap", "ms", None),
    ("take_to_zstd", "first take, on disk, to bare zstd on both cores", "x", 1.5),
    ("take_first_s", "first take, on disk", "s", None),
    ("zstd_s", "bare zstd of its bytes on both cores", "s", None),
    ("disk_s", "bare write and fsync of what it stored", "s", None),
    ("idle_increment_bytes", "idle increment of 64 MB on disk", "B", 16384),
    ("tree_to_one", "50 processes forked from one of 64 MB, to one", "x", 1.1),
    ("restore_s", "restore into a new process", "s", 0.6),
    ("chain_last_to_first", "restoring the last point of the chain to the first", "x", 1.2),
    *(
        (f"frozen_{name}_ms", f"frozen, {what}", "ms", goal)
        for name, what, goal in (
            ("descriptors", "8,000 descriptors", 200),
            ("mappings", "25,000 mappings", 500),
            ("threads", "1,500 threads", 250),
            ("pool", "a pool of 5 Python processes", 60),
            ("server", "a server of 3 x 27 threads (an idle Apache)", 50),
            ("processes", "500 processes", 300),
        )
    ),
    ("rollback_processes_s", "rollback of 500 processes", "s", 3),
    *(
        (f"criu_{name}_ms", f"criu: frozen, {what}", "ms", None)
        for name, what in (
            ("descriptors", "8,000 descriptors"),
            ("mappings", "25,000 mappings"),
            ("threads", "1,500 threads"),
            ("pool", "a pool of 5 Python processes"),
            ("server", "a server of 3 x 27 threads"),
            ("processes", "500 processes"),
        )
    ),
    ("criu_pause_first_ms", "pause the job sees, criu", "ms", None),
    ("criu_restore_s", "restore, criu", "s", None),
    ("pause_to_criu", "pause, to criu's", "x", None),
    ("restore_to_criu", "restore, to criu's", "x", None),
)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def main() -> int:
    """0 if every goal that was measured is reached, else 1."""
    parser = argparse.ArgumentParser(prog="tests.bench", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one object instead of the table")
    parser.add_argument("--runs", type=int, default=5, help="runs of which the median is taken (default 5)")
    parser.add_argument("--small", action="store_true", help="128 MiB and 30 points instead of 1 GiB and 300")
    options = parser.parse_args()
    # Restored roots become our children, to be reaped here.
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)
    size_mib, nr_points, chain_mib = (128, 30, 16) if options.small else (1024, 300, 256)
    runs: dict[str, list[float]] = {}

    def add(found: dict[str, float]) -> None:
        for name, value in found.items():
            runs.setdefault(name, []).append(value)

    for _ in range(options.runs):
        found = {**measure.pauses(size_mib), **measure.first_take(size_mib), **measure.criu(size_mib)}
        if "criu_restore_s" in found:
            found["pause_to_criu"] = found["pause_first_ms"] / found["criu_pause_first_ms"]
            found["restore_to_criu"] = found["restore_s"] / found["criu_restore_s"]
        add(found)
        add(measure.idle_increment())
        add(measure.forked_tree())
        add(crowds.frozen())
    # One chain; its restores are repeated within.
    add(measure.long_chain(nr_points, chain_mib))

    medians = {name: statistics.median(values) for name, values in runs.items()}
    rows = [
        {"name": name, "what": what, "unit": unit, "median": medians[name], "goal": goal, "runs": runs[name]}
        for name, what, unit, goal in GOALS
        if name in medians
    ]
    missed = [row for row in rows if row["goal"] is not None and row["median"] > row["goal"]]
    if options.json:
        for row in rows:  # JSON has no infinity: null is a run that failed
            row["median"] = _finite(row["median"])
            row["runs"] = [_finite(value) for value in row["runs"]]
        print(json.dumps({"size_mib": size_mib, "nr_points": nr_points, "rows": rows}, indent=2))
    else:
        print(f"{size_mib} MiB, medians of {options.runs}")
        for row in rows:
            goal = (
                ""
                if row["goal"] is None
                else f"goal {row['goal']:g}, {'missed' if row in missed else 'reached'}"
            )
            print(f"{row['what']:52} {row['median']:10.4g} {row['unit']:2}  {goal}")
        if measure.criu_program() is None:
            print("criu: none found on PATH or by SNAP_BENCH_CRIU, so that its rows are left out")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
