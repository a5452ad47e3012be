"""Small policies that a thread keeps with the kernel: where its memory comes from, how it is guarded against speculation, whether
the instruction CPUID faults, whether its time slice may be extended (rseq).

Also the security label of a process (AppArmor, SELinux), which cannot be given back, and the policies of single mappings (mbind),
which are not kept: both are named in warnings. Not to be seen from anywhere, and therefore not kept: Landlock rules.
"""

from __future__ import annotations

import collections
import ctypes
import errno
import functools
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from checkpoint.kernel import syscalls, threads
from checkpoint.resources import prctl
from images import task_pb2

if TYPE_CHECKING:
    from checkpoint.kernel.threads import ThreadFacts
    from checkpoint.parasite import Batch, Buffer, Ref, Results, StubTask

_libc = ctypes.CDLL(None)
_NODES_MOST = 1024
"""MAX_NUMNODES of any configuration; get_mempolicy(2) takes no less."""
_STORE_BYPASS, _INDIRECT_BRANCH, _L1D_FLUSH = 0, 1, 2
_SPEC_PRCTL = 1
_RESCTRL = "/proc/%s/cpu_resctrl_groups"
_ARCH_GET_CPUID, _ARCH_SET_CPUID = 0x1011, 0x1012
_SLICE_EXTENSION_ENABLE = 1
_PF_IO_FLUSHER = 0x00080000 | 0x00100000
"""PF_MEMALLOC_NOIO, PF_LOCAL_THROTTLE in /proc/PID/stat: PR_IO_FLUSHER in kernel/sys.c."""
SPECULATION = {
    b"Speculation_Store_Bypass": {
        b"thread mitigated": prctl.SPEC_DISABLE,
        b"thread force mitigated": prctl.SPEC_FORCE_DISABLE,
    },
    b"SpeculationIndirectBranch": {
        b"conditional disabled": prctl.SPEC_DISABLE,
        b"conditional force disabled": prctl.SPEC_FORCE_DISABLE,
    },
}
"""What stands in /proc/PID/status where a thread has asked for more than its system gives: what to ask for again."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What a thread is asked."""

    mode: Buffer
    nodes: Buffer
    store_bypass: Ref
    l1d_flush: Ref
    cpuid: Ref
    slice_extension: Ref
    io_flusher: Ref
    mce_kill: Ref


def ask(batch: Batch) -> Asked:
    """Add the questions to the batch of a thread."""
    mode, nodes = batch.buffer(4), batch.buffer(_NODES_MOST // 8)
    # ENOSYS: a kernel without NUMA, whose zeros are the default policy.
    batch.call("get_mempolicy", mode, nodes, _NODES_MOST, 0, 0, check=False)
    return Asked(
        mode,
        nodes,
        batch.call("prctl", prctl.GET_SPECULATION_CTRL, _STORE_BYPASS, 0, 0, 0, check=False),
        batch.call("prctl", prctl.GET_SPECULATION_CTRL, _L1D_FLUSH, 0, 0, 0, check=False),
        batch.call("arch_prctl", _ARCH_GET_CPUID, 0, check=False),
        batch.call("prctl", prctl.RSEQ_SLICE_EXTENSION, prctl.RSEQ_SLICE_EXTENSION_GET, 0, 0, 0, check=False),
        batch.call("prctl", prctl.GET_IO_FLUSHER, 0, 0, 0, 0, check=False),
        batch.call("prctl", prctl.MCE_KILL_GET, 0, 0, 0, 0, check=False),
    )


def answer(results: Results, asked: Asked, facts: ThreadFacts, thread: task_pb2.Thread) -> None:
    """Put the answers into the message of the thread."""
    mode, nodes = results.bytes(asked.mode), results.bytes(asked.nodes).rstrip(b"\0")
    if any(mode) or nodes:
        thread.memory_policy = mode + nodes
    thread.store_bypass, thread.indirect_branch = (
        known.get(facts.line(name), 0) for name, known in SPECULATION.items()
    )
    # status has no words for these two.
    if results[asked.store_bypass] == _SPEC_PRCTL | prctl.SPEC_DISABLE_NOEXEC:
        thread.store_bypass = prctl.SPEC_DISABLE_NOEXEC
    thread.l1d_flush = results[asked.l1d_flush] == _SPEC_PRCTL | prctl.SPEC_ENABLE
    thread.cpuid_faults = results[asked.cpuid] == 0
    thread.slice_extension = results[asked.slice_extension] > 0


def answer_flags(
    results: Results, asked: Asked, facts: ThreadFacts, process: task_pb2.Process, thread: task_pb2.Thread
) -> None:
    """Flags that a thread has from who made it: put into the message of the process for the first one, else that of the thread
    where it differs. The first is the first to answer.
    """
    answered = results[asked.mce_kill]
    mce_kill = answered if answered in range(prctl.MCE_KILL_DEFAULT) else prctl.MCE_KILL_DEFAULT
    as_of_process = (mce_kill + 1) % (prctl.MCE_KILL_DEFAULT + 1)
    flusher = results[asked.io_flusher] > 0
    if results[asked.io_flusher] == -errno.EPERM:
        # It has no CAP_SYS_RESOURCE, which it may have given up since.
        flusher = facts.stat.flags & _PF_IO_FLUSHER == _PF_IO_FLUSHER
    if facts.tid == process.pid:
        process.io_flusher, process.mce_kill = flusher, as_of_process
        return
    thread.io_flusher = flusher
    if as_of_process != process.mce_kill:
        thread.mce_kill = mce_kill + 1


def restore(stub: StubTask, thread: task_pb2.Thread, warn: Callable[[str], None]) -> None:
    """By the thread itself; what this machine does not have is a warning."""
    wanted = thread.memory_policy or bytes(4)
    if wanted != _own_memory_policy():
        nodes = wanted[4:].ljust(_NODES_MOST // 8, b"\0")
        batch = stub.batch()
        result = batch.call(
            "set_mempolicy", *struct.unpack_from("<I", wanted), nodes, _NODES_MOST + 1, check=False
        )
        _check(stub.run(batch)[result], thread, "memory policy (set_mempolicy)", warn)
    for which, value in (
        (_STORE_BYPASS, thread.store_bypass),
        (_INDIRECT_BRANCH, thread.indirect_branch),
        (_L1D_FLUSH, prctl.SPEC_ENABLE if thread.l1d_flush else 0),
    ):
        if value:
            batch = stub.batch()
            result = batch.call("prctl", prctl.SET_SPECULATION_CTRL, which, value, 0, 0, check=False)
            _check(
                stub.run(batch)[result], thread, "guard against speculation (PR_SET_SPECULATION_CTRL)", warn
            )
    if thread.cpuid_faults:
        batch = stub.batch()
        result = batch.call("arch_prctl", _ARCH_SET_CPUID, 0, check=False)
        _check(stub.run(batch)[result], thread, "wish that CPUID faults (ARCH_SET_CPUID)", warn)


def restore_late(stub: StubTask, thread: task_pb2.Thread, warn: Callable[[str], None]) -> None:
    """By the thread itself, its rseq area being registered."""
    if thread.slice_extension:
        batch = stub.batch()
        how = (prctl.RSEQ_SLICE_EXTENSION_SET, _SLICE_EXTENSION_ENABLE, 0, 0)
        result = batch.call("prctl", prctl.RSEQ_SLICE_EXTENSION, *how, check=False)
        _check(stub.run(batch)[result], thread, "time slice extension (PR_RSEQ_SLICE_EXTENSION)", warn)


def _check(result: int, thread: task_pb2.Thread, what: str, warn: Callable[[str], None]) -> None:
    if result < 0:
        warn(f"task {thread.tid}: its {what} could not be set again: {os.strerror(-result)}")


@functools.cache
def _own_memory_policy() -> bytes:
    """That of this thread of ours, which the stubs have inherited."""
    mode, nodes = ctypes.create_string_buffer(4), ctypes.create_string_buffer(_NODES_MOST // 8)
    number = ctypes.c_long(syscalls.number("get_mempolicy"))
    _libc.syscall(number, mode, nodes, ctypes.c_long(_NODES_MOST), ctypes.c_long(0), ctypes.c_long(0))
    return mode.raw + nodes.raw.rstrip(b"\0")


def core_cookie(tid: int) -> int:
    """The core scheduling cookie of a task; 0: none, or the kernel has none (CONFIG_SCHED_CORE, no SMT)."""
    cookie = ctypes.c_ulonglong(0)
    failed = _libc.prctl(
        prctl.SCHED_CORE, prctl.SCHED_CORE_GET, tid, prctl.SCHED_CORE_SCOPE_THREAD, ctypes.byref(cookie)
    )
    return 0 if failed else cookie.value


def warn_of_cookies(process: task_pb2.Process, warn: Callable[[str], None]) -> None:
    """Cookies are the kernel's own random numbers: who shares one with whom outside of the job, nothing shows."""
    with_cookie = [thread.tid for thread in process.threads if core_cookie(thread.tid)]
    if with_cookie:
        warn(
            f"task {with_cookie[0]}: core scheduling cookies (PR_SCHED_CORE) of {len(with_cookie)} threads are not kept: "
            "after a rollback they share their cores with anybody"
        )


def security_label(pid: int | str) -> str:
    """What the active security module calls a process; "" where there is none."""
    try:
        with open(f"/proc/{pid}/attr/current", "rb", buffering=0) as file:
            return os.fsdecode(file.read(4096).rstrip(b"\0\n"))
    except OSError:
        return ""


def warn(process: task_pb2.Process, tell: Callable[[str], None]) -> None:
    """Name what a process has of this kind and a point has not. After the thaw."""
    warn_of_cookies(process, tell)
    warn_of_resctrl(process, tell)
    label = security_label(process.pid)
    if label != security_label("self"):
        tell(
            f"task {process.pid}: its security label {label!r} is not kept; a rollback gives it that of snap"
        )
    if label:
        warn_of_labels_to_come(process, tell)


def warn_of_resctrl(process: task_pb2.Process, tell: Callable[[str], None]) -> None:
    """Groups of resctrl(4) (shares of caches and memory bandwidth), to which tasks belong one by one. There is a file for it where the
    kernel has them, empty paths being the root group's.
    """
    own, *others = threads.read_files(
        [_RESCTRL % "self", *(_RESCTRL % f"{process.pid}/task/{thread.tid}" for thread in process.threads)]
    )
    if own is None:
        return
    apart = [
        (thread.tid, text)
        for thread, text in zip(process.threads, others, strict=True)
        if text not in {None, own}
    ]
    if apart:
        tid, text = apart[0]
        where = " ".join(os.fsdecode(text or b"").split())
        tell(
            f"task {tid}: the resctrl groups of {len(apart)} of its threads ({where}) are not kept; a rollback puts them into those of snap"
        )


_TO_COME = {"exec": "what it executes", "fscreate": "files", "keycreate": "keys", "sockcreate": "sockets"}


def warn_of_labels_to_come(process: task_pb2.Process, warn: Callable[[str], None]) -> None:
    """Labels that a thread has chosen for what it makes next (SELinux, AppArmor), which it mostly has only for a moment."""
    asked = [(thread.tid, name) for thread in process.threads for name in _TO_COME]
    paths = [f"/proc/{process.pid}/task/{tid}/attr/{name}" for tid, name in asked]
    for (tid, name), label in zip(asked, threads.read_files(paths), strict=True):
        text = os.fsdecode((label or b"").strip(b"\0\n"))
        if text:
            warn(
                f"task {tid}: the security label {text!r} that it has chosen for {_TO_COME[name]} is not kept"
            )


def mappings_with_a_policy(pid: int) -> int:
    """How many mappings have another memory policy (mbind(2)) than most of the process has; 0 where there is but one node.

    The kernel's default in other words ("local", as OpenBLAS asks for) is none. The file walks all pages, as smaps does: for a job that runs.
    """
    if not _has_many_nodes():
        return 0
    try:
        with open(f"/proc/{pid}/numa_maps", "rb") as file:
            lines = (line.split() for line in file)
            found = collections.Counter(words[1] for words in lines if len(words) > 1)
    except OSError:
        return 0
    usual = {b"default", b"local", *(policy for policy, _ in found.most_common(1))}
    return sum(count for policy, count in found.items() if policy not in usual)


@functools.cache
def _has_many_nodes() -> bool:
    try:
        with open("/sys/devices/system/node/online", encoding="ascii") as file:
            return file.read().strip() not in {"", "0"}
    except OSError:
        return False
