"""How stubs come to share what the job's tasks shared: descriptor tables, and working directory with root and umask. Pure.

Owns the reasoning; makes no task. A *class* is the set of tasks that have the same table; it is named by a number
above 0, and tasks of class 0 share with nobody.

What the kernel allows, and therefore what the plan is made of: a task can be *born* into its maker's class (CLONE_FILES,
CLONE_FS) and can *leave* it for one of its own (unshare), but never join another. So whatever lies between two
processes of a class in the tree is born into it, too, and leaves it once its children are there; a
process may go through several classes, and ends in its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field


class SharingError(ValueError):
    """No order of clone and unshare gives these tasks what they share."""


@dataclass(slots=True)
class Sharing:
    """One kind of table while a tree of stubs is being made: who holds which class."""

    what: str
    """For messages: "descriptor table"."""
    classes: Mapping[int, int]
    """pid -> class, of those only that share with another process."""
    parents: Mapping[int, int]
    """pid -> parent, of every process of the tree; the root's is none of them."""
    born: dict[int, int] = field(default_factory=dict)
    """pid -> the class that it must be born into."""
    _begins: dict[int, int] = field(default_factory=dict)
    """Class -> the process that all others get it from: their last common ancestor."""
    _holds: dict[int, int] = field(default_factory=dict)
    _taken: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        members: dict[int, list[int]] = {}
        for pid, number in self.classes.items():
            members.setdefault(number, []).append(pid)
        for number, pids in members.items():
            lines = [self._line(pid) for pid in pids]
            # From the root down, as far as all have it in common: the last of those is where the class begins.
            nr_common = 0
            while all(len(line) > nr_common and line[nr_common] == lines[0][nr_common] for line in lines):
                nr_common += 1
            self._begins[number] = lines[0][nr_common - 1]
            for line in lines:
                for pid in line[nr_common:]:
                    if self.born.setdefault(pid, number) != number:
                        raise SharingError(
                            f"task {pid} stands between processes that share one {self.what} and others that share "
                            "another"
                        )

    def _line(self, pid: int) -> list[int]:
        line = [pid]
        while line[-1] in self.parents:
            line.append(self.parents[line[-1]])
        return line[::-1]

    def rank(self, parent: int, child: int) -> tuple[int, int]:
        """Children in this order ask their parent for nothing that it has left already."""
        wanted = self.born.get(child, 0)
        if not wanted:
            return 1, 0
        if wanted == self.born.get(parent):
            return 0, 0
        return (3, 0) if wanted == self.classes.get(parent) else (2, wanted)

    def can(self, maker: int, child: int) -> bool:
        """Whether `maker` could make that child now."""
        wanted = self.born.get(child, 0)
        return not wanted or self._holds.get(maker, 0) == wanted or self._may_begin(maker, wanted)

    def _may_begin(self, maker: int, number: int) -> bool:
        return self._begins[number] == maker and number not in self._taken

    def fork(self, maker: int, pid: int, like: int) -> tuple[bool, bool]:
        """Note that `maker` makes `pid`, which is `like` or a helper that will make it.

        Returns:
            Whether `maker` must leave its class before, and whether the new one shares with it.

        Raises:
            SharingError: the maker cannot be in the class that it takes.
        """
        wanted = self.born.get(like, 0)
        if not wanted:
            return False, False
        held = self._holds.get(maker, 0)
        if held != wanted:
            if not self._may_begin(maker, wanted):
                raise SharingError(
                    f"task {like}: nobody who could make it is in the class of its {self.what}"
                )
            self._holds[maker] = wanted
            self._taken.add(wanted)
        self._holds[pid] = wanted
        return held not in {0, wanted}, True

    def leave(self) -> set[int]:
        """Once all are made: who must leave the class that it holds for one of its own.

        Raises:
            SharingError: somebody does not get back to its own class.
        """
        known = {*self.parents, *self.parents.values()}
        leaving = set()
        for pid in known & {*self._holds, *self.classes}:
            held, wanted = self._holds.get(pid, 0), self.classes.get(pid, 0)
            if held != wanted:
                if wanted:
                    raise SharingError(f"task {pid}: it cannot be in the class of its {self.what}")
                leaving.add(pid)
        return leaving


@dataclass(frozen=True, slots=True)
class ThreadTables:
    """The classes of one thread; 0: those of its process's first thread."""

    tid: int
    files: int = 0
    fs: int = 0


@dataclass(frozen=True, slots=True)
class MakeThread:
    """`maker` clones the thread `tid`, with or without CLONE_FILES and CLONE_FS."""

    tid: int
    maker: int
    files: bool
    fs: bool

    def __str__(self) -> str:
        own = [name for name, shares in (("descriptors", self.files), ("directories", self.fs)) if not shares]
        return f"{self.maker} clones thread {self.tid}" + (
            f" with its own {' and '.join(own)}" if own else ""
        )


def plan_threads(leader: int, threads: Sequence[ThreadTables]) -> list[MakeThread]:
    """Who makes which thread, in that order.

    Args:
        leader: the first thread, which is there.
        threads: all others.

    Raises:
        SharingError: there is no such order.
    """
    sizes = (Counter(thread.files for thread in threads), Counter(thread.fs for thread in threads))
    steps: list[MakeThread] = []
    pairs: dict[tuple[int, int], int] = {(0, 0): leader}
    by_files, by_fs = {0: leader}, {0: leader}
    waiting: list[ThreadTables] = []
    for thread in threads:
        alone = (thread.files and sizes[0][thread.files] == 1, thread.fs and sizes[1][thread.fs] == 1)
        if (not thread.files or alone[0]) and (not thread.fs or alone[1]):
            steps.append(MakeThread(thread.tid, leader, not thread.files, not thread.fs))
        else:
            waiting.append(thread)
    while waiting:
        # Those first that have more in common with what is there: whoever comes later may need them.
        best: tuple[int, int, ThreadTables, int] | None = None
        for at, thread in enumerate(waiting):
            files, fs = thread.files in by_files, thread.fs in by_fs
            if files and fs:
                maker = pairs.get((thread.files, thread.fs))
            else:
                maker = by_files.get(thread.files) or by_fs.get(thread.fs) or leader
            if maker is not None and (best is None or files + fs > best[0]):
                best = (files + fs, at, thread, maker)
        if best is None:
            raise SharingError(
                f"thread {waiting[0].tid} shares descriptors with one thread and directories with another"
            )
        _, at, thread, maker = best
        del waiting[at]
        steps.append(MakeThread(thread.tid, maker, thread.files in by_files, thread.fs in by_fs))
        pairs.setdefault((thread.files, thread.fs), thread.tid)
        by_files.setdefault(thread.files, thread.tid)
        by_fs.setdefault(thread.fs, thread.tid)
    return steps


def shared_only(classes: Mapping[int, int], among: Iterable[int]) -> dict[int, int]:
    """Of `classes` (task -> first task that has the same), those that two or more of `among` are in."""
    among = list(among)
    sizes = Counter(classes[pid] for pid in among)
    return {pid: classes[pid] for pid in among if sizes[classes[pid]] > 1}
