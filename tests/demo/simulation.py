"""Heat on a plate, by a pool of threads: the demo's first job. Says once a step where it is.

Every step depends on all earlier ones, so the digest at step N proves that memory, threads and file offsets all came
back right: an uninterrupted run and one that was rolled back print the same line for the same step.
"""

from __future__ import annotations

import hashlib
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

# One thread of BLAS per thread of ours; must be set before numpy is imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
import numpy as np

SIZE, STRIPES = 1024, 4


def relax(old: np.ndarray, new: np.ndarray, stripe: int) -> None:
    """One stripe of rows of one Jacobi step."""
    low = max(1, stripe * SIZE // STRIPES)
    high = min(SIZE - 1, (stripe + 1) * SIZE // STRIPES)
    new[low:high, 1:-1] = (
        old[low - 1 : high - 1, 1:-1] + old[low + 1 : high + 1, 1:-1] + old[low:high, :-2] + old[low:high, 2:]
    ) / 4


def main() -> None:
    """Run until killed."""
    plate = np.random.default_rng(42).random((SIZE, SIZE))
    spare = plate.copy()
    with ThreadPoolExecutor(STRIPES) as pool, open(sys.argv[1], "a", buffering=1) as log:
        for step in range(1, 1_000_000):
            list(pool.map(partial(relax, plate, spare), range(STRIPES)))
            plate, spare = spare, plate
            digest = hashlib.blake2b(plate.tobytes(), digest_size=8).hexdigest()
            log.write(f"step {step} {digest}\n")
            time.sleep(0.05)


if __name__ == "__main__":
    main()
