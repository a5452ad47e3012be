"""What a thread's status says of its guards, and which values an image may have."""

import ctypes
import mmap
import os
from types import SimpleNamespace

import pytest

from checkpoint.resources import policies
from images import task_pb2
from images.codec import parse, serialise
from snapshotter.base.errors import VerificationError


def answered(lines, mode=bytes(4), nodes=bytes(128)):
    thread = task_pb2.Thread()
    results = SimpleNamespace(bytes=lambda buffer: {"mode": mode, "nodes": nodes}[buffer])
    facts = SimpleNamespace(line=lambda name: lines.get(name, b""))
    policies.answer(results, policies.Asked("mode", "nodes"), facts, thread)
    return thread


def test_what_the_system_gives_is_not_kept():
    for text in (b"", b"not vulnerable", b"vulnerable", b"thread vulnerable", b"globally mitigated"):
        assert not answered({b"Speculation_Store_Bypass": text}).store_bypass
    for text in (b"not affected", b"always enabled", b"always disabled", b"conditional enabled"):
        assert not answered({b"SpeculationIndirectBranch": text}).indirect_branch
    assert not answered({}).memory_policy


def test_what_was_asked_for_is():
    thread = answered(
        {
            b"Speculation_Store_Bypass": b"thread force mitigated",
            b"SpeculationIndirectBranch": b"conditional disabled",
        },
        mode=b"\2\0\0\0",
        nodes=b"\5".ljust(128, b"\0"),
    )
    assert (thread.store_bypass, thread.indirect_branch) == (8, 4)
    assert thread.memory_policy == b"\2\0\0\0\5"


@pytest.mark.parametrize(
    "change",
    [{"memory_policy": b"\2"}, {"memory_policy": bytes(133)}, {"store_bypass": 2}, {"indirect_branch": 99}],
)
def test_hostile_values_are_refused(change):
    process = task_pb2.Process(pid=42, ppid=1, pgid=42, sid=42)
    thread = process.threads.add(tid=42)
    for name, value in change.items():
        setattr(thread, name, value)
    process.format_version = 2
    with pytest.raises(VerificationError):
        parse("process/42", process.SerializeToString())


def test_policies_need_the_new_version():
    process = task_pb2.Process(pid=42, ppid=1, pgid=42, sid=42, mce_kill=2)
    process.threads.add(tid=42)
    assert parse("process/42", serialise("process/42", process)).format_version == 2


def test_mappings_with_a_policy_of_their_own(monkeypatch):
    """mbind works with the one node that there is, but says nothing; with more it is told."""
    area = mmap.mmap(-1, 8 * mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    address = ctypes.addressof(ctypes.c_char.from_buffer(area))
    nodes = ctypes.c_ulong(1)
    mbind = ctypes.CDLL(None, use_errno=True).syscall
    bind = ctypes.c_long(2)  # MPOL_BIND
    size = ctypes.c_long(4 * mmap.PAGESIZE)
    failed = mbind(
        ctypes.c_long(237), ctypes.c_long(address), size, bind, ctypes.byref(nodes), ctypes.c_long(8), 0
    )
    if failed or not os.path.exists("/proc/self/numa_maps"):
        pytest.skip("this kernel has no memory policies (CONFIG_NUMA)")
    assert policies.mappings_with_a_policy(os.getpid()) == 0
    monkeypatch.setattr(policies, "_has_many_nodes", lambda: True)
    assert policies.mappings_with_a_policy(os.getpid()) == 1
