"""What takes all of a running job to judge of one descriptor: each kind's `look`, asked before the job is touched.

Owns the walk, and what the kinds may ask for in it. The same is refused in the frozen window, where it may have come up since.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from checkpoint.kernel import descriptors as sys
from checkpoint.kernel import distant, sockdiag
from checkpoint.resources import sharing
from checkpoint.resources.files.kind import descriptors, see
from snapshotter.base.errors import Finding, UnsupportedError

if TYPE_CHECKING:
    from checkpoint.kernel.fdinfo import EpollTarget
    from checkpoint.resources.files.kind import Kind, Seen

_LINKS = (b"socket:", b"pidfd:", b"anon_inode:[pidfd]", b"anon_inode:[eventpoll]")
"""What those kinds look like that have a `look`."""


class Looking:
    """One look at all descriptors of a job."""

    def __init__(self, pids: Sequence[int]) -> None:
        self.pids = pids

    def has_task(self, seen: Seen, tid: int) -> bool:
        """Whether a task is of the job, as far as who has this descriptor can tell."""
        return tid in self.pids or os.path.isdir(f"/proc/{seen.pid}/task/{tid}")

    @functools.cached_property
    def sockets(self) -> dict[int, sockdiag.UnixSocketInfo]:
        """Every unix socket of the network namespace."""
        return sockdiag.unix_sockets()

    @functools.cached_property
    def tables(self) -> list[int]:
        """One task for each descriptor table."""
        return list(itertools.chain.from_iterable(map(sharing.descriptor_tables, self.pids)))

    @functools.cached_property
    def _by_inode(self) -> dict[tuple[int, int], list[tuple[int, int]]]:
        """(dev, ino) -> (task, descriptor) of everything that the job has open."""
        found: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for task in self.tables:
            for fd in descriptors(task):
                try:
                    place = f"/proc/{task}/fd/{fd}"
                    stat = distant.stat(place, os.fsencode(os.readlink(place)))
                except OSError:
                    continue
                found.setdefault((stat.st_dev, stat.st_ino), []).append((task, fd))
        return found

    def may_have_epoll_target(self, epoll: Seen, target: EpollTarget, nth: int) -> bool:
        """Whether the job has what an entry of an epoll instance watches open, under whatever number; or it may be in flight in a
        queue of the job's, which no look can see.
        """
        likely = [(epoll.pid, target.fd)]
        others = self._by_inode.get((target.dev, target.ino), [])
        return any(_is_target(*place, epoll, target, nth) for place in (*likely, *others)) or self._has_queues

    @functools.cached_property
    def _has_queues(self) -> bool:
        inodes = {ino for _, ino in self._by_inode}
        return any(info.rqueue and info.ino in inodes for info in self.sockets.values())


def _is_target(task: int, fd: int, epoll: Seen, target: EpollTarget, nth: int) -> bool:
    try:
        return sys.is_epoll_target(task, fd, epoll.pid, epoll.fd, target.fd, nth)
    except OSError:  # nothing has that number (any more)
        return False


def look_job(pids: Sequence[int], kinds: Sequence[Kind], report: list[Finding]) -> None:
    """Adds what is refused of a job that may be running."""
    looking = Looking(pids)
    for task in looking.tables:
        for fd in descriptors(task):
            try:
                if not os.readlink(os.fsencode(f"/proc/{task}/fd/{fd}")).startswith(_LINKS):
                    continue
                seen = see(task, fd)
                kind = next((one for one in kinds if seen is not None and one.claims(seen)), None)
                if seen is None or kind is None:
                    continue
                report += [finding] if (finding := kind.look(seen, looking)) is not None else []
            except UnsupportedError as error:
                report += error.findings
            except OSError:
                continue  # closed meanwhile
