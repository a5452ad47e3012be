"""Finds what ties a job to processes outside it: the other ends of its pipes and sockets.

Looks at the whole job at once, before the freeze, reading /proc and unix_diag only. A unix socket to the
outside is a finding that names the process at the other end. A pipe to the outside (`job | tee log`) is
none: the dump records who holds it, and the restore opens the same pipe again through that process's
/proc/PID/fd, before the old job is killed. When that process has ended, the job finds the other end
closed, as it would have if it had gone on, and a warning says so.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import select
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from checkpoint.kernel import proc, sockdiag
from checkpoint.resources import sharing
from checkpoint.resources.files import lookers
from checkpoint.resources.files.kind import DELETED, Seen, descriptors, see
from snapshotter.base.errors import Finding, SnapshotterError

if TYPE_CHECKING:
    from checkpoint.resources.files.dumping import FilesDump
    from images import files_pb2

_TO_SYSTEM_LOG = (b"/run/systemd/journal", b"/dev/log")


@dataclass(frozen=True, slots=True)
class Holder:
    """A process outside the job that has one of its pipes or sockets open."""

    pid: int
    fd: int
    start_time_ticks: int
    comm: str


def holders(links: set[bytes], except_pids: Iterable[int]) -> dict[bytes, list[Holder]]:
    """Who else has these pipes or sockets ("pipe:[1]") open. Snap itself and the job are left out."""
    found: dict[bytes, list[Holder]] = {}
    skip = {*except_pids, os.getpid()}
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) in skip:
            continue
        try:
            mine: dict[bytes, int] = {}
            for number in os.listdir(f"/proc/{name}/fd"):
                with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                    link = os.readlink(os.fsencode(f"/proc/{name}/fd/{number}"))
                    if link in links:
                        mine.setdefault(link, int(number))
            if mine:
                state = proc.read_stat(int(name))
        except (OSError, SnapshotterError):
            continue  # it ended, or is not ours to see
        for link, fd in mine.items():
            comm = state.comm if isinstance(state.comm, str) else os.fsdecode(state.comm)
            found.setdefault(link, []).append(Holder(int(name), fd, state.start_time_ticks, comm))
    return found


_found_by_look: dict[bytes, list[Holder]] = {}
"""What the last look found, for the dump that follows it: the frozen window is no time to walk through /proc."""


def look_job(pids: Sequence[int], report: list[Finding]) -> None:
    """Unix sockets of the job whose other end is outside it.

    Pipes to the outside are no finding: see record_outside.
    """
    pipes: dict[bytes, Seen] = {}
    sockets: dict[int, Seen] = {}
    entries: list[Seen] = []
    for task in itertools.chain.from_iterable(map(sharing.descriptor_tables, pids)):
        try:
            numbers = descriptors(task)
        except OSError:
            continue  # look() of that process says why
        for fd in numbers:
            try:
                link = os.readlink(os.fsencode(f"/proc/{task}/fd/{fd}"))
            except OSError:
                continue
            if link.startswith((b"/proc/", b"/sys/")) and (entry := see(task, fd)) is not None:
                entries.append(entry)
            elif link.startswith((b"pipe:", b"socket:", b"/")):
                seen = see(task, fd) if not link.startswith(b"/") or _is_fifo(task, fd) else None
                if seen is None:
                    continue
                if stat.S_ISFIFO(seen.stat.st_mode) and not seen.path_only:
                    pipes.setdefault(seen.link, seen)
                elif stat.S_ISSOCK(seen.stat.st_mode):
                    sockets.setdefault(seen.stat.st_ino, seen)
    _pipes(pids, {link: seen for link, seen in pipes.items() if _has_no_path(link)})
    _sockets(pids, sockets, report)
    lookers.look_job(pids, entries, report)


def _has_no_path(link: bytes) -> bool:
    """A pipe, or a FIFO whose name was deleted: nobody finds it by a path."""
    return link.startswith(b"pipe:") or link.endswith(DELETED)


def _is_that_fifo(buffer: files_pb2.PipeBuffer, path: str) -> bool:
    """A name that was deleted may have been used, and deleted, again."""
    now = os.stat(path)
    return not buffer.is_fifo or (now.st_dev, now.st_ino) == (buffer.fifo.dev, buffer.fifo.ino)


def _is_fifo(pid: int, fd: int) -> bool:
    try:
        return stat.S_ISFIFO(os.stat(f"/proc/{pid}/fd/{fd}").st_mode)
    except OSError:
        return False


def _pipes(pids: Sequence[int], pipes: dict[bytes, Seen]) -> None:
    """Remembers who has the job's pipes open elsewhere: the dump records it, and a restore connects again."""
    _found_by_look.clear()
    if pipes:
        _found_by_look.update(holders(set(pipes), pids))


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
    who = "".join(f" (process {found[0].pid}, {found[0].comm})" for found in owner.values())
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


def record_outside(job: FilesDump) -> None:
    """In the frozen job: notes in each pipe who holds it outside the job, and warns.

    A pipe of which the job has one end only and whose other end is alive, by the kernel's own word (a read
    end without writers polls as hung up, a write end without readers as in error), must be in somebody's
    hands: if the look did not see whose, /proc is walked again.
    """
    examples: dict[int, Seen] = {}
    sides: dict[int, set[str]] = {}
    for description in job.image.descriptions:
        if description.HasField("pipe"):
            pipe = description.pipe
            examples.setdefault(pipe.id, job.examples[description.id])
            ends = sides.setdefault(pipe.id, set())
            ends.update(side for side, has in (("read", pipe.read_end), ("write", pipe.write_end)) if has)
    for number, seen in examples.items():
        if not _has_no_path(seen.link):
            continue  # a FIFO is found by its path, by everybody
        found = [holder for holder in _found_by_look.get(seen.link, []) if _is_outside(job, holder)]
        if not found and len(sides[number]) == 1 and not _alone(job, seen):
            found = holders({seen.link}, job.ctx.processes).get(seen.link, [])
        buffer = job.pipes[number]
        buffer.link = seen.link
        for holder in found:
            buffer.holders.add(
                pid=holder.pid,
                fd=holder.fd,
                start_time_ticks=holder.start_time_ticks,
                comm=os.fsencode(holder.comm),
            )
        if found:
            job.ctx.warn(
                f"task {seen.pid}, {seen.where}: process {found[0].pid} ({found[0].comm}), which is not part of the "
                "job, has this pipe open too; a rollback connects to it again if it is still there"
            )


def _is_outside(job: FilesDump, holder: Holder) -> bool:
    """Whether one that the look found is there still, and no child that the job bore just then: the old pipe of one of the job's
    own must not be taken for the outside's at a rollback.
    """
    if holder.pid in job.ctx.processes:
        return False
    try:
        return proc.read_stat(holder.pid).start_time_ticks == holder.start_time_ticks
    except (OSError, SnapshotterError):
        return False


def _alone(job: FilesDump, seen: Seen) -> bool:
    with job.borrow(seen) as fd:
        poll = select.poll()
        poll.register(fd, 0)
        return any(events & (select.POLLHUP | select.POLLERR) for _, events in poll.poll(0))


def connect_again(buffer: files_pb2.PipeBuffer, flags: int) -> int | None:
    """Another descriptor of a pipe that somebody outside the job still has open; None if nobody has.

    The number of a pipe's inode may come back after a reboot or a long time: only those that held it at the
    dump count.
    """
    for holder in buffer.holders:
        try:
            if proc.read_stat(holder.pid).start_time_ticks != holder.start_time_ticks:
                continue
            numbers = [str(holder.fd), *os.listdir(f"/proc/{holder.pid}/fd")]
        except (OSError, SnapshotterError):
            continue
        for number in numbers:
            path = f"/proc/{holder.pid}/fd/{number}"
            try:
                if os.readlink(os.fsencode(path)) == buffer.link and _is_that_fifo(buffer, path):
                    return os.open(path, (flags & (os.O_ACCMODE | os.O_NONBLOCK)) | os.O_CLOEXEC)
            except OSError:
                continue
    return None
