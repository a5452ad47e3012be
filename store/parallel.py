"""How many threads work for the store.

While a point is taken the job runs beside them, so they leave it half of the processors; while one is restored nothing else of
the job runs. More than eight would wait for the interpreter and for the disk.
"""

from __future__ import annotations

import os

_FEWEST, _MOST = 2, 8


def for_taking() -> int:
    """Threads that read, hash and compress."""
    return _between(_processors() // 2)


def for_restoring(*, from_disk: bool) -> int:
    """Threads that read, check and decompress; two more where some of them always wait for the disk: a fifth less time."""
    return _between(_processors() + 2 * from_disk)


def _between(wanted: int) -> int:
    return max(_FEWEST, min(wanted, _MOST))


def _processors() -> int:
    """Those that we may run on."""
    return len(os.sched_getaffinity(0))
