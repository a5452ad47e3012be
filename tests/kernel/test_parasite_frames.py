"""Where the fail-safe frames lie: never in memory that a thread of the target uses, however full its stacks are."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import pathlib
import signal
import struct
import subprocess

import pytest

from checkpoint.freeze import FrozenTree, stopped_process
from checkpoint.kernel import proc
from checkpoint.parasite import Parasite, frames
from snapshotter.base import faults
from snapshotter.base.errors import UnsupportedError
from tests.jobs import reap, wait_until

PROGRAMS = pathlib.Path(__file__).parent / "programs"
INSIDE = ["parasite.redirected", "parasite.mapped", "parasite.started", "parasite.ran", "parasite.leaving"]


class DeepStack:
    def __init__(self, program, path, array_kib, thread_kib):
        command = [program, path, str(array_kib), str(thread_kib)]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self.pid = self.process.pid
        wait_until(lambda: path.exists() and path.stat().st_size, "the program counts")
        with path.open("rb") as file:
            self.view = mmap.mmap(file.fileno(), 4096, prot=mmap.PROT_READ)
        self.goes_on("at the start")
        self.worker = next(tid for tid in proc.threads(self.pid) if tid != self.pid)

    def goes_on(self, when):
        """Both threads count on by two, so that the array was looked at once from end to end."""
        before = struct.unpack_from("<2Q", self.view)

        def done():
            if self.process.poll() is not None:
                raise AssertionError(f"the job ended {when}: {self.process.stderr.read()}")
            now = struct.unpack_from("<2Q", self.view)
            return all(new >= old + 2 for old, new in zip(before, now, strict=True))

        wait_until(done, f"the job counts {when}")

    def stack(self):
        return next(entry for entry in proc.read_maps(self.pid) if entry.path == "[stack]")


@pytest.fixture
def deep(compile_program, tmp_path):
    program = compile_program(str(PROGRAMS / "deep_stack.c"))
    with contextlib.ExitStack() as stack:

        def start(array_kib, thread_kib=0):
            job = DeepStack(program, tmp_path / "counters", array_kib, thread_kib)
            stack.callback(job.process.wait)
            stack.callback(job.process.kill)
            return job

        yield start


def killed_inside(job, tid, point):
    child = os.fork()
    if child == 0:
        try:
            faults.configure(f"{point}:kill")
            with Parasite(job.pid, tid) as task:
                task.call("getpid")
        finally:
            os._exit(0)
    assert reap(child) == signal.SIGKILL, point
    job.goes_on(f"after a kill at {point}")


@pytest.mark.requires("root", "rseq_configuration")
@pytest.mark.parametrize("array_kib", [4, 70, 300, 2000])
@pytest.mark.parametrize("thread_kib", [0, 32])
def test_stacks_of_every_size_stay_what_they_are(deep, array_kib, thread_kib):
    job = deep(array_kib, thread_kib)
    for tid in (job.pid, job.worker):
        for _ in range(2):
            with Parasite(job.pid, tid) as task:
                assert task.call("gettid") == tid
            job.goes_on("after the cure")
        for point in INSIDE:
            killed_inside(job, tid, point)
    # Room below the stack is made at most once, whoever is inside, however often snap was killed.
    before = job.stack()
    for tid in (job.pid, job.worker):
        killed_inside(job, tid, "parasite.ran")
        with stopped_process(job.pid) as process:
            for task in process.threads:
                task.infect().call("getpid")
    assert job.stack() == before
    assert before.size_bytes < (array_kib + 132 + 128) * 1024


@pytest.mark.requires("root", "rseq_configuration")
def test_all_threads_of_a_full_stack_in_one_window(deep):
    job = deep(300, 16)
    for _ in range(3):
        with FrozenTree(job.pid) as tree:
            for task in tree.tasks():
                assert task.infect().call("gettid") == task.tid
        job.goes_on("after the thaw")


STACK = (0x7000000, 0x7040000)
OTHER = (0x5000000, 0x5200000)


class FakeMemory:
    """Two mappings; STACK has `zeros` bytes of zero at its low end and grows downwards when it is written to, if `grows`."""

    def __init__(self, *, zeros: int = 0, grows: bool = True) -> None:
        self.grows = grows
        self.first = STACK[0]
        self.used = STACK[0] + zeros

    def read(self, at: int, size: int) -> bytes:
        if OTHER[0] <= at and at + size <= OTHER[1]:
            return bytes(size)
        if at < self.first or at + size > STACK[1]:
            raise OSError(errno.EIO, "EIO")
        return bytes(max(0, min(size, self.used - at))).ljust(size, b"\x01")

    def write(self, at: int, data: bytes) -> None:
        assert not any(data)
        assert at + len(data) <= STACK[0], "what is in use is only written to when the frames are"
        if not self.grows:
            raise OSError(errno.EIO, "EIO")
        self.first = min(self.first, at & -4096)


def entry(start, end, path=""):
    return proc.MapsEntry(start, end, "rw-p", 0, 0, 0, 0, path)


MAPS = [entry(*OTHER), entry(*STACK, "[stack]")]
NEED = 3000


def choose(memory, rsp, *others):
    return frames.choose(MAPS, memory, rsp, NEED, [rsp, *others], where="task 1")


def below(rsp):
    return (rsp - 128 - NEED) & -64


ROOM = 0x8000


def test_the_low_end_is_used_where_it_was_never_touched():
    high = STACK[1] - 0x1000
    assert choose(FakeMemory(zeros=0xC000), high).address == STACK[0] + ROOM
    assert choose(FakeMemory(zeros=0), high).address == below(high)
    # Nobody stands in it: who knows where it ends
    assert choose(FakeMemory(zeros=0x1000), OTHER[0] + 0x1000).address == STACK[0]


def test_no_thread_stands_near_the_low_end_that_is_used():
    memory, high, near = FakeMemory(zeros=0x8000), STACK[1] - 0x1000, STACK[0] + 0x9000
    assert choose(memory, near, high).address == below(near)
    place = choose(memory, high, near)
    assert place.address + NEED <= near - 0x10000
    assert place.saved == bytes(4096)


def test_the_lowest_task_has_them_below_its_red_zone():
    rsp = STACK[0] + 0x400
    place = choose(FakeMemory(), rsp, STACK[1] - 64)
    assert place.address == below(rsp)
    outside = STACK[0] - place.address
    assert place.saved == bytes(outside) + b"\x01" * (NEED - outside)


def test_any_other_has_them_below_the_mapping_far_from_the_lowest():
    lowest = STACK[0] + 0x400
    for rsp in (OTHER[0] + 0x100000, lowest + 0x10000):
        assert choose(FakeMemory(), rsp, lowest).address + NEED <= lowest - 0x10000
    assert choose(FakeMemory(), OTHER[0] + 0x100000).address + NEED <= STACK[0] - 0x10000


def test_where_the_stack_does_not_grow_it_is_the_own_one_or_nothing():
    lowest = STACK[0] + 0x400
    roomy, narrow = OTHER[0] + 0x100000, OTHER[0] + 0x4000
    assert choose(FakeMemory(grows=False), roomy, lowest).address == below(roomy)
    for rsp in (narrow, lowest):
        with pytest.raises(UnsupportedError, match="kept safe"):
            choose(FakeMemory(grows=False), rsp, lowest)


def test_frames_of_another_process_are_in_the_way_only_if_they_are_here():
    high = STACK[1] - 0x1000
    memory = FakeMemory(zeros=0x10000)
    other = STACK[0] + ROOM
    assert frames.choose(MAPS, memory, high, NEED, [high], [other], where="task 1").address == other
    read = memory.read
    memory.read = lambda at, size: frames.MAGIC[:size] if at == other and size == 16 else read(at, size)
    assert frames.choose(MAPS, memory, high, NEED, [high], [other], where="task 1").address == other + 4096
