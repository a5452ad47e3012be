"""`snap take` killed, at every named instant and at random ones, against a job that checks itself (programs/self_check.c).

After each kill the job goes on: not stopped, not traced, every activity of both processes counts on, with the
mappings and descriptors that it had. In one instant (two threads of a process change places in the parasite) a kill
leaves the parasite's area behind; the next take removes it, so there is never more than one in a process. At the end
the job itself says whether it was harmed. SNAP_TEST_TAKE_KILLS sets the number of random kills (default 200).
"""

from __future__ import annotations

import collections
import contextlib
import importlib
import mmap
import os
import pathlib
import random
import signal
import struct
import sys
import threading
import time
import traceback

import pytest

from checkpoint.kernel import proc
from checkpoint.parasite.infection import AREA_SIZE
from snapshotter.base import faults
from snapshotter.cli.main import run
from snapshotter.manager.stores import open_store
from tests.jobs import Job, reap, tree, wait_until

pytestmark = pytest.mark.requires("root", "wp_async", "rseq_configuration")

PROGRAM = str(pathlib.Path(__file__).parent / "programs" / "self_check.c")
NR_KILLS = int(os.environ.get("SNAP_TEST_TAKE_KILLS", "200"))
NR_ACTIVITIES = 6

OF_OTHER_COMMANDS = {"restore.": "snap rollback", "stub.": "snap rollback", "store.prune": "snap prune"}
POINTS = [name for name in faults.POINTS if not name.startswith(tuple(OF_OTHER_COMMANDS))]
FIRST_TAKE_ONLY = {"track.created", "track.keeper", "track.described", "track.kept"}
"""A later take of the same processes finds the userfaultfd and the keeper that are there already."""


class Watched:
    """A job and what of it must never change."""

    def __init__(self, job):
        self.job = job
        self.pids = tree(job.pid)
        with open(job.directory / "progress", "rb") as file:
            self.view = mmap.mmap(file.fileno(), 4096, prot=mmap.PROT_READ)
        self.tids = {pid: proc.threads(pid) for pid in self.pids}
        self.goes_on("at the start")
        self.maps = {pid: proc.read_maps(pid) for pid in self.pids}
        self.descriptors = {pid: self.read_descriptors(pid) for pid in self.pids}

    def read_descriptors(self, pid):
        return {name: os.readlink(f"/proc/{pid}/fd/{name}") for name in os.listdir(f"/proc/{pid}/fd")}

    def counts(self):
        return struct.unpack_from(f"<{2 * NR_ACTIVITIES}Q", self.view)

    def goes_on(self, when):
        before = self.counts()
        wait_until(
            lambda: all(now > then for then, now in zip(before, self.counts(), strict=True)),
            f"every activity goes on {when}: {before}",
        )

    def left_over(self, pid):
        """Mappings that were not there before; what was there must be."""
        now = proc.read_maps(pid)
        missing = [entry for entry in self.maps[pid] if entry not in now]
        assert not missing, (missing, now)
        return [entry for entry in now if entry not in self.maps[pid]]

    def unharmed(self, when, *, areas=1):
        """All of it; `areas` are how many of the parasite's may be left in a process."""
        for pid in self.pids:
            assert proc.threads(pid) == self.tids[pid], when
            for tid in self.tids[pid]:
                status = proc.read_status(pid, tid)
                assert status.tracer_pid == 0, when
                assert status.state not in "tTZX", f"task {tid} is in state {status.state} {when}"
        self.goes_on(when)
        for pid in self.pids:
            left = self.left_over(pid)
            assert sum(entry.size_bytes for entry in left) <= areas * AREA_SIZE, (when, left)
            assert self.read_descriptors(pid) == self.descriptors[pid], when

    def close(self):
        self.view.close()


@pytest.fixture
def start(job, compile_program, tmp_path, monkeypatch):
    monkeypatch.setenv("SNAP_RUNTIME_DIR", str(tmp_path / "run"))
    with contextlib.ExitStack() as stack:

        def started():
            watched = Watched(job.start([compile_program(PROGRAM)]).wait_ready())
            stack.callback(watched.close)
            return watched

        yield started


def said(job):
    """What the last `snap take` has printed."""
    return job.directory.parent / "said"


def snap_take(job, fault="", *, loaded=None):
    """The pid of a child of ours that is `snap take`. `loaded` gets the names of all modules it has in the end."""
    child = os.fork()
    if child:
        return child
    status = 99
    try:
        with open(said(job), "w") as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            faults.configure(fault)
            status = run(["--store", str(job.store), "take", str(job.pid), "--job", "test"])
            if loaded is not None:
                loaded.write_text("\n".join(sys.modules))
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def take_whole(job):
    status = reap(snap_take(job))
    assert status == 0, said(job).read_text()


@pytest.fixture(scope="module", autouse=True)
def _imported(tmp_path_factory):
    """What a take imports is imported here once: for a child it is there, and 200 takes are a matter of seconds."""
    folder = tmp_path_factory.mktemp("imported")
    job = Job(directory=folder / "job", store=folder / "store")
    job.start([sys.executable, "-S", "-c", "import signal; signal.pause()"])
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SNAP_RUNTIME_DIR", str(folder / "run"))
            assert reap(snap_take(job, loaded=folder / "loaded")) == 0, said(job).read_text()
    finally:
        job.destroy()
    for name in (folder / "loaded").read_text().split():
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    assert threading.active_count() == 1, "a process with threads cannot be forked safely"


@pytest.mark.parametrize("name", POINTS)
def test_killed_at(name, start, job):
    watched = start()
    assert os.WTERMSIG(reap(snap_take(job, f"{name}:kill"))) == signal.SIGKILL, (
        "the first take did not pass it"
    )
    watched.unharmed("after the first take was killed")
    take_whole(job)
    watched.unharmed("after a whole take", areas=0)
    status = reap(snap_take(job, f"{name}:kill"))
    if name in FIRST_TAKE_ONLY:
        assert status == 0, "a later take passes it: it is no longer one of FIRST_TAKE_ONLY"
    else:
        assert status == signal.SIGKILL, "a later take did not pass it"
    watched.unharmed("after a later take was killed")
    take_whole(job)
    watched.unharmed("after the last take", areas=0)
    assert job.finish() == "PASS", job.said()


def test_killed_at_random_instants(start, job):
    watched = start()
    began = time.monotonic()
    take_whole(job)
    take_whole(job)
    usual_s = (time.monotonic() - began) / 2
    seed = random.randrange(1 << 30)
    chance = random.Random(seed)
    ends = collections.Counter()
    for nr in range(NR_KILLS):
        child = snap_take(job)
        pause = chance.random() * usual_s
        time.sleep(pause)
        os.kill(child, signal.SIGKILL)
        ends[reap(child)] += 1
        watched.unharmed(f"after random kill {nr} (seed {seed}, {pause:.4f} s of {usual_s:.4f} s)")
    assert set(ends) <= {signal.SIGKILL, 0}, said(job).read_text()
    assert ends[signal.SIGKILL] > NR_KILLS // 2, ends
    take_whole(job)
    watched.unharmed("after the last take", areas=0)
    store = open_store(job.store, create=False)
    try:
        assert not store.verify().damage
        assert len(store.points("test")) >= 3
    finally:
        store.close()
    assert job.finish() == "PASS", job.said()
