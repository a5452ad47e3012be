"""Terminals: the job goes on on the terminal it had, if that still exists; else the user chooses.

State: which terminal, and its settings as a record (the terminal itself lives on without the job and
keeps its own). Restore: reopened without taking it as controlling terminal (O_NOCTTY). When it is gone,
options.terminal decides: "null" gives the job /dev/null, anything else is a RestoreConflictError that
names the choice; nothing is ever swapped in silence. `/dev/tty` is recorded as the terminal behind it.

Refused: pty masters (the other side of a terminal of the job's own, as in tmux, script or an ssh server).
"""

from __future__ import annotations

import fcntl
import os
import stat
import termios
from typing import TYPE_CHECKING

from checkpoint.kernel import descriptors, proc
from checkpoint.resources import paths
from checkpoint.resources.files import kind
from snapshotter.base.errors import Finding, RestoreConflictError

if TYPE_CHECKING:
    from checkpoint.resources.files.dumping import FilesDump
    from checkpoint.resources.files.kind import Seen
    from checkpoint.resources.files.opening import Opening
    from images import files_pb2

_TTY, _CONSOLE, _PTMX = os.makedev(5, 0), os.makedev(5, 1), os.makedev(5, 2)
_TTY_MAJORS = frozenset({4, 204, 229, *range(136, 144)})
_TCGETS2_BYTES = 44
_TCGETS2 = 0x802C542A


class TerminalKind(kind.Kind):
    field = "terminal"

    def claims(self, seen: Seen) -> bool:
        if not stat.S_ISCHR(seen.stat.st_mode) or seen.path_only:
            return False
        rdev = seen.stat.st_rdev
        return rdev in {_TTY, _CONSOLE, _PTMX} or os.major(rdev) in _TTY_MAJORS

    def refusal(self, seen: Seen) -> Finding | None:
        if seen.stat.st_rdev == _PTMX or seen.link.endswith(b"/ptmx"):
            return Finding(
                seen.pid,
                seen.where,
                "is the master side of a pseudo terminal, which cannot be dumped yet (it comes next)",
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
        if terminal.rdev != seen.stat.st_rdev:
            terminal.identity.path = _path_of(terminal.rdev) or seen.path

    def check(self, opening: Opening, description: files_pb2.Description) -> None:
        terminal = description.terminal
        if _exists(terminal.identity.path, terminal.rdev) or opening.terminal == "null":
            return
        raise RestoreConflictError(
            "the terminal that the job was on is gone",
            where=paths.shown(terminal.identity.path),
            hint="roll back with --terminal null to give the job /dev/null instead",
        )

    def open(self, opening: Opening, description: files_pb2.Description) -> int:
        terminal = description.terminal
        self.check(opening, description)
        if _exists(terminal.identity.path, terminal.rdev):
            return paths.open_identity(terminal.identity, description.flags, same_inode=False)
        opening.warn(
            f"the terminal {paths.shown(terminal.identity.path)} is gone: the job has /dev/null instead"
        )
        return os.open("/dev/null", (description.flags & (os.O_ACCMODE | os.O_NONBLOCK)) | os.O_CLOEXEC)


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


def _exists(path: bytes, rdev: int) -> bool:
    try:
        now = os.stat(path)
    except OSError:
        return False
    return stat.S_ISCHR(now.st_mode) and now.st_rdev == rdev


KIND = TerminalKind()
