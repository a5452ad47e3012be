"""Nothing that happens to the injecting process harms the target: SIGKILL at every fault point and at random.

The job (programs/untouched.c) checks its registers, vector state, red zone, signal mask, alternate stack and the
results of interrupted calls, and counts. After each kill it must count on, with exactly the mappings it had. In the
mode "stopped" it is in a group-stop while it is injected into, killed or not, and the next injection comes before it
goes on. SNAP_TEST_KILLS sets the number of random kills per mode (default 40).
"""

import mmap
import os
import pathlib
import random
import signal
import struct
import subprocess
import time
import traceback

import pytest

from checkpoint.freeze import stopped_process
from checkpoint.kernel import proc
from checkpoint.parasite import Parasite, visit, visits
from snapshotter.base import faults
from tests.jobs import reap, state, wait_until

pytestmark = pytest.mark.requires("root", "rseq_configuration")

SOURCE = pathlib.Path(__file__).parent / "programs" / "untouched.c"
NR_KILLS = int(os.environ.get("SNAP_TEST_KILLS", "40"))
MODES = ("spin", "sleep", "sigsuspend", "ppoll", "threads", "stopped")
POINTS = [name for name in faults.POINTS if name.startswith("parasite.")]


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    path = tmp_path_factory.mktemp("untouched") / "untouched"
    subprocess.run(["gcc", "-O2", "-pthread", SOURCE, "-o", path], check=True)
    return path


class Job:
    def __init__(self, program, tmp_path, mode):
        self.mode = mode
        counters = tmp_path / "counters"
        does = "threads" if mode == "stopped" else mode
        self.process = subprocess.Popen([program, counters, does], stderr=subprocess.PIPE, text=True)
        self.pid = self.process.pid
        deadline = time.monotonic() + 10
        while not (counters.exists() and counters.stat().st_size):
            assert time.monotonic() < deadline
            time.sleep(0.005)
        with counters.open("rb") as file:
            self.view = mmap.mmap(file.fileno(), 4096, prot=mmap.PROT_READ)
        self.nr_counters = 4 if does == "threads" else 1
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

    def before_injection(self):
        if self.mode == "stopped":
            os.kill(self.pid, signal.SIGSTOP)
            self.is_stopped("before the injection")

    def is_stopped(self, when):
        wait_until(lambda: all(state(tid) == "T" for tid in proc.threads(self.pid)), f"stopped {when}")

    def after_injection(self, when):
        """A stopped job stays stopped, whatever the injector's end was; the next one finds what that left there."""
        if self.mode != "stopped":
            return
        self.is_stopped(when)
        assert reap(inject(self.pid, 1)) == 0
        self.is_stopped(f"after the next injection {when}")
        assert self.read_maps() == self.maps, f"mappings differ {when}"
        os.kill(self.pid, signal.SIGCONT)

    def untouched(self, when, *, descriptors=True):
        self.after_injection(when)
        self.goes_on(when)
        assert self.read_maps() == self.maps, f"mappings differ {when}"
        status = proc.read_status(self.pid)
        assert status.tracer_pid == 0
        if descriptors:  # undo is for a snap that is dead; one that lives closes what it opened
            assert sorted(os.listdir(f"/proc/{self.pid}/fd")) == self.descriptors, (
                f"descriptors differ {when}"
            )

    def end(self):
        self.process.kill()
        self.process.wait()
        self.view.close()


@pytest.fixture(params=MODES)
def job(request, program, tmp_path):
    made = Job(program, tmp_path, request.param)
    yield made
    made.end()


def visit_all(pid):
    """Every thread but the first runs a batch, each in its turn."""
    with stopped_process(pid) as process:
        batch = process.parasite.batch()
        number = batch.call("gettid")
        others = process.threads[1:]
        assert [results[number] for results in visit(process.parasite, others, batch)] == [
            thread.tid for thread in others
        ]
        assert not any(thread.remote for thread in others), "they went the slow way"


def inject(pid, rounds, fault="", *, visits=False):
    """The pid of a child of ours that runs batches in the target; exit status 1: an error was raised."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        faults.configure(fault)
        while rounds and visits:
            rounds -= 1
            visit_all(pid)
        while rounds:
            rounds -= 1
            with Parasite(pid, random.choice(proc.threads(pid))) as task:
                for _ in range(3):
                    batch = task.batch()
                    for _ in range(20):
                        batch.call("getpid")
                    opened = batch.call("open", b"/dev/null\0", os.O_CLOEXEC)
                    batch.undo("close", opened)
                    results = task.run(batch)
                    task.call("close", results[opened])
        status = 0
    except faults.FaultInjectedError:
        pass
    except BaseException:
        traceback.print_exc()
        status = 2
    finally:
        os._exit(status)


def test_killed_at_random_instants(job):
    seed = random.randrange(1 << 30)
    chance = random.Random(seed)
    for nr in range(NR_KILLS):
        job.before_injection()
        injector = inject(job.pid, -1)
        pause = chance.random() * 0.06
        time.sleep(pause)
        os.kill(injector, signal.SIGKILL)
        when = f"after random kill {nr} (seed {seed}, {pause:.4f} s)"
        assert os.WTERMSIG(reap(injector)) == signal.SIGKILL, when
        job.untouched(when)


@pytest.mark.parametrize("action", ["kill", "error"])
def test_killed_at_every_fault_point(job, action):
    wanted = signal.SIGKILL if action == "kill" else 1 << 8
    for point in POINTS:
        job.before_injection()
        assert reap(inject(job.pid, 2, f"{point}:{action}")) == wanted, point
        job.untouched(f"after {action} at {point}", descriptors=action == "kill")


@pytest.mark.parametrize("mode", ["threads", "stopped"])
@pytest.mark.parametrize("action", ["kill", "error"])
def test_killed_while_threads_are_visited(program, tmp_path, mode, action):
    wanted = signal.SIGKILL if action == "kill" else 1 << 8
    job = Job(program, tmp_path, mode)
    try:
        for point in visits.STEPS.values():
            job.before_injection()
            assert reap(inject(job.pid, 1, f"{point}@2:{action}", visits=True)) == wanted, point
            if action == "kill" and point in {"parasite.frames", "parasite.parked"}:
                assert reap(inject(job.pid, 1, visits=True)) == 0  # nobody was inside: takes the area away
            job.untouched(f"after {action} at {point}")
    finally:
        job.end()


def test_killed_at_random_instants_of_visits(program, tmp_path):
    seed = random.randrange(1 << 30)
    chance = random.Random(seed)
    job = Job(program, tmp_path, "threads")
    try:
        for nr in range(NR_KILLS):
            injector = inject(job.pid, -1, visits=True)
            pause = chance.random() * 0.06
            time.sleep(pause)
            os.kill(injector, signal.SIGKILL)
            when = f"after random kill {nr} (seed {seed}, {pause:.4f} s)"
            assert os.WTERMSIG(reap(injector)) == signal.SIGKILL, when
            assert reap(inject(job.pid, 1, visits=True)) == 0, when
            job.untouched(when)
    finally:
        job.end()


def test_what_a_kill_between_two_threads_leaves_is_reclaimed(program, tmp_path):
    job = Job(program, tmp_path, "threads")
    try:
        for _ in range(3):
            killed = os.fork()
            if killed == 0:
                try:
                    faults.configure("parasite.parked:kill")
                    with stopped_process(job.pid) as process:
                        for task in process.threads:
                            task.infect().call("gettid")
                finally:
                    os._exit(0)
            assert reap(killed) == signal.SIGKILL
            job.goes_on("after a kill between two threads")
            assert len(job.read_maps().splitlines()) == len(job.maps.splitlines()) + 2
        with Parasite(job.pid) as task:
            task.call("getpid")
        job.untouched("after the next infection")
    finally:
        job.end()
