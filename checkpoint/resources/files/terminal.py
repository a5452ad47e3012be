"""Terminals: the job goes on on the terminal it had, if that still exists; else the user chooses.

State: which terminal, and its settings as a record (the terminal itself lives on without the job and
keeps its own). Restore: reopened without taking it as controlling terminal (O_NOCTTY). The number of a terminal
is given to the next user as soon as it is free: it counts as the same one only in the same boot, with the same owner
and with the same session on it (pid and start time of its leader; none or the job's own, where the job led it). When it is gone,
options.terminal decides: "null" gives the job /dev/null, anything else is a RestoreConflictError that
names the choice; nothing is ever swapped in silence. `/dev/tty` is recorded as the terminal behind it.

Refused: pty masters (the other side of a terminal of the job's own, as in tmux, script or an ssh server).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import termios
import time
from typing import TYPE_CHECKING

from checkpoint.kernel import descriptors, proc
from checkpoint.resources import authority, paths, proof
from checkpoint.resources.authority import Found
from checkpoint.resources.files import kind
from images import common_pb2
from snapshotter.base.errors import Finding, RestoreConflictError, SnapshotterError

if TYPE_CHECKING:
    from checkpoint.resources.files.dumping import FilesDump
    from checkpoint.resources.files.kind import Seen
    from checkpoint.resources.files.opening import Opening
    from images import files_pb2

_TTY, _CONSOLE, _PTMX = os.makedev(5, 0), os.makedev(5, 1), os.makedev(5, 2)
_TTY_MAJORS = frozenset({4, 204, 229, *range(136, 144)})
_MESSAGES = 0o020
"""The bit of a terminal's mode that mesg(1) changes."""
_TCGETS2_BYTES = 44
_TCGETS2 = 0x802C542A
_CLOSING_S = 0.3


class TerminalKind(kind.Kind):
    field = "terminal"

    def claims(self, seen: Seen) -> bool:
        if not stat.S_ISCHR(seen.stat.st_mode) or seen.path_only:
            return False
        rdev = seen.stat.st_rdev
        return rdev in {_TTY, _CONSOLE, _PTMX} or os.major(rdev) in _TTY_MAJORS

    def refusal(self, seen: Seen) -> Finding | None:
        _leader_of(seen.stat.st_rdev)  # so that the frozen window need not walk through /proc
        if seen.stat.st_rdev == _PTMX or seen.link.endswith(b"/ptmx"):
            return Finding(
                seen.pid,
                seen.where,
                "is the master side of a pseudo terminal, which cannot be dumped",
                "run the job without tmux, screen or script inside it; they may be around it",
            )
        return None

    def dump(self, job: FilesDump, seen: Seen, description: files_pb2.Description) -> None:
        terminal = description.terminal
        terminal.identity.CopyFrom(kind.identity_of(seen))
        terminal.rdev = seen.stat.st_rdev
        with job.borrow(seen) as fd:
            try:
                terminal.rdev = descriptors.terminal_device(fd)
                terminal.termios = fcntl.ioctl(fd, _TCGETS2, bytes(_TCGETS2_BYTES))
                terminal.winsize = fcntl.ioctl(fd, termios.TIOCGWINSZ, bytes(8))
            except OSError as error:  # a terminal that was hung up answers EIO
                job.ctx.warn(f"terminal {seen.link.decode(errors='replace')} was hung up: {error.strerror}")
        _record_session(job, terminal)
        if seen.stat.st_rdev == _CONSOLE:  # the node of the system's, whatever terminal that is at the time
            terminal.node_rdev = _CONSOLE
        elif terminal.rdev != seen.stat.st_rdev:
            terminal.identity.path = _path_of(terminal.rdev) or seen.path
        terminal.uid = seen.stat.st_uid
        if terminal.identity.path != seen.path:
            with contextlib.suppress(OSError):
                state = os.stat(terminal.identity.path)
                terminal.uid = state.st_uid
                terminal.identity.mode = state.st_mode
                proof.record(terminal.identity, state, terminal.identity.path)
        terminal.leader, terminal.leader_start_time_ticks = _leader_of(terminal.rdev)
        terminal.boot_id = _boot_id()

    def check(self, opening: Opening, description: files_pb2.Description) -> None:
        if opening.terminal != "null":
            opening.keep(description, _find(opening, description))
            _warn_of_sharing(opening, description.terminal)

    def open(self, opening: Opening, description: files_pb2.Description) -> int:
        where = paths.shown(description.terminal.identity.path)
        hung_up = any(one.code == "terminal_leader" for one in opening.ctx.accepted)
        try:
            # Found anew: the old job's end may have hung it up, and its number may be another's by now.
            found = _find_closing(opening, description) if hung_up else _find(opening, description)
        except RestoreConflictError as error:
            if opening.terminal != "null" and not hung_up:
                raise
            opening.warn(f"{where}: {error.what}; the job has /dev/null instead")
            return os.open("/dev/null", (description.flags & (os.O_ACCMODE | os.O_NONBLOCK)) | os.O_CLOEXEC)
        opening.keep(description, found)
        return opening.open_judged(description, where)


def _find(opening: Opening, description: files_pb2.Description) -> Found:
    """The terminal; RestoreConflictError when it is gone, or somebody else's by now, or closed to the job."""
    terminal = description.terminal
    try:
        fd = paths.locate(terminal.identity, same_inode=False, rdev=terminal.node_rdev or terminal.rdev)
    except SnapshotterError as error:
        raise _gone(terminal, "is gone") from error
    reason = _other(opening, terminal, os.fstat(fd).st_uid)
    if reason:
        os.close(fd)
        raise _gone(terminal, f"is gone, and {reason}")
    wanted = common_pb2.FileIdentity()
    wanted.CopyFrom(terminal.identity)
    if (os.fstat(fd).st_mode ^ wanted.mode) & ~_MESSAGES == 0:
        wanted.mode = os.fstat(fd).st_mode
    who = opening.ctx.holders.of_description(description.id)
    access = authority.access_of(description.flags)
    # Boot, owner and session say that it is the same one.
    return authority.judged(opening.ctx, fd, wanted, who, access, proven=True)


def _find_closing(opening: Opening, description: files_pb2.Description) -> Found:
    """The same for one that was hung up by the kill: whoever holds the other side mostly closes it within moments."""
    deadline = time.monotonic() + _CLOSING_S
    while True:
        found = _find(opening, description)
        if time.monotonic() > deadline:
            return found
        found.close()
        time.sleep(_CLOSING_S / 20)


def _warn_of_sharing(opening: Opening, terminal: files_pb2.Terminal) -> None:
    """A session that neither the job nor snap is in cannot be joined: its shell then reads what the job should."""
    leader, _ = _leader_of(terminal.rdev)
    if leader and leader not in opening.ctx.processes and leader != os.getsid(0):
        where = paths.shown(terminal.identity.path)
        opening.warn(
            f"{where}: is the terminal of the session of process {leader} ({paths.shown(proc.read_stat(leader).comm)}), which only "
            "a command started there can join: what is typed reaches either the job or that session; roll back from "
            "a shell on that terminal to bring the job into its session"
        )


def _other(opening: Opening, terminal: files_pb2.Terminal, uid: int) -> str:
    """What shows that a terminal of this number is another one now; "" if nothing does."""
    if terminal.boot_id != _boot_id():
        return "the machine was booted since"
    if uid != terminal.uid:
        return f"the one of that number now belongs to user {uid}, not {terminal.uid}"
    leader, start = _leader_of(terminal.rdev)
    if (leader, start) == (terminal.leader, terminal.leader_start_time_ticks):
        return ""
    # The pids of the job are free or held by the old job itself: the survey has seen to that.
    if leader in opening.ctx.processes or (not leader and terminal.session):
        return ""
    if leader:
        return f"the one of that number has the session of process {leader} now"
    return f"the session of process {terminal.leader} on it has ended"


def _gone(terminal: files_pb2.Terminal, what: str) -> RestoreConflictError:
    return RestoreConflictError(
        f"the terminal that the job was on {what}",
        where=paths.shown(terminal.identity.path),
        hint="roll back with --terminal null to give the job /dev/null instead",
    )


_leaders: dict[int, tuple[int, int]] = {}
"""rdev -> (pid, start time) of whoever led the session on it when it was last looked for."""


def _leader_of(rdev: int) -> tuple[int, int]:
    """(pid, start time) of the leader of the session that a terminal controls; zeros without one."""
    known = _leaders.get(rdev)
    if known is not None and _leads(known[0], rdev) == known[1] > 0:
        return known
    for name in os.listdir("/proc"):
        if name.isdigit():
            start = _leads(int(name), rdev)
            if start:
                _leaders[rdev] = int(name), start
                return _leaders[rdev]
    return 0, 0


def _leads(pid: int, rdev: int) -> int:
    """The start time of a process that leads a session on this terminal, else 0."""
    try:
        state = proc.read_stat(pid)
    except (OSError, SnapshotterError):
        return 0
    tty = descriptors.device_number(state.tty_nr & 0xFFFFFFFF) if state.tty_nr else -1
    return state.start_time_ticks if state.session == pid and tty == rdev else 0


def _boot_id() -> str:
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()


def _record_session(job: FilesDump, terminal: files_pb2.Terminal) -> None:
    """If it is the controlling terminal of a session that the job leads: of which, and who is in front."""
    for pid in job.ctx.processes:
        state = proc.read_stat(pid)
        if (
            state.session == pid
            and state.tty_nr
            and descriptors.device_number(state.tty_nr & 0xFFFFFFFF) == terminal.rdev
        ):
            terminal.session = pid
            terminal.foreground_pgrp = state.tpgid
            return


def _path_of(rdev: int) -> bytes | None:
    """Where a terminal's node is, by the usual names."""
    major, minor = os.major(rdev), os.minor(rdev)
    if 136 <= major < 144:
        return b"/dev/pts/%d" % ((major - 136) * 256 + minor)
    if major == 4:
        return b"/dev/tty%d" % minor if minor < 64 else b"/dev/ttyS%d" % (minor - 64)
    return b"/dev/console" if rdev == _CONSOLE else None


KIND = TerminalKind()
