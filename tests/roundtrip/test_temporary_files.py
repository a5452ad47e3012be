"""Temporary files that are gone at the rollback: made again, as they were, wherever their owner might. Others are not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from snapshotter.base.errors import RestoreConflictError
from tests import memory_store
from tests.jobs import reap_all, state, wait_until

pytestmark = pytest.mark.requires("root")

JOB = """
import os, sys, time
os.chdir(sys.argv[1])
if len(sys.argv) > 2:
    os.setgroups([])
    os.setresgid(*[int(sys.argv[2])] * 3)
    os.setresuid(*[int(sys.argv[2])] * 3)
one = os.open("one", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o640)
again = os.open("one", os.O_WRONLY | os.O_APPEND)
shared = os.dup(one)
os.write(one, b"first line\\n")
os.pwrite(one, b"far away", 100_000)
open("ready", "x").close()
while not os.path.exists("go"):
    time.sleep(0.01)
os.write(shared, b"second line\\n")
os.write(again, b"the end")
os.fsync(one)
open("done", "x").close()
time.sleep(1000)
"""


@pytest.fixture(params=["disk", "tmpfs"])
def place(request):
    """A directory that the tests' own temporary one, which may be either, is not in."""
    with tempfile.TemporaryDirectory(dir="/var/tmp" if request.param == "disk" else "/dev/shm") as scratch:
        Path(scratch).chmod(0o1777)
        yield Path(scratch)


@pytest.fixture
def start(place):
    """start(user): the job, ready."""
    started = []

    def run(*user):
        child = subprocess.Popen(
            [sys.executable, "-c", JOB, place, *map(str, user)],
            stdin=-3, stdout=-3, stderr=-3, start_new_session=True,
        )  # fmt: skip
        started.append(child.pid)
        wait_until((place / "ready").exists, "the job ready")
        return child

    yield run
    for pid in started:
        end(pid)


def end(pid):
    if state(pid):
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: reap_all() or not state(pid), "the job gone")


EXPECTED = b"first line\nsecond line\n".ljust(100_000, b"\0") + b"far awaythe end"


def goes_on(place, name="one"):
    (place / "go").touch()
    wait_until((place / "done").exists, "the job has gone on")
    (place / "go").unlink()
    (place / "done").unlink()
    return (place / name).read_bytes()


def test_a_temporary_file_that_is_gone_is_made_again(start, place):
    child = start()
    before = (place / "one").stat()
    point = memory_store.take(child.pid)
    assert goes_on(place) == EXPECTED, "let go on, unharmed"
    end(child.pid)
    for _ in range(2):  # any number of times
        (place / "one").unlink()
        result = memory_store.rollback(point)
        assert sum("is gone; it is made again" in text for text in result.warnings) == 1
        made = (place / "one").stat()
        assert (made.st_mode, made.st_uid, made.st_size) == (before.st_mode, before.st_uid, before.st_size)
        assert made.st_mtime_ns == before.st_mtime_ns
        assert goes_on(place) == EXPECTED
        later = memory_store.take(child.pid)
        end(child.pid)
    # What a rollback has made is found again, and is the job's as it is now.
    result = memory_store.rollback(point)
    assert any("changed since the point" in text for text in result.warnings)
    end(child.pid)
    (place / "one").unlink()
    memory_store.rollback(later)
    assert (place / "one").read_bytes() == EXPECTED


def test_another_file_in_its_place_is_left_alone(start, place):
    child = start()
    point = memory_store.take(child.pid)
    other = place / "other"
    other.write_text("somebody's")
    other.replace(place / "one")
    with pytest.raises(RestoreConflictError, match="was replaced by another"):
        memory_store.rollback(point)
    assert state(child.pid) not in {"", "Z"}
    end(child.pid)
    (place / "one").unlink()
    (place / "one").symlink_to("/etc/passwd")
    with pytest.raises(RestoreConflictError):
        memory_store.rollback(point)
    assert (place / "one").is_symlink()
    assert (place / "other").exists() is False


def test_elsewhere_a_file_that_is_gone_is_missed(start, place):
    place.chmod(0o777)
    child = start()
    point = memory_store.take(child.pid)
    (place / "one").unlink()
    with pytest.raises(RestoreConflictError, match="is gone"):
        memory_store.rollback(point)
    assert state(child.pid) not in {"", "Z"}
    assert not (place / "one").exists()


def test_it_is_made_with_no_more_rights_than_the_job_has(start, place):
    """Its directory is root's by now: the job could not make one there."""
    child = start(1234)
    place.chmod(0o1755)
    point = memory_store.take(child.pid)
    (place / "one").unlink()
    with pytest.raises(RestoreConflictError, match="is gone"):
        memory_store.rollback(point)
    assert state(child.pid) not in {"", "Z"}
    place.chmod(0o777)
    memory_store.rollback(point)
    made = (place / "one").stat()
    assert (made.st_uid, made.st_gid, made.st_mode & 0o7777) == (1234, 1234, 0o640)
    assert goes_on(place) == EXPECTED


def test_one_that_the_job_has_made_and_reads_now_is_made_again(place):
    """As an assembler does with what the compiler wrote."""
    script = 'cd "$0"; echo one >t; echo two >>t; exec 3<t; read x <&3; touch ready; until [ -e go ]; do sleep 0.01; done; read x <&3; echo $x >got; touch done; exec sleep 1000'
    child = subprocess.Popen(
        ["/bin/sh", "-c", script, place], stdin=-3, stdout=-3, stderr=-3, start_new_session=True
    )
    try:
        wait_until((place / "ready").exists, "the job ready")
        point = memory_store.take(child.pid)
        end(child.pid)
        (place / "t").unlink()
        memory_store.rollback(point)
        assert goes_on(place, "got") == b"two\n"
    finally:
        end(child.pid)


def test_one_that_is_only_read_and_older_than_the_job_is_not_kept(place):
    (place / "input").write_text("x")
    os.utime(place / "input")
    time.sleep(1.5)  # start times count in hundredths of a second, and one second is for them
    with open(place / "input") as source:
        child = subprocess.Popen(
            ["/bin/sleep", "1000"], stdin=source, stdout=-3, stderr=-3, start_new_session=True
        )
    try:
        point = memory_store.take(child.pid)
        assert not [name for name in point.image_names() if name.startswith("shmem/")]
        (place / "input").unlink()
        with pytest.raises(RestoreConflictError, match="is gone"):
            memory_store.rollback(point)
    finally:
        end(child.pid)
