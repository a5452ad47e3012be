"""What there is to know of the stopped threads of one process, read in one go without running anything in them.

Owns the bulk reader (parasite_c/threads.c) and the object that holds what it read; numbers are taken apart only when
they are asked for, which for most of them is after the thaw. The threads must be stopped and traced by the caller's
thread.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from parasite_c._native import ffi, lib

from checkpoint.kernel import proc
from checkpoint.kernel.ptrace import Regs
from snapshotter.base.errors import SnapshotterError, wrap_os_error

_SIZE: int = ffi.sizeof("struct snap_thread")
_REGS_SIZE: int = ffi.sizeof("uint64_t[27]")
_ROOM_EACH, _ROOM_LEAST = 20480, 65536
"""An xstate with AMX has 11 KB, a status some 1.5 KB and more with many groups."""
_ROOM_MOST = 1 << 31
_WHAT = {
    lib.SNAP_T_REGS: "its registers",
    lib.SNAP_T_MASK: "its signal mask",
    lib.SNAP_T_RSEQ: "its rseq registration",
    lib.SNAP_T_SECTION: "its rseq area",
    lib.SNAP_T_XSTATE: "its vector state",
    lib.SNAP_T_STAT: "stat",
    lib.SNAP_T_STATUS: "status",
    lib.SNAP_T_ROBUST: "its robust list",
    lib.SNAP_T_SCHEDULING: "its scheduling",
}


class ThreadFacts:
    """One thread as it stood."""

    def __init__(self, pid: int, raw: Any, room: memoryview, keep: object) -> None:
        self.pid = pid
        self.tid = int(raw.tid)
        self.raw = raw
        """A struct snap_thread: plain numbers under their names."""
        self._room = room
        self._keep = keep

    @property
    def suspect(self) -> bool:
        """It may stand in what a snap that was killed left behind; parasite.stranded knows."""
        return bool(self.raw.suspect)

    @property
    def regs(self) -> Regs:
        """A copy of its registers."""
        return Regs.from_bytes(bytes(ffi.buffer(self.raw.regs)))

    @property
    def own_files(self) -> bool:
        """It has a descriptor table of its own, not its process's (unshare(CLONE_FILES))."""
        return bool(self.raw.own & lib.SNAP_OWN_FILES)

    @property
    def own_fs(self) -> bool:
        """The same of its working directory, root and umask (unshare(CLONE_FS))."""
        return bool(self.raw.own & lib.SNAP_OWN_FS)

    @property
    def sigmask(self) -> int:
        return int(self.raw.sigmask)

    @property
    def xstate(self) -> memoryview:
        """NT_X86_XSTATE, as the kernel gives it."""
        return self._piece("xstate")

    @property
    def xstate_at(self) -> int:
        """Where that is in the room that the threads read together share."""
        return int(self.raw.xstate_at)

    @property
    def room(self) -> memoryview:
        """What is not of fixed size, of all the threads that were read together."""
        return self._room

    @cached_property
    def status_text(self) -> bytes:
        """/proc/PID/task/TID/status."""
        return bytes(self._piece("status"))

    @cached_property
    def status(self) -> proc.Status:
        """The same, parsed (80 microseconds)."""
        return proc.parse_status(self.status_text)

    @cached_property
    def stat_text(self) -> bytes:
        """/proc/PID/task/TID/stat."""
        return bytes(self._piece("stat"))

    @cached_property
    def stat(self) -> proc.Stat:
        """The same, parsed."""
        return proc.parse_stat(self.stat_text)

    @property
    def start_time_ticks(self) -> int:
        return int(self.stat_text.rpartition(b")")[2].split()[19])

    @property
    def comm(self) -> bytes:
        """Its name; unlike in status nothing in it is escaped."""
        return self.stat_text.partition(b" (")[2].rpartition(b")")[0]

    @property
    def scheduling(self) -> bytes:
        """A struct sched_attr with utilization clamps, which are 0 where the kernel has none."""
        return bytes(ffi.buffer(self.raw.scheduling))

    @property
    def affinity(self) -> bytes:
        """A bit for each CPU, the lowest first."""
        return bytes(self._piece("affinity"))

    def line(self, name: bytes) -> bytes:
        """What stands in a line of status, which is not parsed for it; empty where there is no such line."""
        text = self.status_text
        at = text.find(b"\n" + name + b":")
        if at < 0:
            return b""
        at += len(name) + 2
        return text[at : text.index(b"\n", at)].strip()

    def word(self, name: bytes, base: int = 10) -> int:
        """The number that stands there, or 0."""
        return int(self.line(name) or b"0", base)

    def _piece(self, name: str) -> memoryview:
        at = getattr(self.raw, name + "_at")
        return self._room[at : at + getattr(self.raw, name + "_length")]


def read(
    pid: int, tids: Sequence[int], mem_fd: int, *, code_magic: bytes, frame_magic: bytes, second: int
) -> list[ThreadFacts]:
    """Read them, in that order.

    Args:
        pid: their process.
        tids: the threads.
        mem_fd: /proc/PID/mem.
        code_magic: 16 bytes by which the page of the parasite's code is known.
        frame_magic: the same of its frames.
        second: offset of the second frame from there.

    Raises:
        TargetGoneError: one of them has ended.
        SnapshotterError: something cannot be read.
    """
    size = max(_ROOM_LEAST, _ROOM_EACH * len(tids))
    while True:
        table = ffi.new("struct snap_thread[]", len(tids))
        for at, tid in enumerate(tids):
            table[at].tid = tid
        room = ffi.new("char[]", size)
        worst = lib.snap_read_threads(
            pid, mem_fd, table, len(tids), room, size, code_magic, frame_magic, second
        )
        if worst != errno.ENOSPC or size >= _ROOM_MOST:
            break
        size *= 2
    if worst:
        _fail(next(one for one in table if one.error))
    view = memoryview(ffi.buffer(room))
    return [ThreadFacts(pid, table[at], view, (table, room)) for at in range(len(tids))]


def _fail(one: Any) -> None:
    where = f"task {one.tid}"
    code = errno.ESRCH if one.error == errno.ENOENT else int(one.error)
    if not code:
        raise SnapshotterError("cannot be read", where=where)
    raise wrap_os_error(
        OSError(code, os.strerror(code)), f"cannot read {_WHAT.get(one.failed, 'it')}", where=where
    )


def same(kind: int, tids: Sequence[int]) -> dict[int, int]:
    """Which tasks share an object of that kind (sys.KCMP_*): tid -> the first of the list that has the same one.

    Zombies are the caller's to leave out: they have none and are equal in that. The tasks may be running.
    """
    first = ffi.new("uint32_t[]", len(tids))
    lib.snap_share(kind, ffi.new("int32_t[]", list(tids)), len(tids), first, ffi.new("uint32_t[]", len(tids)))
    return {tid: tids[at] for tid, at in zip(tids, first, strict=True)}


def read_files(paths: Sequence[str]) -> list[bytes | None]:
    """Small files of /proc, each whole; None: it could not be opened or read (mostly: the task is gone)."""
    if not paths:
        return []
    packed = b"".join(os.fsencode(path) + b"\0" for path in paths)
    lengths = ffi.new("uint32_t[]", len(paths))
    size = 65536 + 64 * len(paths)
    while True:
        room = ffi.new("char[]", size)
        if lib.snap_read_files(packed, room, size, lengths, len(paths)) >= 0:
            break
        size *= 4
    found: list[bytes | None] = []
    at = 0
    for length in lengths:
        if length == 0xFFFFFFFF:
            found.append(None)
            continue
        found.append(bytes(ffi.buffer(room + at, length)))
        at += length
    return found
