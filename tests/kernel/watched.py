"""A job that checks itself (programs/self_check.c) watched from outside, and `snap` as a child that can be killed: for tests of both."""

from __future__ import annotations

import contextlib
import importlib
import mmap
import os
import pathlib
import struct
import sys
import threading
import traceback

import pytest

from checkpoint import finisher
from checkpoint.kernel import proc
from checkpoint.parasite.infection import AREA_SIZE
from snapshotter.base import faults
from snapshotter.cli.main import run
from tests.jobs import Job, reap, tree, wait_until

PROGRAM = str(pathlib.Path(__file__).parent / "programs" / "self_check.c")
NR_ACTIVITIES = 6


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

    def runs_as_before(self, when):
        """After a rollback: the same processes and threads, running; they and their files are not the same objects."""
        for pid in self.pids:
            assert proc.threads(pid) == self.tids[pid], when
            assert proc.read_status(pid).tracer_pid == 0, when
        self.goes_on(when)
        for pid in self.pids:
            self.maps[pid] = proc.read_maps(pid)
            assert self.read_descriptors(pid).keys() == self.descriptors[pid].keys(), when
            self.descriptors[pid] = self.read_descriptors(pid)

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


def said(job):
    """What the last `snap take` has printed."""
    return job.directory.parent / "said"


def snap_child(job, *line, fault="", loaded=None):
    """The pid of a child of ours that is `snap LINE`. `loaded` gets the names of all modules it has in the end."""
    child = os.fork()
    if child:
        return child
    status = 99
    try:
        with open(said(job), "w") as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            faults.configure(fault)
            status = run(["--store", str(job.store), *line])
            if loaded is not None:
                loaded.write_text("\n".join(sys.modules))
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def snap_take(job, fault="", *, loaded=None):
    """snap_child that takes the job."""
    return snap_child(job, "take", str(job.pid), "--job", "test", fault=fault, loaded=loaded)


def finished():
    """Wait until what a killed snap had begun is finished: the finisher is a child of ours by then."""
    for pid in tree(os.getpid())[1:]:
        with contextlib.suppress(FileNotFoundError):
            if os.readlink(f"/proc/{pid}/exe") == str(finisher.BINARY):
                reap(pid)


def take_whole(job):
    """A take that must succeed."""
    status = reap(snap_take(job))
    assert status == 0, said(job).read_text()


def import_what_a_child_needs(folder, work):
    """What a command imports is imported here once: for a child it is there, and 200 of them are a matter of seconds.

    Args:
        folder: for a job and a store of its own.
        work: called with the job and the file that gets the names of the modules; runs the command as a child.
    """
    job = Job(directory=folder / "job", store=folder / "store")
    job.start([sys.executable, "-S", "-c", "import signal; signal.pause()"])
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SNAP_RUNTIME_DIR", str(folder / "run"))
            work(job, folder / "loaded")
    finally:
        job.destroy()
    for name in (folder / "loaded").read_text().split():
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    left = [one.name for one in threading.enumerate() if one is not threading.main_thread()]
    assert not left, f"a process with threads cannot be forked safely: {left}"
