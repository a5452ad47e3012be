"""pool WORKERS DIRECTORY: a pool of Python processes that have done some work in numpy and wait for more, as joblib's do."""

from __future__ import annotations

import multiprocessing
import os
import pathlib
import signal
import sys

import numpy as np


def work(seed: int) -> float:
    """Some megabytes of arrays."""
    values = np.random.default_rng(seed).normal(size=(500, 500))
    kept.append(values)
    return float(np.linalg.norm(values @ values))


kept: list[np.ndarray] = []


def main() -> None:
    nr, directory = int(sys.argv[1]), pathlib.Path(sys.argv[2])
    os.chdir(directory)
    with multiprocessing.get_context("spawn").Pool(nr) as pool:
        pool.map(work, range(4 * nr), chunksize=1)
        (directory / "ready").touch()
        signal.pause()


if __name__ == "__main__":
    main()
