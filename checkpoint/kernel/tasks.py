"""The threads and children of a process as /proc lists them, for walks over a tree that lives meanwhile.

A process that has ended is an empty answer here, not an error (proc.threads raises).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping

from checkpoint.kernel.threads import read_files


def task_ids(pid: int) -> list[int]:
    """The tids of a process, ascending; empty when it is gone."""
    try:
        return sorted(map(int, os.listdir(f"/proc/{pid}/task")))
    except (FileNotFoundError, ProcessLookupError):
        return []


def children(pid: int, tids: list[int]) -> list[int]:
    """The pids of the children of all threads of a process; exact when they are stopped."""
    return children_of({pid: tids})


def children_of(tree: Mapping[int, Iterable[int]]) -> list[int]:
    """The same of many processes in one go: pid -> its tids."""
    paths = [f"/proc/{pid}/task/{tid}/children" for pid, tids in tree.items() for tid in tids]
    return [int(child) for text in read_files(paths) if text for child in text.split()]


def is_dead(pid: int, tid: int) -> bool:
    """Zombie, dead or gone."""
    try:
        with open(f"/proc/{pid}/task/{tid}/stat", "rb", buffering=0) as file:
            return file.read(512).rpartition(b")")[2].split()[0] in {b"Z", b"X", b"x"}
    except (FileNotFoundError, ProcessLookupError):
        return True
