"""/proc of a task: parsers of bytes to frozen dataclasses, and thin readers pid -> dataclass.

Every parser takes the file's bytes, so a captured file is its test; every reader opens, parses and turns a
vanished task into TargetGoneError. Formats: Documentation/filesystems/proc.rst and proc(5). fdinfo has its own
module (fdinfo.py), so have VMAs for the memory engine (checkpoint.model.vma).
"""

from __future__ import annotations

import errno
import functools
import os
import re
from dataclasses import dataclass

from checkpoint.kernel.syscalls import NUMBERS
from snapshotter.base.errors import wrap_os_error


def read_file(path: str, *, where: str = "") -> bytes:
    """The whole file; TargetGoneError when the task is gone (ESRCH, or its directory has vanished)."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            parts = []
            while piece := os.read(fd, 1 << 16):
                parts.append(piece)
            return b"".join(parts)
        finally:
            os.close(fd)
    except (FileNotFoundError, ProcessLookupError) as error:
        gone = ProcessLookupError(errno.ESRCH, "ESRCH")
        raise wrap_os_error(gone, f"cannot read {path}", where=where) from error
    except OSError as error:
        raise wrap_os_error(error, f"cannot read {path}", where=where) from error


def read_task_file(pid: int, name: str, tid: int = 0) -> bytes:
    """/proc/PID/NAME, or /proc/PID/task/TID/NAME."""
    path = f"/proc/{pid}/task/{tid}/{name}" if tid else f"/proc/{pid}/{name}"
    return read_file(path, where=f"task {tid or pid}")


# -- stat ----------------------------------------------------------------------------------------------------------

NAMESPACES = (
    "cgroup",
    "ipc",
    "mnt",
    "net",
    "pid",
    "pid_for_children",
    "time",
    "time_for_children",
    "user",
    "uts",
)
"""Names in /proc/PID/ns."""


@dataclass(frozen=True, slots=True)
class Stat:
    """/proc/PID/stat, the fields that matter here, in the kernel's order."""

    pid: int
    comm: bytes
    state: str
    ppid: int
    pgrp: int
    session: int
    tty_nr: int
    tpgid: int
    flags: int
    utime_ticks: int
    stime_ticks: int
    priority: int
    nice: int
    num_threads: int
    start_time_ticks: int
    vsize_bytes: int
    rss_pages: int
    start_code: int
    end_code: int
    start_stack: int
    exit_signal: int
    processor: int
    rt_priority: int
    policy: int
    start_data: int
    end_data: int
    start_brk: int
    arg_start: int
    arg_end: int
    env_start: int
    env_end: int
    exit_code: int

    @property
    def is_zombie(self) -> bool:
        return self.state in {"Z", "X"}


def parse_stat(data: bytes) -> Stat:
    """`comm` may hold anything, closing brackets and spaces too: it ends at the last one."""
    head, _, tail = data.rpartition(b")")
    pid, _, comm = head.partition(b" (")
    f = tail.split()

    def word(number: int) -> int:
        return int(f[number - 3]) if number - 3 < len(f) else 0

    return Stat(
        pid=int(pid), comm=comm, state=f[0].decode(), ppid=word(4), pgrp=word(5), session=word(6), tty_nr=word(7),
        tpgid=word(8), flags=word(9), utime_ticks=word(14), stime_ticks=word(15), priority=word(18), nice=word(19),
        num_threads=word(20), start_time_ticks=word(22), vsize_bytes=word(23), rss_pages=word(24),
        start_code=word(26), end_code=word(27), start_stack=word(28), exit_signal=word(38), processor=word(39),
        rt_priority=word(40), policy=word(41), start_data=word(45), end_data=word(46), start_brk=word(47),
        arg_start=word(48), arg_end=word(49), env_start=word(50), env_end=word(51), exit_code=word(52),
    )  # fmt: skip


def read_stat(pid: int, tid: int = 0) -> Stat:
    return parse_stat(read_task_file(pid, "stat", tid))


# -- status --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Status:
    """/proc/PID/status. `fields` has every line; the rest are those with a type."""

    name: str
    state: str
    umask: int
    tgid: int
    pid: int
    ppid: int
    tracer_pid: int
    uids: tuple[int, int, int, int]
    """real, effective, saved, file system."""
    gids: tuple[int, int, int, int]
    groups: tuple[int, ...]
    ns_pids: tuple[int, ...]
    """Outermost namespace that this /proc shows first."""
    ns_pgids: tuple[int, ...]
    ns_sids: tuple[int, ...]
    threads: int
    sig_pending: int
    shared_pending: int
    sig_blocked: int
    sig_ignored: int
    sig_caught: int
    cap_inheritable: int
    cap_permitted: int
    cap_effective: int
    cap_bounding: int
    cap_ambient: int
    no_new_privs: bool
    seccomp: int
    """0 none, 1 strict, 2 filter."""
    seccomp_filters: int
    thp_enabled: bool
    core_dumping: bool
    shadow_stack: bool
    """User shadow stacks (CET) are on for it."""
    fields: dict[str, str]


def _numbers(text: str, base: int = 10) -> tuple[int, ...]:
    return tuple(int(word, base) for word in text.split())


def _four(text: str) -> tuple[int, int, int, int]:
    a, b, c, d = _numbers(text)
    return a, b, c, d


def parse_status(data: bytes) -> Status:
    fields: dict[str, str] = {}
    for line in data.decode(errors="surrogateescape").splitlines():
        key, colon, value = line.partition(":")
        if colon:
            fields.setdefault(key, value.strip())

    def number(key: str, base: int = 10) -> int:
        text = fields.get(key, "")
        return int(text.split()[0], base) if text else 0

    return Status(
        name=fields.get("Name", ""),
        state=fields.get("State", "?")[:1],
        umask=number("Umask", 8),
        tgid=number("Tgid"),
        pid=number("Pid"),
        ppid=number("PPid"),
        tracer_pid=number("TracerPid"),
        uids=_four(fields.get("Uid", "0 0 0 0")),
        gids=_four(fields.get("Gid", "0 0 0 0")),
        groups=_numbers(fields.get("Groups", "")),
        ns_pids=_numbers(fields.get("NSpid", "")),
        ns_pgids=_numbers(fields.get("NSpgid", "")),
        ns_sids=_numbers(fields.get("NSsid", "")),
        threads=number("Threads"),
        sig_pending=number("SigPnd", 16),
        shared_pending=number("ShdPnd", 16),
        sig_blocked=number("SigBlk", 16),
        sig_ignored=number("SigIgn", 16),
        sig_caught=number("SigCgt", 16),
        cap_inheritable=number("CapInh", 16),
        cap_permitted=number("CapPrm", 16),
        cap_effective=number("CapEff", 16),
        cap_bounding=number("CapBnd", 16),
        cap_ambient=number("CapAmb", 16),
        no_new_privs=bool(number("NoNewPrivs")),
        seccomp=number("Seccomp"),
        seccomp_filters=number("Seccomp_filters"),
        thp_enabled=fields.get("THP_enabled", "1") == "1",
        core_dumping=bool(number("CoreDumping")),
        shadow_stack="shstk" in fields.get("x86_Thread_features", "").split(),
        fields=fields,
    )


def read_status(pid: int, tid: int = 0) -> Status:
    return parse_status(read_task_file(pid, "status", tid))


# -- maps, smaps -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class MapsEntry:
    """One line of maps."""

    start: int
    end: int
    perms: str
    offset: int
    major: int
    minor: int
    inode: int
    path: str
    """As shown, "" for anonymous memory; octal escapes (newline) are undone, " (deleted)" is left."""

    @property
    def size_bytes(self) -> int:
        return self.end - self.start

    @property
    def readable(self) -> bool:
        return self.perms[0] == "r"

    @property
    def writable(self) -> bool:
        return self.perms[1] == "w"

    @property
    def executable(self) -> bool:
        return self.perms[2] == "x"

    @property
    def shared(self) -> bool:
        return self.perms[3] == "s"

    @property
    def is_anonymous(self) -> bool:
        """No file behind it (heap, stack, named and unnamed anonymous memory)."""
        return self.inode == 0 and not self.path.startswith("/") and not self.path.startswith("[v")


_MAPS_LINE = re.compile(
    rb"([0-9a-f]+)-([0-9a-f]+) ([rwxps-]{4}) ([0-9a-f]+) ([0-9a-f]+):([0-9a-f]+) (\d+) *(.*)", re.DOTALL
)
_ESCAPE = re.compile(rb"\\([0-7]{3})")


def unescape(text: bytes) -> bytes:
    r"""Undo the octal escapes of /proc (\012, \040, \134)."""
    return _ESCAPE.sub(lambda match: bytes([int(match[1], 8) & 0xFF]), text) if b"\\" in text else text


@functools.lru_cache(maxsize=1 << 16)
def _maps_entry(line: bytes) -> MapsEntry:
    # Remembered: what a look read before the freeze reads mostly the same in it, and some jobs have tens of thousands of lines.
    match = _MAPS_LINE.fullmatch(line)
    if match is None:
        raise ValueError(f"not a line of /proc/PID/maps: {line!r}")
    start, end, perms, offset, major, minor, inode, path = match.groups()
    # maps escapes the newline only; a backslash may be the path's own
    name = path.replace(rb"\012", b"\n").decode(errors="surrogateescape")
    return MapsEntry(
        int(start, 16),
        int(end, 16),
        perms.decode(),
        int(offset, 16),
        int(major, 16),
        int(minor, 16),
        int(inode),
        name,
    )


def parse_maps(data: bytes) -> list[MapsEntry]:
    return [_maps_entry(line) for line in data.split(b"\n") if line]


def read_maps(pid: int) -> list[MapsEntry]:
    return parse_maps(read_task_file(pid, "maps"))


@dataclass(frozen=True, slots=True)
class TimerEntry:
    """One POSIX timer of /proc/PID/timers."""

    id: int
    signo: int
    sigval: int
    notify: str
    """signal, none or thread."""
    notify_kind: str
    """pid or tid."""
    notify_id: int
    clock_id: int


def parse_timers(data: bytes) -> list[TimerEntry]:
    found: list[TimerEntry] = []
    fields: dict[str, str] = {}

    def finish() -> None:
        if "ID" not in fields:
            return
        signo, _, sigval = fields["signal"].partition("/")
        notify, _, target = fields["notify"].partition("/")
        kind, _, number = target.partition(".")
        found.append(
            TimerEntry(
                int(fields["ID"]),
                int(signo),
                int(sigval, 16),
                notify,
                kind,
                int(number),
                int(fields["ClockID"]),
            )
        )

    for line in data.decode().splitlines():
        key, _, value = line.partition(":")
        if key == "ID":
            finish()
            fields = {}
        fields[key] = value.strip()
    finish()
    return found


def read_timers(pid: int) -> list[TimerEntry]:
    return parse_timers(read_task_file(pid, "timers"))


def threads(pid: int) -> list[int]:
    """The tids of a process, ascending (the leader's is the pid). TargetGoneError when it is gone."""
    try:
        return sorted(int(name) for name in os.listdir(f"/proc/{pid}/task"))
    except OSError as error:
        gone = ProcessLookupError(errno.ESRCH, "ESRCH")
        raise wrap_os_error(gone, "cannot list its threads", where=f"task {pid}") from error


def wchan(pid: int, tid: int = 0) -> str:
    return read_task_file(pid, "wchan", tid).decode(errors="replace")


def waits_for_vfork(pid: int, tid: int) -> bool:
    """Whether a task sleeps in the kernel until its vfork child has called execve or ended.

    Source: wait_for_vfork_done() in the kernel's fork.c, an uninterruptible sleep; syscall in proc_pid_syscall(5).
    """
    if read_stat(pid, tid).state != "D":
        return False
    number = read_task_file(pid, "syscall", tid).split()[:1]
    return number in ([b"%d" % NUMBERS[name]] for name in ("vfork", "clone", "clone3"))


def comm(pid: int, tid: int = 0) -> bytes:
    return read_task_file(pid, "comm", tid).removesuffix(b"\n")


def boot_id() -> str:
    """Differs after every boot."""
    return read_file("/proc/sys/kernel/random/boot_id").decode().strip()


def id_maps() -> str:
    """How the ids of our user namespace are mapped: uid_map and gid_map (user_namespaces(7)), one line each."""
    maps = (read_file(f"/proc/self/{name}").split() for name in ("uid_map", "gid_map"))
    return "\n".join(b" ".join(words).decode() for words in maps)


def available_bytes() -> int:
    """MemAvailable of /proc/meminfo."""
    for line in read_file("/proc/meminfo").splitlines():
        if line.startswith(b"MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 1 << 30
