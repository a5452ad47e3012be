"""What the kernel would refuse only once the old job is dead is asked before; the dry run refuses the same."""

from __future__ import annotations

import errno
import os
import re
import resource
import subprocess
import sys

import pytest

from checkpoint import room
from checkpoint.kernel import proc
from checkpoint.resources import scheduling
from checkpoint.resources.files import pipe, timerfd
from snapshotter.base.errors import PermissionDeniedError, RestoreConflictError, SnapshotterError
from tests import memory_store
from tests.jobs import is_running, state, wait_until

pytestmark = pytest.mark.requires("root")


def refused(pid, point, kind, match, **options) -> None:
    """By the dry run and by the rollback, with the same words; the very job runs on."""
    before = proc.read_stat(pid).start_time_ticks
    texts = []
    for dry_run in (True, False):
        with pytest.raises(kind, match=match) as caught:
            memory_store.rollback(point, dry_run=dry_run, **options)
        texts.append(str(caught.value))
    # How many tasks there are changes from moment to moment.
    assert re.sub(r"\d{9,}", "", texts[0]) == re.sub(r"\d{9,}", "", texts[1])
    assert proc.read_stat(pid).start_time_ticks == before
    assert is_running(pid)


def ready(tmp_path):
    wait_until((tmp_path / "ready").exists, "ready")


def running(start, tmp_path, code):
    pid = start(
        sys.executable,
        "-c",
        f"import fcntl, os, time\n{code}\nopen('ready', 'w').close()\nwhile True: time.sleep(1)",
    )
    ready(tmp_path)
    return pid


LOCKS = {
    "flock": "f = open('data', 'w'); fcntl.flock(f, fcntl.LOCK_EX)",
    "record": "f = open('data', 'w'); fcntl.lockf(f, fcntl.LOCK_EX, 10, 5)",
    "ofd": "import struct; f = open('data', 'w'); fcntl.fcntl(f, 37, struct.pack('=hh4xqqi4x', 1, 0, 5, 10, 0))",
}


@pytest.mark.parametrize("kind", LOCKS)
def test_a_file_that_somebody_else_has_locked(start, tmp_path, kind):
    pid = running(start, tmp_path, LOCKS[kind])
    point = memory_store.take(pid)
    memory_store.rollback(point, dry_run=True)  # the old job's own lock is in nobody's way
    # The living job has let go of its file since, and another process has it.
    with open(tmp_path / "data") as file:
        place = os.fstat(file.fileno())
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    other = subprocess.Popen(
        [sys.executable, "-c", f"import fcntl\n{LOCKS[kind]}\nprint(flush=True)\ninput()"],
        cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    with other:
        other.stdout.readline()
        assert os.stat(tmp_path / "data").st_ino == place.st_ino
        for dry_run in (True, False):
            with pytest.raises(RestoreConflictError, match="another process has locked it"):
                memory_store.rollback(point, dry_run=dry_run)
        other.stdin.close()
    memory_store.rollback(point)


def test_a_lock_elsewhere_in_the_file_is_in_nobodys_way(start, tmp_path):
    pid = running(start, tmp_path, LOCKS["record"])
    point = memory_store.take(pid)
    other = subprocess.Popen(
        [sys.executable, "-c", "import fcntl\nf = open('data', 'r+')\nfcntl.lockf(f, fcntl.LOCK_EX, 5, 20)\nprint(flush=True)\ninput()"],
        cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    with other:
        other.stdout.readline()
        memory_store.rollback(point)
        other.stdin.close()


def test_a_descriptor_beyond_the_limit(start, tmp_path):
    pid = running(start, tmp_path, "os.dup2(0, 900)")
    point = memory_store.take(pid)
    if proc.read_status(os.getpid()).cap_effective & room._CAP_SYS_RESOURCE:
        pytest.skip("with CAP_SYS_RESOURCE every limit can be raised")
    child = os.fork()
    if child == 0:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (512, 512))
            refused(pid, point, RestoreConflictError, "descriptor 900, and snap may only give 512")
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    assert is_running(pid)


def test_too_many_descriptors_at_once(start, tmp_path, monkeypatch):
    pid = running(start, tmp_path, "")
    point = memory_store.take(pid)
    monkeypatch.setattr(room, "_own_limits", lambda: (60, resource.RLIM_INFINITY))
    refused(pid, point, RestoreConflictError, "descriptors open at once, and may have 60")


def test_memory_that_is_not_there(start, tmp_path, monkeypatch):
    pid = running(start, tmp_path, "kept = os.urandom(32 << 20)")
    point = memory_store.take(pid)
    monkeypatch.setattr(room, "_resident_bytes", lambda _pid: 1 << 20)
    monkeypatch.setattr(room, "_free_bytes", lambda: 16 << 20)
    refused(pid, point, RestoreConflictError, r"17\.0 MiB are free")
    memory_store.rollback(point, allow=frozenset({"little-memory"}))


def test_the_old_jobs_memory_is_free_again(start, tmp_path, monkeypatch):
    pid = running(start, tmp_path, "kept = os.urandom(32 << 20)")
    point = memory_store.take(pid)
    monkeypatch.setattr(room, "_free_bytes", lambda: 16 << 20)
    memory_store.rollback(point)


def test_too_many_tasks(start, tmp_path, monkeypatch):
    pid = running(start, tmp_path, "")
    point = memory_store.take(pid)
    monkeypatch.setattr(room, "_nr_threads", lambda _pid: -(1 << 30))
    refused(pid, point, RestoreConflictError, "kernel.threads-max is")


def denied(*_args, **_options):
    raise OSError(errno.EPERM, os.strerror(errno.EPERM))


def test_a_pipe_that_may_not_be_as_large(start, tmp_path, monkeypatch):
    pid = running(start, tmp_path, "r, w = os.pipe(); fcntl.fcntl(w, 1031, 1 << 17)")
    point = memory_store.take(pid)
    real = pipe.fcntl.fcntl

    def small(fd, call, *args):
        return denied() if call == 1031 else real(fd, call, *args)

    monkeypatch.setattr(pipe.fcntl, "fcntl", small)
    refused(pid, point, SnapshotterError, "cannot make a pipe of 131072 bytes")


def test_a_timer_whose_clock_is_not_allowed(start, tmp_path, monkeypatch):
    pid = running(start, tmp_path, "import ctypes; ctypes.CDLL(None).timerfd_create(1, 0)")
    point = memory_store.take(pid)
    monkeypatch.setattr(timerfd.descriptors, "timerfd_create", denied)
    refused(pid, point, SnapshotterError, "cannot make a timer on clock 1")


def test_a_priority_that_may_not_be_given(start, tmp_path, monkeypatch):
    pid = running(start, tmp_path, "os.setpriority(os.PRIO_PROCESS, 0, -5)")
    point = memory_store.take(pid)
    real = scheduling.ksys.syscall
    monkeypatch.setattr(
        scheduling.ksys,
        "syscall",
        lambda name, *args: denied() if name == "sched_setattr" else real(name, *args),
    )
    refused(pid, point, PermissionDeniedError, "scheduling policy or priority")
    monkeypatch.undo()
    memory_store.rollback(point)
    assert os.getpriority(os.PRIO_PROCESS, pid) == -5
    assert state(pid)
