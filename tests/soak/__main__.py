"""python -m tests.soak [--minutes 10] [--piece NAME]: each piece for its share of the time; counts, and a summary at the end."""

from __future__ import annotations

import argparse
import contextlib
import os
import pathlib
import shutil
import signal
import sys
import tempfile
import time
import traceback

from tests.jobs import be_subreaper
from tests.soak import chaos, differential, kills, stress
from tests.soak.frame import Piece, Run, minutes

PIECES = (
    Piece("stress", stress.run),
    Piece("kills", kills.run),
    Piece("chaos", chaos.run),
    Piece("differential", differential.run),
)
"""A new one: a function that takes a Run, in a module of its own, and a line here."""


def main() -> int:
    """0: nothing was found."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="in all, shared by the pieces")
    parser.add_argument("--piece", action="append", choices=[piece.name for piece in PIECES])
    parser.add_argument("--seed", type=int, help="as an earlier run has printed it")
    args = parser.parse_args()
    if os.geteuid() != 0:
        parser.error("needs root, as takes do")
    be_subreaper()
    for fd in map(int, os.listdir("/proc/self/fd")):
        if fd > 2:
            with contextlib.suppress(OSError):
                os.set_inheritable(fd, False)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    chosen = [piece for piece in PIECES if not args.piece or piece.name in args.piece]
    results = [_run(piece, args.minutes / len(chosen), args.seed) for piece in chosen]
    print()
    for piece, counts, failed in results:
        print(f"{piece.name}: {'FAILED' if failed else 'nothing found'}; {counts}")
    return int(any(failed for _, _, failed in results))


def _run(piece: Piece, share: float, seed: int | None) -> tuple[Piece, str, bool]:
    folder = pathlib.Path(tempfile.mkdtemp(prefix=f"soak-{piece.name}-"))
    run = Run(folder, minutes(share))
    if seed is not None:
        run.seed = seed
    print(f"{piece.name}: {share:g} minutes, seed {run.seed}, in {folder}", flush=True)
    began = time.monotonic()
    failed = False
    try:
        piece.run(run)
    except Exception:
        traceback.print_exc()
        print(f"{piece.name}: FAILED with seed {run.seed}; what there is lies in {folder}", flush=True)
        failed = True
    else:
        shutil.rmtree(folder)
    counts = ", ".join(f"{number} {what}" for what, number in sorted(run.counts.items()))
    counts = f"{time.monotonic() - began:.0f} s: {counts}"
    print(f"{piece.name}: {counts}", flush=True)
    return piece, counts, failed


if __name__ == "__main__":
    sys.exit(main())
