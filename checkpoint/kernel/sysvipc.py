"""/proc/sysvipc: sets of semaphores and message queues of snap's own ipc namespace, and who used them last.

Parses the tables (proc(5), sysvipc(7)); asks semctl(2) for the last process of each semaphore.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from checkpoint.kernel import sys

_GETPID = 11


def parse_table(data: bytes) -> list[dict[str, int]]:
    """The rows of a table of /proc/sysvipc, by the names of its columns."""
    lines = data.decode("ascii", "replace").splitlines()
    if not lines:
        return []
    names = lines[0].split()
    return [dict(zip(names, map(int, line.split()), strict=False)) for line in lines[1:]]


def _table(name: str) -> list[dict[str, int]]:
    try:
        with open(f"/proc/sysvipc/{name}", "rb") as file:
            return parse_table(file.read())
    except FileNotFoundError:  # a kernel without System V IPC
        return []


def semaphore_sets() -> Iterator[tuple[int, set[int]]]:
    """(id, pids that changed one of its semaphores last) of each set that may be looked at."""
    for row in _table("sem"):
        found: set[int] = set()
        with contextlib.suppress(OSError):  # removed meanwhile, or not ours to read
            found.update(sys.syscall("semctl", row["semid"], at, _GETPID, 0) for at in range(row["nsems"]))
        yield row["semid"], found


def message_queues() -> Iterator[tuple[int, set[int]]]:
    """(id, pids that sent to it and received from it last) of each queue."""
    for row in _table("msg"):
        yield row["msqid"], {row["lspid"], row["lrpid"]}
