"""What the running kernel (and our rights) can do, found out by trying; no version number is looked at.

Each probe is a function that does the thing and raises OSError when it cannot; probe() caches its answer with the
errno. `snap doctor` lists them, tests ask for them by name. Nothing they do stays.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import socket
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from parasite_c._native import ffi

from checkpoint.kernel import sockdiag, sys
from snapshotter.base.errors import UnsupportedError


@dataclass(frozen=True, slots=True)
class Feature:
    """One answer. errno 0 when ok, or when the operation succeeded without effect."""

    name: str
    ok: bool
    errno: int
    note: str


class _NoEffectError(Exception):
    """The call succeeded and did nothing."""


_PR_SET_MM, _PR_SET_MM_MAP_SIZE = 35, 15
_PR_TIMER_CREATE_RESTORE_IDS, _GET = 77, 2
_ARCH_MAP_VDSO_64 = 0x2003
_UFFDIO_API, _UFFD_API = 0xC018AA3F, 0xAA
_WP_UNPOPULATED, _WP_ASYNC = 1 << 13, 1 << 15
_UFFD_USER_MODE_ONLY = 1
_MADV_GUARD_INSTALL = 102
_LANDLOCK_CREATE_RULESET_VERSION = 1
_TCP_REPAIR = 19
_SOFT_DIRTY = 1 << 55
_PAGE = 4096


def _pages(count: int) -> tuple[mmap.mmap, int]:
    area = mmap.mmap(-1, count * _PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return area, int(ffi.cast("uintptr_t", ffi.from_buffer(area)))


def _soft_dirty() -> None:
    # clear_refs takes the 4 and ignores it where CONFIG_MEM_SOFT_DIRTY is unset: only a round trip tells
    area, addr = _pages(2)
    area[0] = area[_PAGE] = 1
    with open("/proc/self/clear_refs", "wb", buffering=0) as clear:
        clear.write(b"4")
    area[0] = 2
    with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
        first, second = struct.unpack("<2Q", os.pread(pagemap.fileno(), 16, addr // _PAGE * 8))
    if not first & _SOFT_DIRTY or second & _SOFT_DIRTY:
        raise _NoEffectError("pagemap bit 55 does not follow writes (CONFIG_MEM_SOFT_DIRTY)")


def _wp_async() -> None:
    # As the tracker makes it; without the flag it is root's, unless vm.unprivileged_userfaultfd is set.
    fd = sys.userfaultfd(os.O_CLOEXEC | os.O_NONBLOCK | _UFFD_USER_MODE_ONLY)
    try:
        fcntl.ioctl(fd, _UFFDIO_API, bytearray(struct.pack("<3Q", _UFFD_API, _WP_ASYNC | _WP_UNPOPULATED, 0)))
    finally:
        os.close(fd)


def _pagemap_scan() -> None:
    area, addr = _pages(2)
    area[0] = 1
    with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
        found = sys.pagemap_scan(
            pagemap.fileno(),
            addr,
            addr + 2 * _PAGE,
            mask=sys.PAGE_IS_PRESENT,
            return_mask=sys.PAGE_IS_PRESENT,
        )
    if [(start, end) for start, end, _ in found] != [(addr, addr + _PAGE)]:
        raise _NoEffectError(f"one page was written, the scan says {found}")


def _clone3_set_tid() -> None:
    # A pid that is free: that of a child that just ended
    first = os.fork()
    if first == 0:
        os._exit(0)
    os.waitpid(first, 0)
    wanted = ffi.new("int[1]", [first])
    args = sys.clone_args(exit_signal=17, set_tid=int(ffi.cast("uintptr_t", wanted)), set_tid_size=1)
    try:
        child = sys.clone3(args)
    except OSError as error:
        if error.errno == errno.EEXIST:
            return  # somebody took it meanwhile: the kernel understood us
        raise
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    if child != first:
        raise _NoEffectError(f"asked for pid {first}, got {child}")


def _unix_diag() -> None:
    sockdiag.unix_sockets()


def _kcmp() -> None:
    sys.kcmp(os.getpid(), os.getpid(), sys.KCMP_VM)


def _pidfd_getfd() -> None:
    pidfd = sys.pidfd_open(os.getpid())
    try:
        os.close(sys.pidfd_getfd(pidfd, pidfd))
    finally:
        os.close(pidfd)


def _pidfd_thread() -> None:
    os.close(sys.pidfd_open(os.getpid(), sys.PIDFD_THREAD))


def _udp_diag() -> None:
    sockdiag.udp_shutdowns(socket.AF_INET)


def _map_files() -> None:
    folder = "/proc/self/map_files"
    name = os.listdir(folder)[0]
    os.close(os.open(f"{folder}/{name}", os.O_RDONLY | os.O_CLOEXEC))


def _tcp_repair() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, _TCP_REPAIR, 1)


def _timer_restore_ids() -> None:
    sys.syscall("prctl", _PR_TIMER_CREATE_RESTORE_IDS, _GET, 0, 0, 0)


def _map_vdso() -> None:
    try:
        sys.syscall("arch_prctl", _ARCH_MAP_VDSO_64, 1 << 40)
    except OSError as error:
        if error.errno != errno.EEXIST:  # we have one: the answer of a kernel that can
            raise


def _set_mm_map() -> None:
    size = ctypes.create_string_buffer(4)
    sys.syscall("prctl", _PR_SET_MM, _PR_SET_MM_MAP_SIZE, size, 0, 0)


def _guard_pages() -> None:
    area, addr = _pages(2)
    sys.syscall("madvise", addr, _PAGE, _MADV_GUARD_INSTALL)
    area.close()


def _io_uring() -> None:
    params = ctypes.create_string_buffer(120)
    os.close(sys.syscall("io_uring_setup", 1, params))


def _pidfd_send_signal() -> None:
    pidfd = sys.pidfd_open(os.getpid())
    try:
        sys.pidfd_send_signal(pidfd, 0)
    finally:
        os.close(pidfd)


def _process_madvise() -> None:
    area, addr = _pages(1)
    area[0] = 1
    pidfd = sys.pidfd_open(os.getpid())
    try:
        sys.process_madvise(pidfd, [(addr, _PAGE)], 20)  # MADV_COLD
    finally:
        os.close(pidfd)


def _landlock() -> None:
    sys.syscall("landlock_create_ruleset", None, 0, _LANDLOCK_CREATE_RULESET_VERSION)


def _children_list() -> None:
    with open(f"/proc/self/task/{os.getpid()}/children", "rb") as file:
        file.read()


def _rseq_configuration() -> None:
    from checkpoint.kernel import ptrace

    with _traced_child() as tid:
        ptrace.get_rseq(tid)


def _suspend_seccomp() -> None:
    from checkpoint.kernel import ptrace

    with _traced_child() as tid:
        ptrace.setoptions(tid, ptrace.O_SUSPEND_SECCOMP)


@contextlib.contextmanager
def _traced_child() -> Iterator[int]:
    """A child of ours, seized and stopped. Errors of ours become the OSErrors they were."""
    from checkpoint.kernel import ptrace
    from snapshotter.base.errors import SnapshotterError

    child = os.fork()
    if child == 0:
        while True:
            sys.syscall("pause")
    try:
        ptrace.seize(child)
        ptrace.interrupt(child)
        ptrace.wait(child)
        yield child
    except SnapshotterError as error:
        cause = error.__cause__
        code = getattr(cause, "errno", None) or errno.EINVAL
        raise OSError(code, os.strerror(code)) from error
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)


PROBES: dict[str, tuple[Callable[[], None], str]] = {
    "soft_dirty": (_soft_dirty, "written pages by clear_refs and pagemap"),
    "wp_async": (_wp_async, "written pages by userfaultfd write-protection"),
    "pagemap_scan": (_pagemap_scan, "finding pages without reading every pagemap entry"),
    "clone3_set_tid": (_clone3_set_tid, "restoring under the same pids"),
    "unix_diag": (_unix_diag, "jobs with unix sockets"),
    "kcmp": (_kcmp, "finding what tasks share"),
    "pidfd_getfd": (_pidfd_getfd, "fetching and handing over descriptors"),
    "pidfd_thread": (_pidfd_thread, "threads that have a descriptor table of their own"),
    "udp_diag": (_udp_diag, "UDP sockets that were shut down for writing"),
    "pidfd_send_signal": (_pidfd_send_signal, "signals that cannot hit a reused pid"),
    "map_files": (_map_files, "reading mapped files that were deleted"),
    "children": (_children_list, "finding the tasks of a job"),
    "tcp_repair": (_tcp_repair, "TCP repair mode (snap refuses jobs with established connections)"),
    "timer_restore_ids": (_timer_restore_ids, "restoring POSIX timers with their ids directly"),
    "map_vdso": (_map_vdso, "the vdso at its old address"),
    "set_mm_map": (_set_mm_map, "/proc/PID/exe, cmdline and auxv of a restored process"),
    "guard_pages": (_guard_pages, "MADV_GUARD_INSTALL"),
    "process_madvise": (_process_madvise, "advice for other processes' memory"),
    "io_uring": (_io_uring, "tests of io_uring being refused"),
    "rseq_configuration": (_rseq_configuration, "restartable sequences"),
    "landlock": (_landlock, "programs that confine themselves: found out by a take, and refused"),
    "suspend_seccomp": (_suspend_seccomp, "suspending a seccomp filter (snap refuses jobs that have one)"),
}
"""name -> (probe, what it is good for)."""

_answers: dict[str, Feature] = {}


def probe(name: str) -> Feature:
    """The answer for one feature; tried once per process. KeyError for an unknown name."""
    known = _answers.get(name)
    if known is not None:
        return known
    attempt, use = PROBES[name]
    try:
        attempt()
        answer = Feature(name, True, 0, use)
    except OSError as error:
        code = error.errno or 0
        answer = Feature(name, False, code, f"{errno.errorcode.get(code, '?')}: {os.strerror(code)} ({use})")
    except (_NoEffectError, UnsupportedError) as error:
        answer = Feature(name, False, 0, str(error))
    _answers[name] = answer
    return answer


def probe_all() -> list[Feature]:
    """Every feature, in the order of PROBES."""
    return [probe(name) for name in PROBES]
