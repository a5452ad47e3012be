"""The threads and children of a process as /proc lists them, for walks over a tree that lives meanwhile.

A process that has ended is an empty answer here, not an error (proc.threads raises).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping

from checkpoint.kernel.threads import read_files

_WORKER = 0x10 | 0x4000


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


def tree_of(root_pid: int) -> dict[int, list[int]]:
    """A process and all its descendants as they are now, parents first: pid -> its tids. Empty: it is gone."""
    tree: dict[int, list[int]] = {}
    level = [root_pid]
    while level:
        here = {pid: tids for pid in level if (tids := task_ids(pid))}
        if not here and not tree:
            break
        tree |= here
        level = [child for child in children_of(here) if child not in tree]
    return tree


def without_workers(tasks: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Those of (pid, tid) that are the program's own, in their order.

    The kernel has threads of its own inside processes (io_uring's and vhost's workers: PF_IO_WORKER, PF_USER_WORKER,
    include/linux/sched.h). They never enter user mode, so that whoever waits for them to run something waits for ever; to
    interrupt them ends what they do with EINTR; and the kernel makes new ones when it needs them.
    """
    given = list(tasks)
    threads = [(pid, tid) for pid, tid in given if pid != tid]
    stats = read_files([f"/proc/{pid}/task/{tid}/stat" for pid, tid in threads])
    workers = {
        task
        for task, stat in zip(threads, stats, strict=True)
        if stat and int(stat.rpartition(b")")[2].split()[6]) & _WORKER
    }
    return [task for task in given if task not in workers]


def is_dead(pid: int, tid: int) -> bool:
    """Zombie, dead or gone."""
    try:
        with open(f"/proc/{pid}/task/{tid}/stat", "rb", buffering=0) as file:
            return file.read(512).rpartition(b")")[2].split()[0] in {b"Z", b"X", b"x"}
    except (FileNotFoundError, ProcessLookupError):
        return True
