"""Trackers against living processes: exactly the dirtied pages, and "unknown" where there is any doubt."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import pathlib
import random
import select
import signal
import sys
import time

import numpy as np
import pytest

from checkpoint import tracking
from checkpoint.context import DumpOptions
from checkpoint.dump import dump
from checkpoint.kernel import proc
from checkpoint.kernel.mem import ProcMem
from checkpoint.kernel.ptrace import Regs
from checkpoint.model.vma import private_vmas
from checkpoint.parasite import Parasite
from checkpoint.resources.memory.mappings import read_space
from checkpoint.tracking import keeper
from checkpoint.tracking.soft_dirty import SoftDirtyTracker
from checkpoint.tracking.write_protect import WriteProtectTracker
from images import codec
from tests.jobs import reap, signal_tree, wait_until
from tests.memory_store import MemoryPoint

PAGE = 4096
NR_PAGES = 256
LIVE = [kind for kind in (WriteProtectTracker, SoftDirtyTracker) if kind.probe().ok]

pytestmark = pytest.mark.requires("root")


class Writer:
    """A child that dirties the pages of one mapping that it is told, or forks, or ends."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, NR_PAGES * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.memory[:] = b"\x01" * len(self.memory)
        self.start = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        order, self._order = os.pipe()
        self._answer, answer = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._order)
            os.close(self._answer)
            while True:
                word = os.read(order, 4)
                if len(word) < 4:
                    os._exit(0)
                self.memory[int.from_bytes(word, "little") * PAGE] = os.urandom(1)[0]
                os.write(answer, b".")
        os.close(order)
        os.close(answer)

    @property
    def vmas(self) -> list[tuple[int, int]]:
        return [(self.start, self.start + NR_PAGES * PAGE)]

    def write(self, *pages: int) -> None:
        for page in pages:
            os.write(self._order, page.to_bytes(4, "little"))
            assert os.read(self._answer, 1) == b"."

    def start_time(self) -> int:
        return proc.read_stat(self.pid).start_time_ticks

    def end(self) -> None:
        os.close(self._order)
        os.close(self._answer)
        reap(self.pid)


@pytest.fixture
def writer(tmp_path, monkeypatch):
    monkeypatch.setenv("SNAP_RUNTIME_DIR", str(tmp_path / "run"))
    made = Writer()
    yield made
    made.end()


def pages_of(runs, writer) -> list[int]:
    first = writer.start // PAGE
    inside = [page - first for a, b in np.asarray(runs).tolist() for page in range(a, b)]
    return sorted(page for page in inside if 0 <= page < NR_PAGES)


@pytest.mark.parametrize("kind", LIVE)
def test_exactly_the_written_pages(kind, writer):
    with kind().session(writer.pid, {writer.pid: writer.start_time()}, "") as session:
        assert session.collect(writer.pid, writer.vmas) is None
        writer.write(3, 4, 200)
        assert pages_of(session.collect(writer.pid, writer.vmas), writer) == [3, 4, 200]
        assert pages_of(session.collect(writer.pid, writer.vmas), writer) == []
        writer.write(3)
        assert pages_of(session.collect(writer.pid, writer.vmas), writer) == [3]


@pytest.mark.parametrize("kind", LIVE)
def test_goes_on_from_take_to_take(kind, writer):
    tasks = {writer.pid: writer.start_time()}
    with kind().session(writer.pid, tasks, "") as session:
        assert session.collect(writer.pid, writer.vmas) is None
        session.confirm()
        nonce = session.nonce
    writer.write(7, 8)
    with kind().session(writer.pid, tasks, nonce) as session:
        assert pages_of(session.collect(writer.pid, writer.vmas), writer) == [7, 8]
        session.confirm()
        assert session.nonce != nonce
        nonce = session.nonce
    with kind().session(writer.pid, tasks, nonce) as session:
        assert pages_of(session.collect(writer.pid, writer.vmas), writer) == []


@pytest.mark.parametrize("kind", LIVE)
def test_take_that_fails_makes_the_next_one_full(kind, writer):
    tasks = {writer.pid: writer.start_time()}
    with kind().session(writer.pid, tasks, "") as session:
        session.collect(writer.pid, writer.vmas)
        session.confirm()
        nonce = session.nonce
    writer.write(7)
    with kind().session(writer.pid, tasks, nonce) as session:
        assert pages_of(session.collect(writer.pid, writer.vmas), writer) == [7]
        # no confirm: page 7 is protected again and no point has it
    with kind().session(writer.pid, tasks, nonce) as session:
        assert session.collect(writer.pid, writer.vmas) is None


@pytest.mark.parametrize("kind", LIVE)
def test_another_point_as_parent_is_unknown(kind, writer):
    tasks = {writer.pid: writer.start_time()}
    with kind().session(writer.pid, tasks, "") as session:
        session.collect(writer.pid, writer.vmas)
        session.confirm()
    with kind().session(writer.pid, tasks, "0" * 32) as session:
        assert session.collect(writer.pid, writer.vmas) is None


@pytest.mark.parametrize("kind", LIVE)
def test_keeper_killed_is_unknown(kind, writer):
    tasks = {writer.pid: writer.start_time()}
    with kind().session(writer.pid, tasks, "") as session:
        session.collect(writer.pid, writer.vmas)
        session.confirm()
        nonce = session.nonce
        kept = keeper.find(writer.pid, tasks[writer.pid], kind.name)
        assert kept is not None
        signal.pidfd_send_signal(kept.keeper_pidfd, signal.SIGKILL)
        assert select.select([kept.keeper_pidfd], [], [], 10)[0]
        kept.close()
    with kind().session(writer.pid, tasks, nonce) as session:
        assert session.collect(writer.pid, writer.vmas) is None


@pytest.mark.parametrize("kind", LIVE)
def test_second_take_at_the_same_time_reads_everything(kind, writer):
    tasks = {writer.pid: writer.start_time()}
    with kind().session(writer.pid, tasks, "") as one:
        one.collect(writer.pid, writer.vmas)
        with kind().session(writer.pid, tasks, "") as two:
            assert not two.tracks(writer.pid)
            assert two.collect(writer.pid, writer.vmas) is None
            assert two.collect(writer.pid, writer.vmas) is None
        writer.write(1)
        assert pages_of(one.collect(writer.pid, writer.vmas), writer) == [1]


def test_soft_dirty_bits_are_one_takes_at_a_time(writer):
    """Between the last collect and the commit another job's take of the same process must not reset them."""
    outer = {os.getpid(): proc.read_stat(os.getpid()).start_time_ticks, writer.pid: writer.start_time()}
    inner = {writer.pid: writer.start_time()}
    tracker = SoftDirtyTracker()
    with tracker.session(os.getpid(), outer, "") as one:
        assert one.tracks(writer.pid)
        with tracker.session(writer.pid, inner, "") as two:
            assert not two.tracks(writer.pid)
            assert two.collect(writer.pid, writer.vmas) is None
    with tracker.session(writer.pid, inner, "") as two:
        assert two.tracks(writer.pid)
        with tracker.session(os.getpid(), outer, "") as one:
            assert not one.tracks(writer.pid)


# Soft-dirty bits are one set: two folders of state know nothing of each other (soft_dirty.py says so).
@pytest.mark.parametrize(
    ("kind", "same_folder"),
    [(kind, same) for kind in LIVE for same in (True, False) if same or kind is WriteProtectTracker],
)
def test_process_of_two_jobs(kind, same_folder, writer, tmp_path, monkeypatch):
    """A root outside and the process itself as a root: neither ever takes the other's marks."""
    outer = {os.getpid(): proc.read_stat(os.getpid()).start_time_ticks, writer.pid: writer.start_time()}
    inner = {writer.pid: writer.start_time()}
    nonces = {"outer": "", "inner": ""}

    def written(name: str) -> list[int] | None:
        root, tasks = (os.getpid(), outer) if name == "outer" else (writer.pid, inner)
        if not same_folder:
            monkeypatch.setenv("SNAP_RUNTIME_DIR", str(tmp_path / f"run-{name}"))
        with kind().session(root, tasks, nonces[name]) as session:
            runs = session.collect(writer.pid, writer.vmas)
            session.confirm()
            nonces[name] = session.nonce
        return None if runs is None else pages_of(runs, writer)

    for number, name in enumerate(["outer", "outer", "inner", "outer", "inner", "inner", "outer"]):
        writer.write(10 + number)
        unseen = {10 + number} if name == "outer" else set()
        found = written(name)
        assert found is None or unseen <= set(found), name
    since: dict[str, set[int]] = {"outer": set(), "inner": set()}
    for number in range(12):
        writer.write(100 + number)
        for pages in since.values():
            pages.add(100 + number)
        name = "outer" if number % 3 else "inner"
        found = written(name)
        assert found is None or since[name] <= set(found), name
        since[name] = set()
    for name in ("outer", "inner"):
        if not same_folder:
            monkeypatch.setenv("SNAP_RUNTIME_DIR", str(tmp_path / f"run-{name}"))
        kept = keeper.find(os.getpid(), outer[os.getpid()], kind.name)
        if kept is not None:  # it would wait for the end of this test process
            signal.pidfd_send_signal(kept.keeper_pidfd, signal.SIGKILL)
            kept.close()


@pytest.mark.parametrize("kind", LIVE)
def test_keeper_leaves_with_the_job(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("SNAP_RUNTIME_DIR", str(tmp_path / "run"))
    writer = Writer()
    with kind().session(writer.pid, {writer.pid: writer.start_time()}, "") as session:
        session.collect(writer.pid, writer.vmas)
        session.confirm()
    state = keeper.state_path(writer.pid)
    assert state.exists()
    writer.end()
    wait_until(lambda: not state.exists(), "the keeper removes its state file")


def test_both_trackers_agree(writer, tmp_path, monkeypatch):
    """Where a kernel has both: the same writes, seen by each."""
    if len(LIVE) < 2:
        pytest.skip("needs soft-dirty bits and write-protection in one kernel: `make test-kernels` has one")
    tasks = {writer.pid: writer.start_time()}
    chance = random.Random(1)
    with contextlib.ExitStack() as stack:
        sessions = []
        for kind in LIVE:
            monkeypatch.setenv(
                "SNAP_RUNTIME_DIR", str(tmp_path / kind.name)
            )  # one take of a job at a time in each
            sessions.append(stack.enter_context(kind().session(writer.pid, tasks, "")))
        for session in sessions:
            assert session.collect(writer.pid, writer.vmas) is None
        for _ in range(20):
            pages = sorted(chance.sample(range(NR_PAGES), chance.randrange(30)))
            writer.write(*pages)
            for session in sessions:
                assert pages_of(session.collect(writer.pid, writer.vmas), writer) == pages


def test_nothing_is_left_to_see_in_the_job(writer):
    if WriteProtectTracker not in LIVE:
        pytest.skip(WriteProtectTracker.probe().note)
    writer.write(0)  # it has closed what it does not need
    before = sorted(os.listdir(f"/proc/{writer.pid}/fd"))
    with WriteProtectTracker().session(writer.pid, {writer.pid: writer.start_time()}, "") as session:
        session.collect(writer.pid, writer.vmas)
        session.confirm()
    assert sorted(os.listdir(f"/proc/{writer.pid}/fd")) == before


# -- whole dumps ------------------------------------------------------------------------------------------------------


def take(pid: int, parent: MemoryPoint | None, **options) -> MemoryPoint:
    point = MemoryPoint(parent=parent)
    dump(pid, point, parent.as_parent() if parent else None, DumpOptions(**options), point.commit)
    return point


def differences(point: MemoryPoint) -> list[str]:
    """Where the stored pages are not what the (stopped) processes have now."""
    manifest = codec.parse("manifest", point.images["manifest"])
    found = []
    for pid in manifest.pids:
        if f"mm/{pid}" not in point.images:
            continue
        pages = point.spaces[f"mm/{pid}"]
        image = codec.parse(f"mm/{pid}", point.images[f"mm/{pid}"])
        thread = codec.parse(f"process/{pid}", point.images[f"process/{pid}"]).threads[0]
        # Below the red zone of the stack the parasite has been since: nothing of the program's is there.
        used = Regs.from_bytes(thread.regs).rsp - 128
        # And the kernel writes into the rseq area each time it lets the task run.
        rseq = range(thread.rseq_pointer, thread.rseq_pointer + 32)
        with ProcMem(pid) as mem:
            for vma in private_vmas(image.vmas):
                if not vma.prot & 1:
                    continue
                data = mem.read(vma.start, vma.end - vma.start)
                over_file = bool(vma.offset) or vma.kind != 0
                for at in range(0, len(data), PAGE):
                    number = (vma.start + at) // PAGE
                    stored = pages.get(number)
                    if stored is None and over_file:
                        continue
                    below = used - vma.start - at if vma.start <= used < vma.end else 0
                    skip = min(max(below, 0), PAGE)
                    then, now = bytearray(stored or bytes(PAGE)), bytearray(data[at : at + PAGE])
                    if rseq.start >> 12 == number:
                        then[rseq.start & 4095 : rseq.stop & 4095] = now[
                            rseq.start & 4095 : rseq.stop & 4095
                        ] = b""
                    if then[skip:] != now[skip:]:
                        found.append(f"task {pid} page {number:#x} of {vma.start:x}-{vma.end:x}")
    return found


@pytest.mark.parametrize("name", [*(kind.name for kind in LIVE), "compare"])
def test_chain_of_points_is_exact(name, job, compile_program, tmp_path, monkeypatch):
    """A program that changes its memory in every way: each point has exactly what it had when it was stopped."""
    monkeypatch.setenv("SNAP_RUNTIME_DIR", str(tmp_path / "run"))
    job.start([compile_program("mem_churn.c")]).wait_ready()
    point = None
    for number in range(8):
        point = take(job.pid, point, tracker=name, after="stop")
        assert differences(point) == [], f"point {number}"
        manifest = codec.parse("manifest", point.images["manifest"])
        for pid in manifest.pids:
            os.kill(pid, signal.SIGCONT)
        time.sleep(0.02)
        point = take(job.pid, point, tracker=name)


def test_page_dropped_and_read_again_is_zero(writer, monkeypatch):
    """The zero page that a read maps is never dirty: the parent's content must not come back for it."""
    from checkpoint.kernel import pagemap

    page = writer.start // PAGE + 5
    for scan in (True, False):
        monkeypatch.setattr(pagemap._Support, "scan", scan and pagemap._Support.scan)
        writer.write(5)
        first = take(writer.pid, None)
        assert first.spaces[f"mm/{writer.pid}"][page].strip(b"\0")
        with Parasite(writer.pid) as remote:
            assert remote.call("madvise", page * PAGE, PAGE, 4) == 0
        with ProcMem(writer.pid) as mem:
            assert not mem.read(page * PAGE, PAGE).strip(b"\0")
        second = take(writer.pid, first)
        assert not second.spaces[f"mm/{writer.pid}"].get(page, b"").strip(b"\0"), f"scan: {scan}"


def test_idle_job_costs_next_to_nothing(job, compile_program, tmp_path, monkeypatch):
    if not LIVE:
        pytest.skip("no tracker but compare works here")
    monkeypatch.setenv("SNAP_RUNTIME_DIR", str(tmp_path / "run"))
    # A soft-dirty bit is one for a whole huge page, in which a stack may lie (PR_SET_THP_DISABLE, which exec keeps).
    plain = (
        "import ctypes, os, sys; ctypes.CDLL(None).prctl(41, 1, 0, 0, 0); os.execv(sys.argv[1], sys.argv[1:])"
    )
    job.start([sys.executable, "-c", plain, compile_program("sleeps.c")]).wait_ready()
    first = take(job.pid, None)
    second = take(job.pid, first)
    third = take(job.pid, second)
    assert first.pages_put > 20
    assert third.pages_put <= 4 * third.result.stats.nr_tasks  # the frames of the parasite on each stack
    assert second.result.tracker == third.result.tracker == tracking.choose().name


def test_reused_pid_takes_nothing_of_the_parent(job, compile_program, tmp_path, monkeypatch):
    """A fork's child has clean-looking pages; a parent point that names its pid must not be believed."""
    if not LIVE:
        pytest.skip("no tracker but compare works here")
    monkeypatch.setenv("SNAP_RUNTIME_DIR", str(tmp_path / "run"))
    job.start([compile_program("mem_churn.c")]).wait_ready()
    first = take(job.pid, None)
    space = first.spaces[f"mm/{job.pid}"]
    first.spaces[f"mm/{job.pid}"] = dict.fromkeys(space, b"\xee" * PAGE)
    # The same pid and even the same tick, but not strictly older than the dump: another process might be meant.
    first.result.dump_uptime_ns = first.result.tasks[job.pid] * (10**9 // os.sysconf("SC_CLK_TCK"))
    second = take(job.pid, first)
    assert not any(page == b"\xee" * PAGE for page in second.spaces[f"mm/{job.pid}"].values())


def is_interrupted(pid: int, parent: MemoryPoint) -> bool:
    """Whether a take came to the armed fault point."""
    from snapshotter.base import faults

    try:
        take(pid, parent)
    except faults.FaultInjectedError:
        return True
    return False


def test_fault_after_collecting_costs_a_full_dump_only(job, compile_program, tmp_path, monkeypatch):
    from snapshotter.base import faults

    if not LIVE:
        pytest.skip("no tracker but compare works here")
    monkeypatch.setenv("SNAP_RUNTIME_DIR", str(tmp_path / "run"))
    job.start([compile_program("mem_churn.c")]).wait_ready()
    first = take(job.pid, None)
    try:
        for name in (
            "dump.armed",
            "dump.collected",
            "dump.copied",
            "dump.state",
            "dump.thawed",
            "dump.commit",
        ):
            faults.configure(f"{name}:error")
            # Its mappings come and go: a look that fails for that leaves it all to the frozen window, unarmed. Where that
            # happens nearly always (in an emulator) it stands still in the end.
            for number in range(10):
                if number == 5:
                    signal_tree(job.pid, signal.SIGSTOP)
                if is_interrupted(job.pid, first):
                    break
            else:
                raise AssertionError(f"{name} was not reached")
            faults.configure("")
            assert "TracerPid:\t0" in pathlib.Path(f"/proc/{job.pid}/status").read_text()
            first = take(job.pid, first, after="stop")
            assert differences(first) == [], name
            for pid in codec.parse("manifest", first.images["manifest"]).pids:
                os.kill(pid, signal.SIGCONT)
    finally:
        faults.configure("")
    assert len(list(private_vmas(read_space(job.pid).vmas))) > 3
