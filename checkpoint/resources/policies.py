"""Small policies that a thread keeps with the kernel: where its memory comes from, how it is guarded against speculation.

Also the security label of a process (AppArmor, SELinux), which cannot be given back, and the policies of single mappings (mbind),
which are not kept: both are named in warnings. Not to be seen from anywhere, and therefore not kept: Landlock rules.
"""

from __future__ import annotations

import collections
import ctypes
import functools
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from checkpoint.kernel import syscalls
from checkpoint.resources import prctl
from images import task_pb2

if TYPE_CHECKING:
    from checkpoint.kernel.threads import ThreadFacts
    from checkpoint.parasite import Batch, Buffer, Results, StubTask

_NODES_MOST = 1024
"""MAX_NUMNODES of any configuration; get_mempolicy(2) takes no less."""
_STORE_BYPASS, _INDIRECT_BRANCH = 0, 1
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


def ask(batch: Batch) -> Asked:
    """Add the questions to the batch of a thread."""
    asked = Asked(batch.buffer(4), batch.buffer(_NODES_MOST // 8))
    # ENOSYS: a kernel without NUMA, whose zeros are the default policy.
    batch.call("get_mempolicy", asked.mode, asked.nodes, _NODES_MOST, 0, 0, check=False)
    return asked


def answer(results: Results, asked: Asked, facts: ThreadFacts, thread: task_pb2.Thread) -> None:
    """Put the answers into the message of the thread."""
    mode, nodes = results.bytes(asked.mode), results.bytes(asked.nodes).rstrip(b"\0")
    if any(mode) or nodes:
        thread.memory_policy = mode + nodes
    thread.store_bypass, thread.indirect_branch = (
        known.get(facts.line(name), 0) for name, known in SPECULATION.items()
    )


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
    for which, value in ((_STORE_BYPASS, thread.store_bypass), (_INDIRECT_BRANCH, thread.indirect_branch)):
        if value:
            batch = stub.batch()
            result = batch.call("prctl", prctl.SET_SPECULATION_CTRL, which, value, 0, 0, check=False)
            _check(
                stub.run(batch)[result], thread, "guard against speculation (PR_SET_SPECULATION_CTRL)", warn
            )


def _check(result: int, thread: task_pb2.Thread, what: str, warn: Callable[[str], None]) -> None:
    if result < 0:
        warn(f"task {thread.tid}: its {what} could not be set again: {os.strerror(-result)}")


@functools.cache
def _own_memory_policy() -> bytes:
    """That of this thread of ours, which the stubs have inherited."""
    mode, nodes = ctypes.create_string_buffer(4), ctypes.create_string_buffer(_NODES_MOST // 8)
    libc = ctypes.CDLL(None)
    number = ctypes.c_long(syscalls.number("get_mempolicy"))
    libc.syscall(number, mode, nodes, ctypes.c_long(_NODES_MOST), ctypes.c_long(0), ctypes.c_long(0))
    return mode.raw + nodes.raw.rstrip(b"\0")


def security_label(pid: int | str) -> str:
    """What the active security module calls a process; "" where there is none."""
    try:
        with open(f"/proc/{pid}/attr/current", "rb", buffering=0) as file:
            return os.fsdecode(file.read(4096).rstrip(b"\0\n"))
    except OSError:
        return ""


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
