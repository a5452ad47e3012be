"""System calls for ourselves that Python's standard library does not have. Errors are OSError with the errno.

Those that concern another task take its tid; nothing here stops or changes a task except process_madvise.
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import struct
from collections.abc import Iterable

from parasite_c._native import ffi, lib

from checkpoint.kernel import syscalls

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long

KCMP_FILE, KCMP_VM, KCMP_FILES, KCMP_FS, KCMP_SIGHAND, KCMP_IO, KCMP_SYSVSEM, KCMP_EPOLL_TFD = range(8)

PIDFD_THREAD = os.O_EXCL
"""Of pidfd_open(2), Linux 6.9: for a thread that is no process."""

PM_SCAN_WP_MATCHING, PM_SCAN_CHECK_WPASYNC = 1, 2
PAGE_IS_WPALLOWED, PAGE_IS_WRITTEN, PAGE_IS_FILE, PAGE_IS_PRESENT = 1, 2, 4, 8
PAGE_IS_SWAPPED, PAGE_IS_PFNZERO, PAGE_IS_HUGE, PAGE_IS_SOFT_DIRTY, PAGE_IS_GUARD = 16, 32, 64, 128, 256

Region = tuple[int, int, int]
"""(start, end, categories) of PAGEMAP_SCAN, addresses."""


def syscall(name: str, *args: int | bytes | ctypes.Array[ctypes.c_char] | None) -> int:
    """Any system call by name. bytes are passed by address (read only)."""
    converted = [ctypes.c_long(arg) if isinstance(arg, int) else arg for arg in args]
    result = int(_libc.syscall(ctypes.c_long(syscalls.number(name)), *converted))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")
    return result


def socket_option(fd: int, level: int, name: int) -> bytes:
    """A socket's option of any length (Python's getsockopt stops at 1024 bytes); b"" where it has none (ENODATA)."""
    size = 256
    while True:
        value, length = (
            ctypes.create_string_buffer(size),
            ctypes.create_string_buffer(struct.pack("=I", size), 4),
        )
        try:
            syscall("getsockopt", fd, level, name, value, length)
        except OSError as error:
            if error.errno == errno.ENODATA:
                return b""
            if error.errno != errno.ERANGE:
                raise
            size = struct.unpack("=I", length.raw)[0]
            continue
        return value.raw[: struct.unpack("=I", length.raw)[0]]


_DESCRIPTORS = 1 << 20


def allow_descriptors() -> None:
    """Raise our own soft limit of descriptors as far as we may: every process of a job takes several of them, and the
    usual limit of a shell is 1024.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def kcmp(pid1: int, pid2: int, kind: int, idx1: int = 0, idx2: int = 0) -> int:
    """0 equal, 1 less, 2 greater, 3 different without an order (kcmp(2))."""
    found = int(lib.snap_kcmp(pid1, pid2, kind, idx1, idx2))
    if found < 0:
        raise OSError(-found, f"kcmp: {os.strerror(-found)}")
    return found


def pidfd_open(pid: int, flags: int = 0) -> int:
    return syscall("pidfd_open", pid, flags)


def pidfd_getfd(pidfd: int, target_fd: int) -> int:
    """A descriptor of ours for the same file description; close-on-exec."""
    return syscall("pidfd_getfd", pidfd, target_fd, 0)


def pidfd_send_signal(pidfd: int, sig: int) -> None:
    syscall("pidfd_send_signal", pidfd, sig, 0, 0)


def userfaultfd(flags: int) -> int:
    """A new userfaultfd for our own memory."""
    return syscall("userfaultfd", flags)


CLONE_ARGS = struct.Struct("<11Q")
"""struct clone_args (88 bytes): flags, pidfd, child_tid, parent_tid, exit_signal, stack, stack_size, tls, set_tid,
set_tid_size, cgroup."""


def clone_args(
    *, flags: int = 0, pidfd: int = 0, child_tid: int = 0, parent_tid: int = 0, exit_signal: int = 0, stack: int = 0,
    stack_size: int = 0, tls: int = 0, set_tid: int = 0, set_tid_size: int = 0, cgroup: int = 0,
) -> bytes:  # fmt: skip
    """The bytes of a struct clone_args."""
    return CLONE_ARGS.pack(
        flags,
        pidfd,
        child_tid,
        parent_tid,
        exit_signal,
        stack,
        stack_size,
        tls,
        set_tid,
        set_tid_size,
        cgroup,
    )


def clone3(args: bytes) -> int:
    """Run clone3(2) in ourselves: 0 in the child. Without CLONE_VM only (Python goes on in the child)."""
    return syscall("clone3", args, len(args))


def get_robust_list(tid: int) -> tuple[int, int]:
    """(head, length)."""
    head, size = ctypes.create_string_buffer(8), ctypes.create_string_buffer(8)
    syscall("get_robust_list", tid, head, size)
    return int.from_bytes(head.raw, "little"), int.from_bytes(size.raw, "little")


def sched_getattr(tid: int) -> dict[str, int]:
    """Struct sched_attr of a task by field name (sizes that the kernel knows)."""
    names = (
        "size",
        "policy",
        "flags",
        "nice",
        "priority",
        "runtime",
        "deadline",
        "period",
        "util_min",
        "util_max",
    )
    buffer = ctypes.create_string_buffer(56)
    syscall("sched_getattr", tid, buffer, 56, 0)
    return dict(zip(names, struct.unpack("<IIQiIQQQII", buffer.raw), strict=True))


def process_madvise(pidfd: int, ranges: Iterable[tuple[int, int]], advice: int) -> int:
    """Madvise of (address, length) ranges of another process; returns bytes advised."""
    packed = b"".join(struct.pack("<QQ", start, size) for start, size in ranges)
    return syscall("process_madvise", pidfd, packed, len(packed) // 16, advice, 0)


def pagemap_scan(
    fd: int, start: int, end: int, flags: int = 0, *, mask: int = 0, anyof: int = 0, inverted: int = 0,
    return_mask: int = 0, max_regions: int = 65536,
) -> list[Region]:  # fmt: skip
    """All matching regions of [start, end) of the address space behind `fd` (/proc/PID/pagemap). OSError ENOTTY where
    the kernel has no PAGEMAP_SCAN.
    """
    found: list[Region] = []
    at = ffi.new("uint64_t *", start)
    out = ffi.new("struct snap_region[]", max_regions)
    while at[0] < end:
        before = at[0]
        got = lib.snap_pagemap_scan(fd, at, end, flags, inverted, mask, anyof, return_mask, out, max_regions)
        if got < 0:
            raise OSError(-got, f"PAGEMAP_SCAN: {os.strerror(-got)}")
        words = memoryview(ffi.buffer(out, got * 24)).cast("Q").tolist()
        found += zip(words[0::3], words[1::3], words[2::3], strict=True)
        if at[0] == before:
            break
    return found
