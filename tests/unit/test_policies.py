"""What a thread's status says of its guards, and which values an image may have."""

import collections
import ctypes
import errno
import mmap
import os
import pathlib
import struct
from types import SimpleNamespace

import pytest

from checkpoint.kernel import proc
from checkpoint.resources import policies, scheduling, task_look
from images import task_pb2
from images.codec import parse, serialise
from snapshotter.base.errors import VerificationError

ABSENT = {"bypass": -19, "l1d": -19, "cpuid": 1, "extension": -22}
"""What the calls of a thread give where there is nothing to say."""


class Answers(dict):
    def bytes(self, buffer):
        return self[buffer]


def answered(lines, mode=bytes(4), nodes=bytes(128), **calls):
    thread = task_pb2.Thread()
    results = Answers({"mode": mode, "nodes": nodes, **ABSENT, **calls})
    facts = SimpleNamespace(line=lambda name: lines.get(name, b""))
    asked = policies.Asked("mode", "nodes", "bypass", "l1d", "cpuid", "extension", "flusher", "mce")
    policies.answer(results, asked, facts, thread)
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


def test_what_only_system_calls_say():
    assert answered({}) == task_pb2.Thread()
    assert answered({}, bypass=3, l1d=5, extension=0) == task_pb2.Thread()  # controllable, not asked for
    thread = answered({}, bypass=17, l1d=3, cpuid=0, extension=1)
    assert thread == task_pb2.Thread(store_bypass=16, l1d_flush=True, cpuid_faults=True, slice_extension=True)


CLAMPED = struct.Struct("<IIQiIQQQII")


@pytest.mark.parametrize(
    ("policy", "low", "high", "kept"),
    [
        (0, 0, 0, (0, 0)),  # a kernel without clamps
        (0, 0, 1024, (0, 0)),
        (0, 100, 1024, (101, 0)),
        (3, 0, 600, (0, 601)),
        (1, 1024, 1024, (0, 0)),  # what a realtime thread has by itself
        (1, 0, 1024, (1, 0)),
    ],
)
def test_utilization_clamps_that_were_asked_for(policy, low, high, kept):
    raw = CLAMPED.pack(56, policy, 0, 0, 0, 0, 0, 0, low, high)
    facts = SimpleNamespace(scheduling=raw, affinity=b"\1", raw=SimpleNamespace(io_priority=0))
    message = scheduling.dump(facts)
    assert (message.util_min, message.util_max) == kept


@pytest.mark.parametrize("asked", [{"util_min": 1}, {"util_max": 601}, {"slice_ns": 3_000_000}])
def test_hints_need_the_new_version(asked):
    process = task_pb2.Process(pid=42, ppid=1, pgid=42, sid=42)
    process.threads.add(tid=42, scheduling=task_pb2.Scheduling(**asked))
    assert parse("process/42", serialise("process/42", process)).format_version == 2


class Stub:
    """Says `error` to every call, and remembers what it was asked."""

    def __init__(self, error):
        self.error, self.calls = error, []

    def batch(self):
        return self

    def call(self, *words, check):
        self.calls.append(words)

    def run(self, batch):
        return collections.defaultdict(lambda: -self.error)


def test_clamps_that_this_kernel_does_not_have(monkeypatch):
    said = []
    monkeypatch.setattr(scheduling, "own_clamps", lambda: (0, 0))
    thread = task_pb2.Thread(tid=42)
    scheduling.restore_clamps(Stub(0), thread, said.append)
    thread.scheduling.util_min = 101
    stub = Stub(errno.EOPNOTSUPP)
    scheduling.restore_clamps(stub, thread, said.append)
    ((_, _, attr, _),) = stub.calls
    assert CLAMPED.unpack(attr)[2] == 0x78
    assert CLAMPED.unpack(attr)[8:] == (100, 0xFFFFFFFF)
    (text,) = said
    assert "task 42: its utilization clamps" in text and "CONFIG_UCLAMP_TASK" in text


def test_core_scheduling_cookies_are_named(monkeypatch):
    assert policies.core_cookie(os.getpid()) == 0
    said = []
    process = task_pb2.Process(pid=42)
    for tid in (42, 43, 44):
        process.threads.add(tid=tid)
    policies.warn_of_cookies(process, said.append)  # there are no such tasks
    monkeypatch.setattr(policies, "core_cookie", lambda tid: tid - 42)
    policies.warn_of_cookies(process, said.append)
    (text,) = said
    assert "task 43" in text and "2 threads" in text and "PR_SCHED_CORE" in text


@pytest.mark.parametrize(
    "change",
    [
        {"memory_policy": b"\2"},
        {"memory_policy": bytes(133)},
        {"store_bypass": 2},
        {"indirect_branch": 99},
        {"loginuid": b"12345678901"},
        {"request_keyring": 8},
        {"mce_kill": 4},
    ],
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


def test_labels_for_what_comes_next_are_named(monkeypatch):
    process = task_pb2.Process(pid=os.getpid())
    process.threads.add(tid=os.getpid())
    said = []
    policies.warn_of_labels_to_come(process, said.append)
    assert said == []
    asked = []
    labels = [b"\n", b"user_u:object_r:tmp_t\0", None, b""]
    monkeypatch.setattr(policies.threads, "read_files", lambda paths: asked.extend(paths) or labels)
    policies.warn_of_labels_to_come(process, said.append)
    assert asked[1].endswith("/attr/fscreate")
    (text,) = said
    assert "'user_u:object_r:tmp_t' that it has chosen for files" in text


def test_flushers_that_may_not_ask():
    def flusher(answer, flags, tid=42):
        process = task_pb2.Process(pid=42)
        facts = SimpleNamespace(tid=tid, stat=SimpleNamespace(flags=flags))
        results = {"mce": 2, "flusher": answer}
        asked = SimpleNamespace(mce_kill="mce", io_flusher="flusher")
        thread = process.threads.add(tid=tid)
        policies.answer_flags(results, asked, facts, process, thread)
        return process.io_flusher if tid == process.pid else thread.io_flusher

    assert flusher(1, 0, tid=43)
    assert flusher(1, 0)
    assert not flusher(0, 0x00180000)
    assert flusher(-errno.EPERM, 0x00580040)
    assert not flusher(-errno.EPERM, 0x00480040)


def test_tagged_addresses():
    text = pathlib.Path("/proc/self/status").read_bytes()
    lines = [line for line in text.splitlines() if not line.startswith(b"untag_mask:")]
    for mask, tagged in ((b"0xffffffffffffffff", False), (b"0x81ffffffffffffff", True), (None, False)):
        new = lines if mask is None else [*lines, b"untag_mask:\t" + mask]
        assert task_look.has_tagged_addresses(proc.parse_status(b"\n".join(new) + b"\n")) == tagged


def test_resctrl_groups_are_named(monkeypatch):
    process = task_pb2.Process(pid=42)
    for tid in (42, 43, 44):
        process.threads.add(tid=tid)
    said = []
    policies.warn_of_resctrl(process, said.append)  # this kernel's own answer, and tasks that are not there
    assert said == []
    files = [b"res:/\nmon:/\n", b"res:/\nmon:/\n", b"res:/fast\nmon:/\n", None]
    monkeypatch.setattr(policies.threads, "read_files", lambda paths: files[: len(paths)])
    policies.warn_of_resctrl(process, said.append)
    (text,) = said
    assert "task 43" in text and "(res:/fast mon:/)" in text
