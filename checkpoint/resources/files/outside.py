"""Finds what ties a job to processes outside it: the other ends of its pipes and sockets.

Looks at the whole job at once, before the freeze, reading /proc and unix_diag only. Findings name the
process at the other end, and what to do.
"""

from __future__ import annotations

import functools
import itertools
import os
import select
import stat
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from checkpoint.kernel import descriptors as sys
from checkpoint.kernel import sockdiag
from checkpoint.resources.files.kind import Seen, descriptors, see
from snapshotter.base.errors import Finding, UnsupportedError

if TYPE_CHECKING:
    from checkpoint.resources.files.dumping import FilesDump

_TO_SYSTEM_LOG = (b"/run/systemd/journal", b"/dev/log")


def holders(links: set[bytes], except_pids: Iterable[int]) -> dict[bytes, tuple[int, int]]:
    """Who else has one of these pipes or sockets ("pipe:[1]") open: link -> (pid, descriptor).

    The job may run: children that were born since its processes were listed belong to it too.
    """
    found: dict[bytes, tuple[int, int]] = {}
    job = set(except_pids)
    skip = {*job, os.getpid()}
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) in skip:
            continue
        try:
            numbers = os.listdir(f"/proc/{name}/fd")
        except OSError:
            continue
        for number in numbers:
            try:
                link = os.readlink(os.fsencode(f"/proc/{name}/fd/{number}"))
            except OSError:
                continue
            if link not in links or link in found:
                continue
            if _descends(int(name), job):
                break
            found[link] = (int(name), int(number))
    return found


def _descends(pid: int, job: set[int]) -> bool:
    """Whether an ancestor of `pid` is of the job; also true when it has ended meanwhile."""
    while pid > 1:
        try:
            with open(f"/proc/{pid}/stat", "rb") as file:
                pid = int(file.read().rpartition(b")")[2].split()[1])
        except (OSError, IndexError, ValueError):
            return True
        if pid in job:
            return True
    return False


def look_job(pids: Sequence[int], report: list[Finding]) -> None:
    """Pipes and unix sockets of the job whose other end is outside it; descriptor tables shared by processes."""
    pipes: dict[bytes, Seen] = {}
    sockets: dict[int, Seen] = {}
    for pid in pids:
        try:
            numbers = descriptors(pid)
        except OSError:
            continue  # look() of that process says why
        for fd in numbers:
            try:
                link = os.readlink(os.fsencode(f"/proc/{pid}/fd/{fd}"))
            except OSError:
                continue
            if link.startswith((b"pipe:", b"socket:", b"/")):
                seen = see(pid, fd) if not link.startswith(b"/") or _is_fifo(pid, fd) else None
                if seen is None:
                    continue
                if stat.S_ISFIFO(seen.stat.st_mode) and not seen.path_only:
                    pipes.setdefault(seen.link, seen)
                elif stat.S_ISSOCK(seen.stat.st_mode):
                    sockets.setdefault(seen.stat.st_ino, seen)
    _pipes(pids, pipes, report)
    _sockets(pids, sockets, report)
    _tables(pids, report)


def _is_fifo(pid: int, fd: int) -> bool:
    try:
        return stat.S_ISFIFO(os.stat(f"/proc/{pid}/fd/{fd}").st_mode)
    except OSError:
        return False


def _name(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/comm", "rb") as file:
            return file.read().strip().decode("utf-8", "replace")
    except OSError:
        return "?"


def _pipes(pids: Sequence[int], pipes: dict[bytes, Seen], report: list[Finding]) -> None:
    outside = holders(set(pipes), pids) if pipes else {}
    for link, (pid, fd) in sorted(outside.items()):
        seen = pipes[link]
        name = "its standard output" if seen.fd in {1, 2} else "its standard input" if seen.fd == 0 else "it"
        report.append(
            Finding(
                seen.pid,
                seen.where,
                f"process {pid} ({_name(pid)}), which is not part of the job, has this pipe open as descriptor {fd}",
                f"redirect {name} to a file, or take the point of a parent of both",
            )
        )


def _sockets(pids: Sequence[int], sockets: dict[int, Seen], report: list[Finding]) -> None:
    if not sockets:
        return
    known = sockdiag.unix_sockets()
    for ino, seen in sockets.items():
        info = known.get(ino)
        if info is not None and info.peer and info.peer not in sockets:
            report.append(outside_peer(seen, known.get(info.peer), pids))


def outside_peer(seen: Seen, peer: sockdiag.UnixSocketInfo | None, pids: Iterable[int]) -> Finding:
    """The finding for a unix socket that is connected to one outside the job."""
    name = peer.name if peer else b""
    if name.startswith(_TO_SYSTEM_LOG):
        return Finding(
            seen.pid,
            seen.where,
            "is a socket to the system log",
            "let the program log to a file, or close it first",
        )
    owner = holders({b"socket:[%d]" % peer.ino}, pids) if peer else {}
    who = "".join(f" (process {pid}, {_name(pid)})" for pid, _ in owner.values())
    at = f" at {_printable(name)}" if name else ""
    return Finding(
        seen.pid,
        seen.where,
        f"is a unix socket connected to one outside the job{at}{who}",
        "take the point of a parent of both, or close the connection first",
    )


def _printable(name: bytes) -> str:
    text = name.rstrip(b"\0")
    return ("@" if text.startswith(b"\0") else "") + text.lstrip(b"\0").decode("utf-8", "replace")


def _tables(pids: Sequence[int], report: list[Finding]) -> None:
    """CLONE_FILES between processes: sorted by kcmp's order, those that share are neighbours."""

    def order(one: int, other: int) -> int:
        try:
            return {0: 0, 1: -1}.get(sys.kcmp(one, other, sys.KCMP_FILES, 0, 0), 1)
        except OSError:
            return -1  # one of them ended, or may not be looked at: the dump will say so

    ordered = sorted(pids, key=functools.cmp_to_key(order))
    for one, other in itertools.pairwise(ordered):
        if order(one, other) == 0:
            what = f"is shared with process {other} (CLONE_FILES)"
            report.append(Finding(one, "descriptor table", what, "only threads may share one"))


def lone_ends(job: FilesDump) -> None:
    """In the frozen job: a pipe of which it has one end only must have nobody at the other.

    The kernel says so itself: a read end without writers polls as hung up, a write end without readers
    as in error. Raises UnsupportedError for a pipe that somebody else keeps alive.
    """
    ends: dict[int, list[Seen]] = {}
    both: dict[int, set[bool]] = {}
    for description in job.image.descriptions:
        if description.HasField("pipe"):
            pipe = description.pipe
            ends.setdefault(pipe.id, []).append(job.examples[description.id])
            sides = both.setdefault(pipe.id, set())
            sides.update([True] if pipe.read_end else [], [False] if pipe.write_end else [])
    for number, sides in both.items():
        if len(sides) != 1:
            continue
        seen = ends[number][0]
        if not seen.link.startswith(b"pipe:"):
            continue  # a FIFO that nobody else has opened yet is an ordinary thing
        with job.borrow(seen) as fd:
            poll = select.poll()
            poll.register(fd, 0)
            alone = any(events & (select.POLLHUP | select.POLLERR) for _, events in poll.poll(0))
        if not alone:
            report: list[Finding] = []
            _pipes([*job.ctx.processes], {seen.link: seen}, report)
            finding = (
                report[0]
                if report
                else Finding(seen.pid, seen.where, "the other end of this pipe is outside the job")
            )
            raise UnsupportedError(
                finding.what, where=f"task {seen.pid}, {seen.where}", hint=finding.hint, findings=(finding,)
            )
