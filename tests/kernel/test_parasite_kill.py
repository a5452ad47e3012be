"""Nothing that happens to the injecting process harms the target: SIGKILL at every fault point and at random.

The job (programs/untouched.c) checks its registers, vector state, red zone, signal mask, alternate stack and the
results of interrupted calls, and counts. After each kill it must count on, with exactly the mappings it had.
SNAP_TEST_KILLS sets the number of random kills per mode (default 6).
"""

import mmap
import os
import pathlib
import random
import struct
import subprocess
import sys
import time

import pytest

from checkpoint.kernel import proc
from checkpoint.parasite import Parasite
from snapshotter.base import faults

pytestmark = pytest.mark.requires("root", "rseq_configuration")

SOURCE = pathlib.Path(__file__).parent / "programs" / "untouched.c"
NR_KILLS = int(os.environ.get("SNAP_TEST_KILLS", "6"))
MODES = ("spin", "sleep", "sigsuspend", "ppoll", "threads")
POINTS = [name for name in faults.POINTS if name.startswith("parasite.")]

INJECT = """
import random, sys
from checkpoint.kernel import proc
from checkpoint.parasite import Parasite
pid, rounds = int(sys.argv[1]), int(sys.argv[2])
print("ready", flush=True)
while rounds:
    rounds -= 1
    with Parasite(pid, random.choice(proc.threads(pid))) as task:
        for _ in range(3):
            batch = task.batch()
            for _ in range(20):
                batch.call("getpid")
            opened = batch.call("open", b"/dev/null\\0", 0o2000000)
            batch.undo("close", opened)
            results = task.run(batch)
            task.call("close", results[opened])
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    path = tmp_path_factory.mktemp("untouched") / "untouched"
    subprocess.run(["gcc", "-O2", "-pthread", SOURCE, "-o", path], check=True)
    return path


class Job:
    def __init__(self, program, tmp_path, mode):
        self.mode = mode
        counters = tmp_path / "counters"
        self.process = subprocess.Popen([program, counters, mode], stderr=subprocess.PIPE, text=True)
        self.pid = self.process.pid
        deadline = time.monotonic() + 10
        while not (counters.exists() and counters.stat().st_size):
            assert time.monotonic() < deadline
            time.sleep(0.005)
        with counters.open("rb") as file:
            self.view = mmap.mmap(file.fileno(), 4096, prot=mmap.PROT_READ)
        self.nr_counters = 4 if mode == "threads" else 1
        self.goes_on("at the start")
        self.maps = self.read_maps()
        self.descriptors = sorted(os.listdir(f"/proc/{self.pid}/fd"))

    def read_maps(self):
        return pathlib.Path(f"/proc/{self.pid}/maps").read_text()

    def counts(self):
        return struct.unpack_from(f"<{self.nr_counters}Q", self.view)

    def goes_on(self, when):
        before = self.counts()
        deadline = time.monotonic() + 30
        while not all(now > then for then, now in zip(before, self.counts(), strict=True)):
            if self.process.poll() is not None:
                pytest.fail(f"the job died {when}: {self.process.returncode} {self.process.stderr.read()}")
            if time.monotonic() > deadline:
                pytest.fail(f"the job stands still {when}: {proc.read_status(self.pid).state}")
            time.sleep(0.002)

    def untouched(self, when, *, descriptors=True):
        self.goes_on(when)
        assert self.read_maps() == self.maps, f"mappings differ {when}"
        if not descriptors:  # undo is for a snap that is dead; one that lives closes what it opened
            return
        assert sorted(os.listdir(f"/proc/{self.pid}/fd")) == self.descriptors, f"descriptors differ {when}"
        status = proc.read_status(self.pid)
        assert status.tracer_pid == 0

    def end(self):
        self.process.kill()
        self.process.wait()
        self.view.close()


@pytest.fixture(params=MODES)
def job(request, program, tmp_path):
    made = Job(program, tmp_path, request.param)
    yield made
    made.end()


def inject(pid, rounds, fault=""):
    env = {**os.environ, "SNAP_FAULT": fault}
    return subprocess.Popen(
        [sys.executable, "-c", INJECT, str(pid), str(rounds)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=env,
    )


def test_killed_at_random_instants(job):
    seed = random.randrange(1 << 30)
    chance = random.Random(seed)
    for nr in range(NR_KILLS):
        injector = inject(job.pid, -1)
        assert injector.stdout.readline() == b"ready\n"
        pause = chance.random() * 0.06
        time.sleep(pause)
        injector.kill()
        injector.wait()
        job.untouched(f"after random kill {nr} (seed {seed}, {pause:.4f} s)")


@pytest.mark.parametrize("action", ["kill", "error"])
def test_killed_at_every_fault_point(job, action):
    if action == "error" and job.mode not in {"sleep", "threads"}:
        pytest.skip("errors are tried in two modes only")
    for point in POINTS:
        injector = inject(job.pid, 2, f"{point}:{action}")
        _, said = injector.communicate(timeout=30)
        wanted = -9 if action == "kill" else 1
        assert injector.returncode == wanted, f"{point}: {said.decode()[-2000:]}"
        job.untouched(f"after {action} at {point}", descriptors=action == "kill")


def test_what_a_kill_between_two_threads_leaves_is_reclaimed(program, tmp_path):
    job = Job(program, tmp_path, "threads")
    script = """
import sys
from checkpoint.kernel import proc, ptrace
from checkpoint.parasite import infect
pid = int(sys.argv[1])
class Target: pass
remotes = []
for tid in proc.threads(pid):
    ptrace.seize(tid); ptrace.interrupt(tid); ptrace.wait(tid)
    target = Target()
    target.tid, target.pid, target.regs, target.sigmask = tid, pid, ptrace.getregs(tid), ptrace.get_sigmask(tid)
    remotes.append(infect(target))
for remote in remotes:
    remote.call("gettid")
"""
    try:
        for _ in range(3):
            env = {**os.environ, "SNAP_FAULT": "parasite.parked:kill"}
            done = subprocess.run([sys.executable, "-c", script, str(job.pid)], env=env, check=False)
            assert done.returncode == -9
            job.goes_on("after a kill between two threads")
            assert len(job.read_maps().splitlines()) == len(job.maps.splitlines()) + 2
        with Parasite(job.pid) as task:
            task.call("getpid")
        job.untouched("after the next infection")
    finally:
        job.end()
