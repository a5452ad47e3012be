"""The system calls that file descriptors need and Python's os module lacks.

Owns thin wrappers only: each makes one call and raises OSError with the kernel's errno. What the calls are used for is in
checkpoint/resources/files.
"""

from __future__ import annotations

import array
import ctypes
import errno
import fcntl
import os
import struct
import termios
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from parasite_c._native import ffi, lib

from checkpoint.kernel.sys import KCMP_EPOLL_TFD, kcmp, syscall

_libc = ctypes.CDLL(None, use_errno=True)

CLONE_FS, CLONE_FILES = 0x200, 0x400
SPLICE_F_NONBLOCK = 2
F_SETPIPE_SZ = 1031
F_GETPIPE_SZ = 1032
F_SETSIG = 10
F_GETSIG = 11
F_SETOWN_EX = 15
F_GETOWN_EX = 16
_F_GETOWNER_UIDS = 17
F_GETLEASE = 1025
F_GET_SEALS = 1034
F_OFD_SETLK = 37
TFD_TIMER_ABSTIME = 1
TFD_IOC_SET_TICKS = 0x40085400
TIOCGDEV = 0x80045432
AT_FDCWD = -100
RESOLVE_NO_SYMLINKS = 4

_NS_PER_S = 1_000_000_000
_CLOEXEC = 1
"""FSOPEN_CLOEXEC and FSMOUNT_CLOEXEC."""
_FSCONFIG_CMD_CREATE = 6
_AT_SYMLINK_FOLLOW, _AT_EMPTY_PATH = 0x400, 0x1000
_HANDLE_MAX_BYTES = 128

_Result = TypeVar("_Result")


def is_epoll_target(pid: int, fd: int, epoll_pid: int, epoll_fd: int, target_fd: int, nth: int) -> bool:
    """Whether (pid, fd) is the file that `epoll_fd` watches under the number `target_fd` (the nth with it)."""
    slot = ffi.new("uint32_t[3]", (epoll_fd, target_fd, nth))
    return kcmp(pid, epoll_pid, KCMP_EPOLL_TFD, fd, int(ffi.cast("uintptr_t", slot))) == 0


@dataclass(frozen=True, slots=True)
class Shown:
    """What /proc shows of one descriptor."""

    fd: int
    link: bytes
    stat: os.stat_result | None
    """None: it was not to be asked for."""
    info: bytes
    """fdinfo."""


_ROOM_EACH, _ROOM_LEAST = 256, 1 << 16


def shown(pid: int, numbers: Sequence[int], apart: Sequence[bytes] = ()) -> list[Shown | None]:
    """Those descriptors of a task; None: it is closed.

    Args:
        pid: the task.
        numbers: which ones.
        apart: directories. No call is made about a file that lies below one of them.

    Raises:
        OSError: one of them, or all, cannot be looked at.
    """
    size = max(_ROOM_LEAST, _ROOM_EACH * len(numbers))
    paths = [ffi.new("char[]", path) for path in apart]
    ends_with_null = ffi.new("char *[]", [*paths, ffi.NULL])
    while True:
        table, room = ffi.new("struct snap_descriptor[]", len(numbers)), ffi.new("char[]", size)
        for at, number in enumerate(numbers):
            table[at].fd = number
        error = lib.snap_see(pid, table, len(numbers), room, size, ends_with_null)
        if error != errno.ENOSPC:
            break
        size *= 4
    if error:
        raise OSError(error, os.strerror(error), f"/proc/{pid}/fd")
    return [_shown(one, ffi.buffer(room)) for one in table]


def _shown(one: Any, room: Any) -> Shown | None:
    if one.error in {errno.ENOENT, errno.ESRCH}:
        return None
    if one.error:
        raise OSError(one.error, os.strerror(one.error), f"descriptor {one.fd}")
    link = room[one.link_at : one.link_at + one.link_length]
    info = room[one.info_at : one.info_at + one.info_length]
    if one.unasked:
        return Shown(one.fd, link, None, info)
    times = (one.atime_ns, one.mtime_ns, one.ctime_ns)
    seconds = [value // _NS_PER_S for value in times]
    # As os.stat() gives it: ten integers, the times as fractions, what else there is in the order of its own fields.
    stat = os.stat_result(
        (one.mode, one.ino, one.dev, one.nlink, one.uid, one.gid, one.size, *seconds),
        {
            "st_atime": times[0] / _NS_PER_S, "st_mtime": times[1] / _NS_PER_S, "st_ctime": times[2] / _NS_PER_S,
            "st_atime_ns": times[0], "st_mtime_ns": times[1], "st_ctime_ns": times[2], "st_rdev": one.rdev,
        },
    )  # fmt: skip
    return Shown(one.fd, link, stat, info)


def open_without_symlinks(path: bytes, flags: int) -> int:
    """openat2(2) with RESOLVE_NO_SYMLINKS: ELOOP when any part of the path is a symbolic link (with O_PATH and
    O_NOFOLLOW the last one may be, and is then what the descriptor stands for).
    """
    how = struct.pack("=QQQ", flags, 0, RESOLVE_NO_SYMLINKS)
    return syscall(
        "openat2",
        AT_FDCWD,
        ctypes.create_string_buffer(path),
        ctypes.create_string_buffer(how, len(how)),
        len(how),
    )


def tee(source: int, target: int, nr_bytes: int) -> int:
    """Copies pipe contents without consuming them, without blocking."""
    return syscall("tee", source, target, nr_bytes, SPLICE_F_NONBLOCK)


def nr_readable(fd: int) -> int:
    """FIONREAD: bytes that can be read now."""
    value = array.array("i", [0])
    fcntl.ioctl(fd, termios.FIONREAD, value, True)
    return value[0]


def timerfd_create(clock_id: int, flags: int) -> int:
    """A new, disarmed timer."""
    return syscall("timerfd_create", clock_id, flags)


def timerfd_settime(fd: int, flags: int, value_ns: int, interval_ns: int) -> None:
    """Arms a timer; a value of 0 disarms it."""
    spec = struct.pack("=qqqq", *divmod(interval_ns, 10**9), *divmod(value_ns, 10**9))
    syscall("timerfd_settime", fd, flags, ctypes.create_string_buffer(spec, 32), None)


def timerfd_gettime(fd: int) -> tuple[int, int]:
    """(value, interval) in ns: what remains until it fires. Counts the expirations of a periodic timer that were due meanwhile."""
    spec = ctypes.create_string_buffer(32)
    syscall("timerfd_gettime", fd, spec)
    interval_s, interval_ns, value_s, value_ns = struct.unpack("=qqqq", spec.raw)
    return value_s * 10**9 + value_ns, interval_s * 10**9 + interval_ns


def timerfd_set_ticks(fd: int, ticks: int) -> None:
    """TFD_IOC_SET_TICKS (CONFIG_CHECKPOINT_RESTORE): expirations that were not read yet."""
    fcntl.ioctl(fd, TFD_IOC_SET_TICKS, struct.pack("=Q", ticks))


def signalfd(mask: int, flags: int) -> int:
    """A new signalfd for the signals of `mask` (bit n-1 for signal n)."""
    return syscall("signalfd4", -1, ctypes.create_string_buffer(struct.pack("=Q", mask), 8), 8, flags)


def epoll_add(epoll_fd: int, fd: int, events: int, data: int) -> None:
    """EPOLL_CTL_ADD with all 64 bits of user data (select.epoll keeps the descriptor number there)."""
    event = struct.pack("=IQ", events, data)  # struct epoll_event is packed on x86-64
    syscall("epoll_ctl", epoll_fd, 1, fd, ctypes.create_string_buffer(event, 12))


def epoll_modify(epoll_fd: int, fd: int, events: int, data: int) -> None:
    """EPOLL_CTL_MOD: arms the entry anew, and reports it if it is ready now."""
    event = struct.pack("=IQ", events, data)
    syscall("epoll_ctl", epoll_fd, 3, fd, ctypes.create_string_buffer(event, 12))


def inotify_init(flags: int) -> int:
    """A new inotify instance."""
    return syscall("inotify_init1", flags)


def inotify_add_watch(fd: int, path: bytes, mask: int) -> int:
    """The number of the watch, which counts up by one from 1."""
    return syscall("inotify_add_watch", fd, ctypes.create_string_buffer(path), mask)


def inotify_rm_watch(fd: int, wd: int) -> None:
    """Ends a watch; queues IN_IGNORED."""
    syscall("inotify_rm_watch", fd, wd)


def open_by_handle(mount_fd: int, handle_type: int, handle: bytes, flags: int) -> int:
    """open_by_handle_at(2): a file of the file system of `mount_fd` by its handle (CAP_DAC_READ_SEARCH)."""
    packed = struct.pack("=Ii", len(handle), handle_type) + handle
    return syscall("open_by_handle_at", mount_fd, ctypes.create_string_buffer(packed, len(packed)), flags)


def file_handle(path: bytes) -> tuple[int, bytes]:
    """name_to_handle_at(2): (type, handle) of what a path leads to, the last link followed."""
    buffer = ctypes.create_string_buffer(struct.pack("=Ii", _HANDLE_MAX_BYTES, 0), 8 + _HANDLE_MAX_BYTES)
    mount = ctypes.create_string_buffer(8)
    syscall(
        "name_to_handle_at", AT_FDCWD, ctypes.create_string_buffer(path), buffer, mount, _AT_SYMLINK_FOLLOW
    )
    length, handle_type = struct.unpack_from("=Ii", buffer.raw)
    return handle_type, buffer.raw[8 : 8 + length]


def change_owner(fd: int, uid: int, gid: int) -> None:
    """fchownat(2) of what a descriptor stands for; it may be one of O_PATH, of a symbolic link too."""
    syscall("fchownat", fd, ctypes.create_string_buffer(b""), uid, gid, _AT_EMPTY_PATH)


def get_owner(fd: int) -> tuple[int, int]:
    """F_GETOWN_EX: (type: 0 thread, 1 process, 2 group; pid), pid 0 when there is none."""
    kind, pid = struct.unpack("=ii", fcntl.fcntl(fd, F_GETOWN_EX, bytes(8)))
    return kind, pid


def owner_ids(fd: int) -> tuple[int, int]:
    """F_GETOWNER_UIDS: real and effective user of whoever set the owner, whose rights decide about the signal."""
    uid, euid = struct.unpack("=II", fcntl.fcntl(fd, _F_GETOWNER_UIDS, bytes(8)))
    return uid, euid


def set_owner(fd: int, kind: int, pid: int, uid: int, euid: int) -> None:
    """F_SETOWN_EX, see get_owner, as that real and effective user: the kernel judges each later signal by their rights.

    Raises:
        OSError: the owner is gone, or we may not take on those ids.
    """

    def work() -> None:
        # Of this thread alone, which ends: the bare system call.
        syscall("setresuid", uid, euid, -1)
        fcntl.fcntl(fd, F_SETOWN_EX, struct.pack("=ii", kind, pid))

    if (uid, euid) == (os.getuid(), os.geteuid()):
        fcntl.fcntl(fd, F_SETOWN_EX, struct.pack("=ii", kind, pid))
    else:
        _in_thread(work)


def terminal_device(fd: int) -> int:
    """TIOCGDEV: the terminal behind a descriptor (for /dev/tty: the controlling one), as an st_rdev."""
    return device_number(struct.unpack("=I", fcntl.ioctl(fd, TIOCGDEV, bytes(4)))[0])


def device_number(raw: int) -> int:
    """The kernel's 32-bit device number (TIOCGDEV, tty_nr of /proc/PID/stat) as an st_rdev."""
    return os.makedev((raw >> 8) & 0xFFF, (raw & 0xFF) | ((raw >> 12) & 0xFFF00))


def filesystem_type(path: str | bytes) -> int:
    """statfs(2)'s f_type, the magic number of a file system."""
    buffer = ctypes.create_string_buffer(256)
    if _libc.statfs(os.fsencode(path), buffer) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return int(struct.unpack_from("=q", buffer.raw)[0])


def detached_tmpfs() -> int:
    """The root directory of a new file system in memory that is mounted nowhere (fsopen(2), fsmount(2); CAP_SYS_ADMIN). It
    lives as long as this descriptor, or anything that was opened or bound in it.
    """
    context = syscall("fsopen", ctypes.create_string_buffer(b"tmpfs"), _CLOEXEC)
    try:
        syscall("fsconfig", context, _FSCONFIG_CMD_CREATE, None, None, 0)
        return syscall("fsmount", context, _CLOEXEC, 0)
    finally:
        os.close(context)


def with_root(directory: int, work: Callable[[], _Result], *, chroot: bool = True) -> _Result:
    """Runs `work` in a thread whose root and working directory are `directory`: every path leads below it. Its umask is 0.
    Without `chroot` only the working directory is.
    """

    def body() -> _Result:
        if _libc.unshare(CLONE_FS) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        os.fchdir(directory)
        if chroot:
            os.chroot(".")
        os.umask(0)
        return work()

    return _in_thread(body)


def with_private_table(work: Callable[[], _Result]) -> _Result:
    """Runs `work` in a thread that has its own copy of this process's descriptor table.

    It may put any description under any number without disturbing the rest of the program; the copy is
    closed when it returns.
    """

    def body() -> _Result:
        if _libc.unshare(CLONE_FILES) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        return work()

    return _in_thread(body)


def _in_thread(work: Callable[[], _Result]) -> _Result:
    """In a thread of its own, which ends with it and takes along what was changed for it alone."""
    results: list[_Result] = []
    errors: list[BaseException] = []

    def body() -> None:
        try:
            results.append(work())
        except BaseException as error:  # handed to the caller's thread
            errors.append(error)

    thread = threading.Thread(target=body, name="snap-apart")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]
