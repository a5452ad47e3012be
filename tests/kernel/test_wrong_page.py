"""No page of a point differs from the frozen job's memory, whoever writes into it behind the page tables.

Each take here runs under the oracle (checkpoint/oracle.py), which fails it by name.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import pathlib
import signal
import struct
import sys
from dataclasses import dataclass

import pytest

from checkpoint import dump, oracle, transfers
from checkpoint.kernel import sys as ksys
from checkpoint.kernel import uring
from checkpoint.tracking.base import EMPTY
from checkpoint.tracking.write_protect import WriteProtectSession
from snapshotter.base.errors import UnsupportedError
from tests import slow, slow_files
from tests.jobs import reap, signal_tree, state, ticks, tree, wait_until
from tests.kernel.descriptor_jobs import child
from tests.memory_store import take

pytestmark = pytest.mark.requires("root", "wp_async")

NR_TAKES = int(os.environ.get("SNAP_TEST_WRONG_PAGE_TAKES", "8"))
PROGRAM = "../kernel/programs/direct_reads.c"


@pytest.fixture(autouse=True)
def _under_the_oracle(monkeypatch, tmp_path):
    monkeypatch.setenv(oracle.VARIABLE, "1")
    monkeypatch.setenv("SNAP_RUNTIME_DIR", str(tmp_path / "run"))


@pytest.fixture
def varied_file(tmp_path):
    """16 MiB on a disk, no two pages alike."""
    path = tmp_path / "varied"
    path.write_bytes(os.urandom(16 << 20))
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return path


@pytest.mark.parametrize("mode", ["reopen", "own-table", "held"])
def test_direct_reads_in_flight(mode, job, compile_program, varied_file):
    """The attack of the examination: no look at a descriptor table shows these files when the tracker is armed."""
    job.start([compile_program(PROGRAM), varied_file, mode, "48", "4"]).wait_ready()
    try:
        with slow.disk(job.pid, varied_file, 20 << 20):
            point = None
            read_again = 0
            for _ in range(NR_TAKES):
                point = take(job.pid, point)
                stats = point.result.stats
                assert stats.pages_verified > 0, "the oracle had nothing to compare: nothing was pre-copied"
                read_again += stats.pages_frozen
        assert read_again > 0, "nothing was read into while the takes went on"
    finally:
        signal_tree(job.pid, signal.SIGKILL)
        reap(job.pid)


@pytest.mark.skipif(not os.path.exists("/dev/fuse"), reason="no /dev/fuse: modprobe fuse")
def test_direct_reads_from_a_file_server(job, compile_program, tmp_path):
    """FUSE copies an answer into pages that it has looked up when the read began; the reader waits interruptibly."""
    with slow_files.mounted(tmp_path / "slow", 0.02) as path:
        job.start([compile_program(PROGRAM), path, "reopen", "48", "4"]).wait_ready()
        try:
            point = None
            for _ in range(NR_TAKES):
                point = take(job.pid, point)
                assert point.result.stats.pages_verified > 0
        finally:
            signal_tree(job.pid, signal.SIGKILL)
            reap(job.pid)


@pytest.mark.skipif(not os.path.exists("/dev/fuse"), reason="no /dev/fuse: modprobe fuse")
def test_another_task_writes_into_the_memory(job, compile_program, tmp_path):
    """process_vm_writev of a child, stalled by page faults of its own in the middle of the parent's pages."""
    with slow_files.mounted(tmp_path / "slow", 0.02) as path:
        job.start([compile_program("../kernel/programs/writes_into.c"), path]).wait_ready()
        try:
            point = None
            for _ in range(NR_TAKES):
                point = take(job.pid, point)
                assert point.result.stats.pages_verified > 0
        finally:
            signal_tree(job.pid, signal.SIGKILL)
            reap(job.pid)


@dataclass
class Judged:
    """A Watch that waits for nothing: all is stored while the job runs, or all is staged."""

    stores_in_vain: bool
    next_s: float = 0.0


@pytest.mark.parametrize("way", ["pre-copied", "staged", "inherited"])
def test_the_oracle_names_what_a_tracker_hides(way, job, compile_program, monkeypatch):
    """A tracker that reports nothing: the take fails, says which page of which mapping, and the next one is whole."""
    said_way = "pre-copied" if way == "staged" else way
    honest = WriteProtectSession.collect

    def lying(self, pid, vmas, *, frozen=None):
        runs = honest(self, pid, vmas, frozen=frozen)
        return runs if runs is None or (way != "inherited" and frozen is None) else EMPTY

    job.start([compile_program("mem_churn.c")]).wait_ready()
    try:
        first = take(job.pid)
        with monkeypatch.context() as patch:
            patch.setattr(WriteProtectSession, "collect", lying)
            patch.setattr(dump, "Watch", lambda _nr_due: Judged(stores_in_vain=way == "staged"))
            # Another round is made, and staged, as long as there is anything.
            options = {"frozen_budget_bytes": 0} if way == "staged" else {}
            said = rf"task \d+: \d+ pages? .* 0x[0-9a-f]+ in mapping .*{said_way}"
            with pytest.raises(oracle.WrongPageError, match=said):
                take(job.pid, first, **options)
        assert state(job.pid) in {"R", "S"}
        take(job.pid, first)
    finally:
        signal_tree(job.pid, signal.SIGKILL)
        reap(job.pid)


@pytest.mark.requires("io_uring")
def test_registered_buffers_are_seen():
    """Whoever they are registered with: VmPin says so."""

    def register() -> None:
        memory = mmap.mmap(-1, 1 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory[:] = b"x" * len(memory)
        where = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        ring, _ = uring.setup(4, 8)
        vector = ctypes.create_string_buffer(struct.pack("=QQ", where, len(memory)))
        ksys.syscall("io_uring_register", ring, 0, vector, 1)

    with child(lambda: None) as pid:
        assert not transfers.asynchronous(pid, [])
    with child(register) as pid:
        assert transfers.asynchronous(pid, [])


@pytest.mark.requires("io_uring")
def test_requests_of_closed_rings(job, compile_program, varied_file):
    """A process that has used io_uring may have transfers that nothing shows: it is read in the frozen window."""
    job.start([compile_program("../kernel/programs/closed_rings.c"), varied_file, "24"]).wait_ready()
    try:
        with slow.disk(job.pid, varied_file, 8 << 20):
            point, taken = None, 0
            while taken < NR_TAKES:
                try:
                    point = take(job.pid, point)
                except UnsupportedError as error:  # the instant in which a ring is open
                    assert "io_uring" in str(error)
                    continue
                taken += 1
                assert point.result.stats.pages_frozen >= 24 << 20 >> 12
    finally:
        signal_tree(job.pid, signal.SIGKILL)
        reap(job.pid)


def test_what_is_rewritten_is_staged_and_handed_on_once(job):
    """A job that rewrites 48 MiB all the time: under the oracle, and no page is given to the sink twice."""
    writer = (
        "import mmap\n"
        "memory, n = mmap.mmap(-1, 48 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), 0\n"
        "while True:\n"
        "    n += 1\n"
        "    memory[:] = bytes([n % 256]) * len(memory)\n"
    )
    job.start([sys.executable, "-S", "-c", writer])
    wait_until(lambda: ticks(job.pid) > 50, "it writes")
    for _ in range(3):
        point = take(job.pid)
        stats = point.result.stats
        assert stats.rounds > 1
        assert stats.pages_verified + stats.pages_frozen >= 48 << 20 >> 12
        assert point.pages_put <= stats.pages_total * 1.1
    job.destroy()


def test_who_sleeps_where_no_page_is_held_is_not_stopped(job, monkeypatch):
    """A sleep, a poll, a lock, an empty pipe, a socket, a wait for a child: all of them are only looked at."""
    sleepers = (
        "import os, select, socket, subprocess, threading, time\n"
        "r, w = os.pipe()\n"
        "a, b = socket.socketpair()\n"
        "for work in (lambda: time.sleep(1000), lambda: select.select([r], [], []), lambda: os.read(r, 1), lambda: a.recv(1),\n"
        "             lambda: subprocess.run(['sleep', '1000'])):\n"
        "    threading.Thread(target=work, daemon=True).start()\n"
        "threading.Event().wait()\n"
    )
    job.start([sys.executable, "-S", "-c", sleepers])
    wait_until(
        lambda: len(tree(job.pid)) == 2 and set(map(state, tree(job.pid))) == {"S"}, "all of them sleep"
    )
    wait_until(lambda: len(os.listdir(f"/proc/{job.pid}/task")) == 6, "all threads there")
    stopped = []
    real = transfers.Seizure.seize
    monkeypatch.setattr(transfers.Seizure, "seize", lambda *args: stopped.append(args[2]) or real(*args))

    def settled_by_looking() -> bool:  # a thread may be on its way to its sleep
        stopped.clear()
        assert transfers.settle(job.pid, 2.0, pytest.fail)
        return not stopped

    wait_until(settled_by_looking, "nobody needs to be stopped")
    os.kill(job.pid, signal.SIGSTOP)
    wait_until(settled_by_looking, "who is stopped already need not be")
    job.destroy()


def test_who_computes_is_stopped_for_an_instant(job):
    """It may be on its way into a transfer or out of one; afterwards it runs on and nobody traces it."""
    job.start([sys.executable, "-S", "-c", "while True: pass"])
    wait_until(lambda: state(job.pid) == "R", "it runs")
    assert transfers.settle(job.pid, 5.0, pytest.fail)
    assert "TracerPid:\t0\n" in pathlib.Path(f"/proc/{job.pid}/status").read_text()
    before = ticks(job.pid)
    wait_until(lambda: ticks(job.pid) > before, "it computes")
    job.destroy()
