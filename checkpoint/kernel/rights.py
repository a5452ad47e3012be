"""Acting in file systems with the rights of somebody else, in threads of snap's own.

Only the ids for files (setfsuid(2), setfsgid(2)), the groups and the effective capabilities of one thread are changed, by raw
system calls: libc's wrappers would change all threads. Its real, effective and saved user stay root's, so that nobody else can
signal or trace it meanwhile. A change of fsuid from 0 takes the capabilities over files out of the effective set by itself
(capabilities(7)); here that set is then made exactly what is wanted, never more than snap has.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import queue
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Self, TypeVar

from checkpoint.kernel import proc
from checkpoint.kernel.sys import syscall
from checkpoint.model.holders import Rights

_CLONE_FS = 0x200
_HEADER = struct.pack("<Ii", 0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, the calling thread
_SETS = struct.Struct("<IIIIII")
_CAP_DAC_OVERRIDE = 1 << 1
_AT_EACCESS, _AT_EMPTY_PATH = 0x200, 0x1000
_KEEP = 0xFFFFFFFF
_Result = TypeVar("_Result")
_Work = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Identity:
    """Who one appears to be to others: effective user, group, and groups. All capabilities stay."""

    uid: int
    gid: int
    groups: tuple[int, ...] = ()


def own() -> Rights:
    """What snap itself has."""
    status = proc.read_status(os.getpid())
    return Rights(status.uids[3], status.gids[3], tuple(sorted(status.groups)), status.cap_effective)


def may_access(fd: int, mode: int) -> bool:
    """Whether the calling thread may use a file so (os.R_OK, W_OK, X_OK), by what a descriptor (O_PATH will do) stands for.

    faccessat2(2) with the ids that count when it is opened; no side effect, whatever the file is.
    """
    try:
        syscall("faccessat2", fd, b"\0", mode, _AT_EMPTY_PATH | _AT_EACCESS)
    except OSError as error:
        if error.errno in {errno.EACCES, errno.EPERM, errno.EROFS}:
            return False
        raise
    return True


@dataclass(slots=True, eq=False)
class _Worker:
    """One thread that acts with given rights until it is told to end."""

    rights: Rights | Identity
    jobs: queue.SimpleQueue[_Work | None] = field(default_factory=queue.SimpleQueue)
    answers: queue.SimpleQueue[tuple[object, BaseException | None]] = field(default_factory=queue.SimpleQueue)
    thread: threading.Thread | None = None

    def start(self) -> None:
        self.thread = threading.Thread(target=self._run, name="snap-acting", daemon=True)
        self.thread.start()
        _, error = self.answers.get()
        if error is not None:
            self.thread.join()
            raise error

    def _run(self) -> None:
        try:
            if isinstance(self.rights, Identity):
                appear_as(self.rights)
            else:
                take_on(self.rights)
        except BaseException as error:  # handed to the caller's thread
            self.answers.put((None, error))
            return
        self.answers.put((None, None))
        while (work := self.jobs.get()) is not None:
            try:
                self.answers.put((work(), None))
            except BaseException as error:
                self.answers.put((None, error))

    def stop(self) -> None:
        self.jobs.put(None)
        if self.thread is not None:
            self.thread.join()


class Acting:
    """Runs work with the rights of tasks of a job. One thread for each different rights, made when it is first needed.

    The threads stay until `close`, or until the end of a `with`.
    """

    def __init__(self) -> None:
        self.own = own()
        self._workers: dict[Rights | Identity, _Worker] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def is_all_powerful(self, rights: Rights) -> bool:
        """Whether they are at least snap's own: then nothing can be open to snap and closed to them."""
        if rights.uid != self.own.uid or self.own.capabilities & ~rights.capabilities:
            return False
        # Groups do not matter to one who is asked for no permission at all.
        return bool(rights.capabilities & _CAP_DAC_OVERRIDE) or (rights.gid, rights.groups) == (
            self.own.gid,
            self.own.groups,
        )

    def start(self, rights: Rights | Identity) -> None:
        """Make the thread for these rights, if there is none yet.

        Raises:
            PermissionError: snap may not take on those ids.
        """
        if rights not in self._workers:
            worker = _Worker(rights)
            worker.start()
            self._workers[rights] = worker

    def run(self, rights: Rights | Identity, work: Callable[[], _Result]) -> _Result:
        """Do something with these rights. Its umask is 0, its working directory its own.

        Raises:
            PermissionError: snap may not take on those ids; or what `work` raises.
        """
        self.start(rights)
        worker = self._workers[rights]
        worker.jobs.put(work)
        result, error = worker.answers.get()
        if error is not None:
            raise error
        return result  # type: ignore[return-value]  # what `work` gave

    def close(self) -> None:
        """End the threads. They are made again when they are needed."""
        while self._workers:
            self._workers.popitem()[1].stop()


def take_on(rights: Rights) -> None:
    """Give the calling thread these rights, for good.

    Raises:
        PermissionError: it may not have them.
    """
    if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_FS) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    os.umask(0)  # of this thread alone now
    groups = struct.pack(f"<{len(rights.groups)}I", *rights.groups)
    with contextlib.suppress(PermissionError):  # judged below
        syscall("setgroups", len(rights.groups), groups or None)
    syscall("setfsgid", rights.gid)
    syscall("setfsuid", rights.uid)
    permitted = proc.read_status(os.getpid()).cap_permitted
    wanted = rights.capabilities & permitted
    low, high = wanted & 0xFFFFFFFF, wanted >> 32
    syscall("capset", _HEADER, _SETS.pack(low, low, 0, high, high, 0))
    # Neither setfsuid nor setfsgid tells whether it worked, but both return the id that was.
    now = tuple(syscall(name, -1) for name in ("setfsuid", "setfsgid"))
    has = tuple(sorted(os.getgroups()))
    if now != (rights.uid, rights.gid) or not set(has) <= {*rights.groups, rights.gid}:
        raise PermissionError(errno.EPERM, f"cannot act as {rights}")


def appear_as(identity: Identity) -> None:
    """Give the calling thread this effective user, group and groups, for good. Its real and saved user stay, and its capabilities.

    Raises:
        PermissionError: it may not have them.
    """
    status = proc.read_status(os.getpid())
    groups = struct.pack(f"<{len(identity.groups)}I", *identity.groups)
    if tuple(sorted(status.groups)) != identity.groups:
        syscall("setgroups", len(identity.groups), groups or None)
    syscall("setresgid", _KEEP, identity.gid, _KEEP)
    syscall("setresuid", _KEEP, identity.uid, _KEEP)
    syscall("capset", *capability_sets(status))


def capability_sets(status: proc.Status) -> tuple[bytes, bytes]:
    """The arguments of capset(2) that keep all that is permitted, and make it effective."""
    words = (status.cap_permitted, status.cap_permitted, status.cap_inheritable)
    return _HEADER, _SETS.pack(*(one & 0xFFFFFFFF for one in words), *(one >> 32 for one in words))
