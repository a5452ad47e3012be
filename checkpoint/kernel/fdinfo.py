"""Parses /proc/PID/fdinfo/N: the state the kernel shows of one open file description.

Owns the text format only (proc(5), and fs/proc/fd.c with each file type's show_fdinfo): bytes in, frozen
dataclasses out. Lines that are not known are kept by name in `extra`, so that a caller can see that a
descriptor has more state than it understands.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field

O_PATH = 0o10000000
O_DIRECT = 0o40000
O_LARGEFILE = 0o100000
O_TMPFILE_BIT = 0o20000000


@dataclass(frozen=True, slots=True)
class EpollTarget:
    """One line of an epoll's interest list."""

    fd: int
    events: int
    data: int
    pos: int
    ino: int
    dev: int


@dataclass(frozen=True, slots=True)
class WatchLine:
    """One watch of an inotify instance; `handle` is the file's handle for open_by_handle_at(2)."""

    wd: int
    ino: int
    dev: int
    mask: int
    handle_type: int
    handle: bytes


@dataclass(frozen=True, slots=True)
class LockLine:
    """One "lock:" line: FLOCK, POSIX, OFDLCK or LEASE; bytes [start, end], end None for the end of the file."""

    kind: str
    write: bool
    pid: int
    start: int
    end: int | None
    mandatory: bool
    breaking: bool = False
    """A lease that its owner has been told to give up."""
    place: str = ""
    """The file, as the kernel writes it: major and minor number of its device (hexadecimal), inode."""


@dataclass(frozen=True, slots=True)
class TimerState:
    """A timerfd: `value_ns` is what remains until it fires, 0 when disarmed."""

    clock_id: int
    ticks: int
    settime_flags: int
    value_ns: int
    interval_ns: int


@dataclass(frozen=True, slots=True)
class FdInfo:
    """What one fdinfo file says. `flags` has no O_CLOEXEC: that belongs to the number, not the description."""

    pos: int
    flags: int
    cloexec: bool
    mnt_id: int
    ino: int
    locks: tuple[LockLine, ...] = ()
    eventfd_count: int | None = None
    eventfd_semaphore: bool | None = None
    sigmask: int | None = None
    timer: TimerState | None = None
    epoll: tuple[EpollTarget, ...] = ()
    inotify: tuple[WatchLine, ...] = ()
    pid: int | None = None
    extra: dict[str, str] = field(default_factory=dict)

    @property
    def access(self) -> int:
        """O_RDONLY, O_WRONLY or O_RDWR."""
        return self.flags & os.O_ACCMODE

    @property
    def readable(self) -> bool:
        """Opened for reading."""
        return self.access in {os.O_RDONLY, os.O_RDWR} and not self.flags & O_PATH

    @property
    def writable(self) -> bool:
        """Opened for writing."""
        return self.access in {os.O_WRONLY, os.O_RDWR} and not self.flags & O_PATH


_TFD = re.compile(
    rb"tfd:\s*(\d+)\s+events:\s*([0-9a-f]+)\s+data:\s*([0-9a-f]+)"
    rb"(?:\s+pos:\s*(-?\d+)\s+ino:\s*([0-9a-f]+)\s+sdev:\s*([0-9a-f]+))?"
)
_WATCH = re.compile(
    rb"inotify wd:([0-9a-f]+) ino:([0-9a-f]+) sdev:([0-9a-f]+) mask:([0-9a-f]+) ignored_mask:[0-9a-f]+"
    rb"(?: fhandle-bytes:[0-9a-f]+ fhandle-type:([0-9a-f]+) f_handle:([0-9a-f]+))?"
)
_LOCK = re.compile(
    rb"(?:lock:)?\s*\d+:\s+(?:->\s+)?(\S+)\s+(\S+)\s+(\S+)\s+(-?\d+)\s+([0-9a-f]+:[0-9a-f]+:\d+)\s+(\d+)\s+(\d+|EOF)"
)
_PAIR = re.compile(rb"\(\s*(-?\d+),\s*(-?\d+)\)")


def _kernel_dev_to_stat(sdev: int) -> int:
    """An sdev is the kernel's own dev_t (12 bits of major above 20 of minor); st_dev is makedev's."""
    return os.makedev(sdev >> 20, sdev & 0xFFFFF)


def _nanoseconds(value: bytes) -> int:
    found = _PAIR.search(value)
    return int(found[1]) * 1_000_000_000 + int(found[2]) if found else 0


def _lock_line(found: re.Match[bytes]) -> LockLine:
    kind, mode, access, pid, place, start, end = found.groups()
    return LockLine(
        kind.decode(),
        access == b"WRITE",
        int(pid),
        int(start),
        None if end == b"EOF" else int(end),
        mode == b"MANDATORY",
        kind == b"LEASE" and mode != b"ACTIVE",
        place.decode(),
    )


def parse_locks(data: bytes) -> list[LockLine]:
    """/proc/locks, without those that somebody waits for ("->")."""
    lines = (line for line in data.splitlines() if b" -> " not in line)
    return [_lock_line(found) for line in lines if (found := _LOCK.match(line))]


_PLAIN = re.compile(rb"pos:\t(-?\d+)\nflags:\t0?([0-7]+)\nmnt_id:\t(\d+)\nino:\t(\d+)\n")


def parse_fdinfo(data: bytes) -> FdInfo:
    """Parses one fdinfo file. A line that cannot be understood ends up in `extra`, never lost."""
    if plain_one := _PLAIN.fullmatch(data):  # files, pipes and sockets have no more than that
        pos, octal, mnt_id, ino = plain_one.groups()
        flags = int(octal, 8)
        return FdInfo(int(pos), flags & ~os.O_CLOEXEC, bool(flags & os.O_CLOEXEC), int(mnt_id), int(ino))
    plain: dict[str, bytes] = {}
    locks: list[LockLine] = []
    epoll: list[EpollTarget] = []
    watches: list[WatchLine] = []
    extra: dict[str, str] = {}
    for line in data.splitlines():
        if line.startswith(b"tfd:") and (found := _TFD.match(line)):
            fd, events, token, pos, ino, sdev = found.groups()
            dev = _kernel_dev_to_stat(int(sdev or b"0", 16))
            epoll.append(
                EpollTarget(
                    int(fd), int(events, 16), int(token, 16), int(pos or 0), int(ino or b"0", 16), dev
                )
            )
        elif line.startswith(b"inotify ") and (found := _WATCH.match(line)):
            wd, ino, sdev, mask, handle_type, handle = found.groups()
            watches.append(
                WatchLine(
                    int(wd, 16),
                    int(ino, 16),
                    _kernel_dev_to_stat(int(sdev, 16)),
                    int(mask, 16),
                    int(handle_type or b"0", 16),
                    bytes.fromhex((handle or b"").decode()),
                )
            )
        elif line.startswith(b"lock:") and (found := _LOCK.match(line)):
            locks.append(_lock_line(found))
        else:
            name, _, value = line.partition(b":")
            plain[name.decode("ascii", "replace").strip()] = value.strip()
    flags = int(plain.pop("flags", b"0"), 8)
    timer = None
    if "clockid" in plain:
        timer = TimerState(
            clock_id=int(plain.pop("clockid")),
            ticks=int(plain.pop("ticks", b"0")),
            settime_flags=int(plain.pop("settime flags", b"0"), 8),
            value_ns=_nanoseconds(plain.pop("it_value", b"")),
            interval_ns=_nanoseconds(plain.pop("it_interval", b"")),
        )
    count = plain.pop("eventfd-count", None)
    semaphore = plain.pop("eventfd-semaphore", None)
    sigmask = plain.pop("sigmask", None)
    pid_text = plain.pop("Pid", None)
    pos, mnt_id, ino = (int(plain.pop(name, b"0")) for name in ("pos", "mnt_id", "ino"))
    extra.update({name: value.decode("ascii", "replace") for name, value in plain.items() if name})
    return FdInfo(
        pos=pos,
        flags=flags & ~os.O_CLOEXEC,
        cloexec=bool(flags & os.O_CLOEXEC),
        mnt_id=mnt_id,
        ino=ino,
        locks=tuple(locks),
        eventfd_count=None if count is None else int(count, 16),
        eventfd_semaphore=None if semaphore is None else bool(int(semaphore)),
        sigmask=None if sigmask is None else int(sigmask, 16),
        timer=timer,
        epoll=tuple(epoll),
        inotify=tuple(watches),
        pid=None if pid_text is None else int(pid_text),
        extra=extra,
    )
