"""Transfers that were in flight when a tracker was armed: waited for, so that no page changes behind the page tables.

A direct read (O_DIRECT), process_vm_writev(2) and some ioctls look the pages up once and write into them later: the device, or the
kernel, holds the pages and asks no page table again. A write into a page that was looked up before the tracker was armed is reported by
no tracker. One that is looked up afterwards is: the look-up itself counts as a write (get_user_pages with FOLL_WRITE on a
write-protected page).

So between arming and reading each task of the job has to be seen, once, outside of every system call that was under way when the
tracker was armed (`settle`). They need not stand still together. Whoever sleeps where no such pages can be held is only looked at;
the others are stopped, each for itself and for some microseconds. A transfer in progress is waited for: a task does not stop
before its direct read has ended.

Transfers that no task waits for (io_uring, AIO, registered buffers) are `asynchronous`'s: a process that may have one is read in the
frozen window.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from checkpoint.context import FrozenProcess
from checkpoint.freeze import let_go_whole
from checkpoint.hurry import hurried
from checkpoint.kernel import cut_short, interrupted, proc, ptrace, syscalls, timeouts
from checkpoint.kernel.fdinfo import parse_fdinfo
from checkpoint.kernel.mem import ProcMem
from checkpoint.kernel.tasks import task_ids, tree_of, without_workers
from checkpoint.kernel.threads import read_files
from checkpoint.model.vma import Mapping
from checkpoint.seizure import Seized, Seizure
from checkpoint.uninterrupted import stops_wait
from snapshotter.base import faults
from snapshotter.base.errors import SnapshotterError, TargetGoneError

_PATIENCE_S = 0.25
"""A transfer under way may take so long before its task is told to stop after it."""
_LEAST_PAUSE_S, _MOST_PAUSE_S = 0.0005, 0.01
_NOT_IN_A_CALL = b"-1"
_STOPPED = b"TtZXx"
_HOLD_NOTHING = frozenset(
    str(syscalls.number(name)).encode()
    for name in (
        "futex", "futex_wait", "futex_waitv", "nanosleep", "clock_nanosleep", "restart_syscall", "pause", "rt_sigsuspend",
        "rt_sigtimedwait", "poll", "ppoll", "select", "pselect6", "epoll_wait", "epoll_pwait", "epoll_pwait2", "wait4", "waitid",
        "fork", "vfork", "clone", "clone3", "accept", "accept4", "connect", "write", "pwrite64", "writev", "pwritev", "sendto",
        "sendmsg", "sendmmsg", "flock", "fsync", "fdatasync", "semop", "semtimedop", "msgrcv",
    )
)  # fmt: skip
"""Whoever sleeps in one of these holds no page that is still to be written into. (A direct write only reads its pages.) By the numbers
of 64-bit calls; none of them is a call of that kind by the 32-bit table, which int 0x80 leads to."""
_HOLD_NOTHING_AT = frozenset(
    (
        b"anon_pipe_read", b"fifo_pipe_read", b"pipe_read", b"unix_stream_read_generic", b"unix_stream_data_wait",
        b"__skb_wait_for_more_packets", b"wait_woken",
    )
)  # fmt: skip
"""Places in the kernel (/proc/PID/wchan) where a read or receive waits for data that it will copy: a pipe, a socket, a terminal."""
_FUSE_ANSWER = b"request_wait_answer"
"""A file server is asked. To interrupt it would send the server a request to give up (FUSE_INTERRUPT)."""


@dataclass(frozen=True, slots=True)
class _Seen:
    """A task that may be in a transfer, at the first look at it."""

    pid: int
    call: bytes
    nr_reads: bytes
    """How many reads it had finished, as /proc/PID/io counts them."""
    patient: bool
    """It waits for a device or a server, and stops by itself when that has answered."""


def settle(root_pid: int, timeout_s: float, warn: Callable[[str], None]) -> bool:
    """Wait until no task of the job is in a system call that was under way when this was called.

    Args:
        root_pid: the root of the job, whose trackers are armed.
        timeout_s: how long at most.
        warn: told of each call that a stop has ended with a short count for good.

    Returns:
        False: some task still may be. Nothing that was armed may be relied upon.
    """
    deadline = time.monotonic() + timeout_s
    waiting = _doubtful(
        without_workers((pid, tid) for pid, tids in tree_of(root_pid).items() for tid in tids)
    )
    restless = [tid for tid, seen in waiting.items() if not seen.patient]
    if not _pass_through({tid: waiting.pop(tid) for tid in restless}, deadline, warn):
        return False
    patience = min(time.monotonic() + _PATIENCE_S, deadline)
    pause = _LEAST_PAUSE_S
    while waiting and time.monotonic() < patience:
        time.sleep(pause)
        pause = min(pause * 2, _MOST_PAUSE_S)
        again = _doubtful([(seen.pid, tid) for tid, seen in waiting.items()])
        waiting = {tid: seen for tid, seen in waiting.items() if _is_same_call(seen, again.get(tid))}
    return _pass_through(waiting, deadline, warn)


def _is_same_call(before: _Seen, now: _Seen | None) -> bool:
    """Whether a task may still be in the call in which it was first seen."""
    return (
        now is not None
        and (now.call == before.call or now.call.startswith(b"running"))
        and (now.nr_reads == before.nr_reads)
    )


def _doubtful(tasks: Iterable[tuple[int, int]]) -> dict[int, _Seen]:
    """Those of (pid, tid) that may hold pages into which a transfer is still to write."""
    given = list(tasks)
    files = [f"/proc/{pid}/task/{tid}/{name}" for pid, tid in given for name in ("stat", "syscall")]
    texts = read_files(files)
    open_: list[tuple[int, int, bytes, bytes]] = []
    for (pid, tid), stat, call in zip(given, texts[::2], texts[1::2], strict=True):
        if stat is None:
            continue  # it has ended, which no task does in the middle of a transfer
        state = stat.rpartition(b")")[2].split()[0]
        line = call or b"running"
        if state not in _STOPPED and line.split()[0] not in _HOLD_NOTHING | {_NOT_IN_A_CALL}:
            open_.append((pid, tid, state, line))
    places = read_files([f"/proc/{pid}/task/{tid}/wchan" for pid, tid, _, _ in open_])
    counts = read_files([f"/proc/{pid}/task/{tid}/io" for pid, tid, _, _ in open_])
    return {
        tid: _Seen(pid, call, _nr_reads(count), state == b"D" or place == _FUSE_ANSWER)
        for (pid, tid, state, call), place, count in zip(open_, places, counts, strict=True)
        if place not in _HOLD_NOTHING_AT
    }


def _nr_reads(io: bytes | None) -> bytes:
    """The line that counts system calls that read; it is counted when they end (fs/read_write.c)."""
    return (io or b"").partition(b"syscr:")[2].partition(b"\n")[0]


def _pass_through(waiting: dict[int, _Seen], deadline: float, warn: Callable[[str], None]) -> bool:
    """Stop each of these tasks once and let it go at once. False: not all of them stopped in time.

    A stop ends calls as a freeze does, and is to be noticed by the job as little.

    Raises:
        SnapshotterError: one that was told to stop does not: it waits for something that does not come.
    """
    if not waiting:
        return True
    seized = Seizure()
    cut: dict[int, list[Seized]] = {}

    def let_go_cut(pid: int) -> None:
        for text in let_go_whole(pid, cut.pop(pid), _PATIENCE_S):
            warn(text)

    def stopped(tid: int) -> None:
        if tid not in seized:
            return
        faults.point("transfers.stopped")
        task = seized.tasks[tid]
        if not task.stop_signal and _mend(task, warn):
            cut.setdefault(task.pid, []).append(task)
        else:
            seized.detach(tid)
        seized.forget(tid)
        # Not before: who is seized here cannot be seized there.
        if task.pid in cut and all(other.pid != task.pid for other in seized.tasks.values()):
            let_go_cut(task.pid)

    with stops_wait(), hurried():
        try:
            seized.stop(
                [tid for tid, seen in waiting.items() if seized.seize(seen.pid, tid)], deadline, stopped
            )
        except TargetGoneError:
            return False
        except SnapshotterError:
            seized.let_go(killed=False)
            if seized.stuck:
                raise
            return False
        finally:
            try:
                seized.let_go(killed=False)
            finally:
                for pid in list(cut):
                    let_go_cut(pid)
    return True


def _mend(task: Seized, warn: Callable[[str], None]) -> bool:
    """Have the call that a stop has interrupted go on when the task is let go. True: it was cut short, which takes more than that."""
    with contextlib.suppress(TargetGoneError):
        regs = ptrace.getregs(task.tid)
        if cut_short.may_be_cut(regs):
            with ProcMem(task.pid) as mem:
                return cut_short.rest_of(regs, task.tid, mem) is not None
        if told := cut_short.clear_error(regs, task.tid):
            warn(told)
        if interrupted.restart_instead(regs):
            with ProcMem(task.pid) as mem:
                timeouts.keep_deadline(regs, task.tid, mem)
            ptrace.setregs(task.tid, regs)
    return False


def asynchronous(pid: int, mappings: Iterable[Mapping]) -> bool:
    """Whether a process may have pages that somebody writes into without a task of the job in a system call.

    Buffers registered with a device or a ring of io_uring (VmPin in /proc/PID/status), contexts of AIO, a ring of io_uring with
    something under way, and threads of the kernel inside the process. Asked after the tracker was armed: what is seen no more by then has
    ended before a page is read.
    """
    try:
        if proc.read_status(pid).fields.get("VmPin", "0 kB").split()[0] != "0":
            return True
    except (OSError, SnapshotterError):
        return True
    tasks = [(pid, tid) for tid in task_ids(pid)]
    if len(without_workers(tasks)) != len(tasks):
        return True
    if _nr_aio() and any(b"/[aio]" in line for line in _maps(pid)):
        return True
    return has_ring(mappings) and _ring_at_work(pid)


def has_ring(mappings: Iterable[Mapping]) -> bool:
    """Whether a ring of io_uring is mapped: the resource of such rings (files/uring.py) judges it, all others are refused."""
    return any(one.path == b"anon_inode:[io_uring]" for one in mappings)


def held(process: FrozenProcess) -> bool:
    """The same question of a process that stands still: whether somebody may write into its pages from now on."""
    return process.status.fields.get("VmPin", "0 kB").split()[0] != "0" or process.status.threads > len(
        process.threads
    )


def _nr_aio() -> int:
    """Events of all AIO contexts of this machine: 0 where there are none."""
    with contextlib.suppress(OSError, ValueError), open("/proc/sys/fs/aio-nr", "rb", buffering=0) as file:
        return int(file.read(64))
    return 1


def _maps(pid: int) -> list[bytes]:
    with contextlib.suppress(OSError), open(f"/proc/{pid}/maps", "rb") as file:
        return file.read().splitlines()
    return []


def _ring_at_work(pid: int) -> bool:
    """Whether one of its rings has taken requests that it has not answered, or cannot be looked at."""
    for name in _names(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/{pid}/fd/{name}") != "anon_inode:[io_uring]":
                continue
            with open(f"/proc/{pid}/fdinfo/{name}", "rb", buffering=0) as file:
                shown = parse_fdinfo(file.read()).extra
            if "CachedSqHead" not in shown or shown["CachedSqHead"] != shown.get("CachedCqTail"):
                return True
    return False


def _names(path: str) -> list[str]:
    try:
        return os.listdir(path)
    except OSError:
        return []
