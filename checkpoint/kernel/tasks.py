"""The threads and children of a process as /proc lists them, for walks over a tree that lives meanwhile.

A process that has ended is an empty answer here, not an error (proc.threads raises).
"""

from __future__ import annotations

import os


def task_ids(pid: int) -> list[int]:
    """The tids of a process, ascending; empty when it is gone."""
    try:
        return sorted(map(int, os.listdir(f"/proc/{pid}/task")))
    except (FileNotFoundError, ProcessLookupError):
        return []


def children(pid: int, tids: list[int]) -> list[int]:
    """The pids of the children of all threads of a process; exact when they are stopped."""
    found: list[int] = []
    for tid in tids:
        text = b""
        try:
            with open(f"/proc/{pid}/task/{tid}/children", "rb", buffering=0) as file:
                # At most a page comes at a time, and a number may lie across the end of it.
                while piece := file.read(1 << 16):
                    text += piece
        except (FileNotFoundError, ProcessLookupError):
            continue
        found += map(int, text.split())
    return found


def is_dead(pid: int, tid: int) -> bool:
    """Zombie, dead or gone."""
    try:
        with open(f"/proc/{pid}/task/{tid}/stat", "rb", buffering=0) as file:
            return file.read(512).rpartition(b")")[2].split()[0] in {b"Z", b"X", b"x"}
    except (FileNotFoundError, ProcessLookupError):
        return True
