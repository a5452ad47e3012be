"""Makes every file description of the job again, once, in snap.

Owns the run and its passes: open (objects, contents of pipes), flags, fill (queues, interest lists),
settle (shutdown, locks), and the descriptors in between. They reach the job through install.py. All of
them are close-on-exec here, and all of them are closed by close().
"""

from __future__ import annotations

import fcntl
import functools
import os
from typing import TYPE_CHECKING

from checkpoint.kernel import descriptors as sys
from checkpoint.kernel import sockdiag
from checkpoint.kernel.fdinfo import O_DIRECT, O_PATH
from checkpoint.resources import authority, locks
from checkpoint.resources.authority import Found
from checkpoint.resources.files import epoll, kinds, unixsock
from checkpoint.resources.locks import flock_struct
from images import common_pb2, files_pb2
from snapshotter.base.errors import RestoreConflictError, SnapshotterError, wrap_os_error

if TYPE_CHECKING:
    from checkpoint.restore_context import RestoreContext

_SETTABLE = os.O_APPEND | os.O_NONBLOCK | O_DIRECT | os.O_NOATIME
"""What F_SETFL changes; O_ASYNC waits for the owner (late)."""


class Opening:
    """The descriptions of one restore."""

    def __init__(self, ctx: RestoreContext, image: files_pb2.Files) -> None:
        self.ctx = ctx
        self.image = image
        self.descriptions = {description.id: description for description in image.descriptions}
        self.fds: dict[int, int] = {}
        """description id -> descriptor in snap."""
        self.pipes = {buffer.id: buffer for buffer in image.pipes}
        self.pipe_ends: dict[int, tuple[int, int]] = {}
        self.pipe_ends_used: set[tuple[int, bool]] = set()
        self.judged: dict[int, Found] = {}
        """description id -> the file that check() found and allowed: that very one is opened, whatever is at its path by then."""
        self.fifos: dict[int, Found] = {}
        """pipe id -> the FIFO that check() found."""
        self.early: dict[int, int] = {}
        """description id -> what check() opened already, because it may be gone once the old job is killed."""
        self.far_ends: dict[int, int] = {}
        """description id -> the end of its connection that the job no longer has."""
        sockets = [d for d in image.descriptions if d.HasField("unix")]
        self.unix_by_ino = {d.unix.ino: d for d in sockets}
        self.unix_listeners = {
            (d.unix.address, d.unix.node_ino): d for d in sockets if d.unix.state == sockdiag.STATE_LISTEN
        }
        self.hidden: dict[int, int] = {}
        """unix.ino -> root of the file system of its own in which a socket is bound (unixghost.py)."""
        self.changed: set[int] = set()
        """Descriptions whose file is not as it was at the point, which was said already."""
        self.nodes: dict[int, int] = {}
        """unix.ino -> its node, held (O_PATH) since it was bound."""
        self.owned: set[int] = set()
        """Descriptions whose owner (SIGIO) was set already."""

    @property
    def terminal(self) -> str:
        """options.terminal: what to do when a terminal is gone."""
        policy: str = self.ctx.options.terminal
        return policy

    @functools.cached_property
    def unix_now(self) -> dict[int, sockdiag.UnixSocketInfo]:
        """The unix sockets that there are before the restore."""
        return sockdiag.unix_sockets()

    @property
    def highest_local(self) -> int:
        return max([*self.fds.values(), *self.far_ends.values(), 2])

    def warn(self, text: str) -> None:
        self.ctx.warn(text)

    def check(self) -> None:
        """Can everything be opened? Touches nothing. Raises with all conflicts in one error."""
        conflicts: list[RestoreConflictError] = []
        for description in self.image.descriptions:
            try:
                kinds.BY_FIELD[_field(description)].check(self, description)
            except RestoreConflictError as error:
                conflicts.append(error)
        try:
            locks.check(self.ctx, self.image)
        except RestoreConflictError as error:
            conflicts.append(error)
        if conflicts:
            self.close()
        if len(conflicts) == 1:
            raise conflicts[0]
        if conflicts:
            hints = dict.fromkeys(error.hint for error in conflicts if error.hint)
            raise RestoreConflictError(
                "; ".join(dict.fromkeys(f"{error.where}: {error.what}" for error in conflicts)),
                hint="; ".join(hints),
            )

    def open_all(self) -> None:
        """Opens everything; closes it all again if anything fails."""
        try:
            for number in self.descriptions:
                self.open(number)
            for number, description in self.descriptions.items():
                _set_flags(description, self.fds[number])
            for number, description in self.descriptions.items():
                kinds.BY_FIELD[_field(description)].fill(self, description, self.fds[number])
            for number, description in self.descriptions.items():
                if description.HasField("unix"):
                    unixsock.KIND.settle(self, description, self.fds[number])
                for lock in description.locks:
                    if lock.kind == "OFDLCK":
                        _lock(description, lock, self.fds[number])
            self._close_extra()
            for number, description in self.descriptions.items():
                if description.HasField("epoll"):
                    epoll.KIND.quieten(self, description, self.fds[number])
        except BaseException:
            self.close()
            raise

    def open(self, number: int) -> int:
        """The descriptor in snap of a description, made at the first call."""
        fd = self.fds.get(number)
        if fd is None:
            description = self.descriptions.get(number)
            if description is None:
                raise SnapshotterError(f"file description {number} is not in the image", where="files")
            try:
                fd = kinds.BY_FIELD[_field(description)].open(self, description)
            except OSError as error:
                raise wrap_os_error(
                    error, f"cannot make file description {number} ({_field(description)}) again"
                ) from error
            self.fds[number] = fd
        return fd

    def judge(
        self, description: files_pb2.Description, identity: common_pb2.FileIdentity, access: int | None = None
    ) -> None:
        """Find a file by its path, for all who get this description, and hold it until `found`.

        Raises:
            RestoreConflictError: it is gone, another one, or closed to one of them.
        """
        if access is None:
            access = authority.access_of(description.flags)
        who = self.ctx.holders.of_description(description.id)
        self.keep(description, authority.locate(self.ctx, identity, who, access))

    def keep(self, description: files_pb2.Description, found: Found) -> None:
        """Hold what was judged for a description."""
        if description.id in self.judged:
            self.judged[description.id].close()
        self.judged[description.id] = found

    def open_judged(self, description: files_pb2.Description, where: str) -> int:
        """A new file description of what `judge` holds."""
        return authority.open_found(self.ctx, self.judged[description.id], description.flags, where)

    def hold_node(self, ino: int, fd: int) -> None:
        """Keep the node of a bound socket until everything is connected; takes the descriptor over."""
        if ino in self.nodes:
            os.close(self.nodes[ino])
        self.nodes[ino] = fd

    def _close_extra(self) -> None:
        for ends in self.pipe_ends.values():
            for fd in ends:
                os.close(fd)
        self.pipe_ends.clear()
        for fd in self.far_ends.values():
            os.close(fd)
        self.far_ends.clear()
        for fd in self.hidden.values():
            os.close(fd)
        self.hidden.clear()
        for fd in self.nodes.values():
            os.close(fd)
        self.nodes.clear()

    def close(self) -> None:
        """Closes what is open here. Descriptions live on where they were installed."""
        self._close_extra()
        for found in [*self.judged.values(), *self.fifos.values()]:
            found.close()
        self.judged.clear()
        self.fifos.clear()
        for fd in [*self.fds.values(), *self.early.values()]:
            os.close(fd)
        self.fds.clear()
        self.early.clear()


def _field(description: files_pb2.Description) -> str:
    field: str | None = description.WhichOneof("kind")
    if field not in kinds.BY_FIELD:
        raise SnapshotterError(
            f"file description {description.id} is of a kind that this version does not know",
            hint="use the snap version that took the point",
        )
    return field


def _set_flags(description: files_pb2.Description, fd: int) -> None:
    if description.flags & O_PATH:
        return
    now = fcntl.fcntl(fd, fcntl.F_GETFL)
    if (now ^ description.flags) & _SETTABLE:
        try:
            fcntl.fcntl(fd, fcntl.F_SETFL, (now & ~_SETTABLE) | (description.flags & _SETTABLE))
        except OSError as error:
            raise wrap_os_error(error, f"cannot set the flags {description.flags:#o} again") from error


def _lock(description: files_pb2.Description, lock: files_pb2.FileLock, fd: int) -> None:
    """Locks that belong to a description, without a process: whoever holds it holds them."""
    try:
        fcntl.fcntl(fd, sys.F_OFD_SETLK, flock_struct(lock))
    except OSError as error:
        raise RestoreConflictError(
            "another process has locked this file meanwhile",
            where=os.fsdecode(description.regular.identity.path),
            hint="end that process",
        ) from error
