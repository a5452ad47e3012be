"""What must hold before a restore touches anything: files as they were, pages inside VMAs, the kernel's vdso."""

from __future__ import annotations

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile

import pytest

from checkpoint import restore
from checkpoint.resources.memory import vdso
from images import codec
from snapshotter.base.errors import RestoreConflictError, SnapshotterError, VerificationError
from tests import memory_store
from tests.jobs import wait_until

pytestmark = pytest.mark.requires("root")


@pytest.fixture
def taken(tmp_path):
    """A running copy of sleep, a point of it, and its executable."""
    program = tmp_path / "napper"
    shutil.copy("/bin/sleep", program)
    child = subprocess.Popen([program, "1000"], stdin=-3, stdout=-3, stderr=-3, start_new_session=True)
    try:
        yield child, memory_store.take(child.pid), program
    finally:
        child.kill()
        child.wait()


def is_unharmed(child) -> bool:
    return child.poll() is None and os.readlink(f"/proc/{child.pid}/exe").endswith(
        ("napper", "napper (deleted)")
    )


def test_replaced_executable_is_a_conflict(taken):
    child, point, program = taken
    other = program.with_suffix(".new")
    other.write_bytes(program.read_bytes() + b"more")
    other.chmod(0o755)
    other.replace(program)
    with pytest.raises(RestoreConflictError, match="napper"):
        memory_store.rollback(point)
    assert is_unharmed(child)


def test_executable_installed_again_is_no_conflict(taken):
    child, point, program = taken
    other = program.with_suffix(".new")
    shutil.copy(program, other)
    other.replace(program)
    memory_store.rollback(point)
    assert os.readlink(f"/proc/{child.pid}/exe") == str(program)
    os.kill(child.pid, signal.SIGKILL)


def test_missing_executable_is_a_conflict(taken):
    child, point, program = taken
    program.unlink()
    with pytest.raises(RestoreConflictError, match="cannot be found"):
        memory_store.rollback(point)
    assert is_unharmed(child)


def test_another_kernels_vdso_is_a_conflict(taken, monkeypatch):
    child, point, _ = taken
    layout = vdso.own_layout()
    assert layout is not None
    monkeypatch.setattr(vdso, "_own", [vdso.Layout(layout.parts, b"\x12" * 20)])
    with pytest.raises(RestoreConflictError, match="vdso"):
        memory_store.rollback(point)
    assert is_unharmed(child)


def test_stray_page_is_a_damaged_point(taken):
    child, point, _ = taken
    name = f"mm/{child.pid}"
    mm = codec.parse(name, point.image(name))
    point.runs = lambda _: [(mm.vmas[0].start // 4096 - 5, 1)]
    with pytest.raises((VerificationError, SnapshotterError), match="outside all VMAs"):
        memory_store.rollback(point)
    assert is_unharmed(child)


SHARING = """
import mmap, os, sys, time
os.chdir(os.path.dirname(sys.argv[1]))
area = mmap.mmap(os.open(sys.argv[1], os.O_RDWR), 4096)
library = mmap.mmap(os.open(sys.argv[1] + ".library", os.O_RDONLY), 4096, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
# The mappings alone: nothing else tells which files they are of.
for fd in os.listdir("/proc/self/fd"):
    if int(fd) > 2:
        try: os.close(int(fd))
        except OSError: pass
open("ready", "w").close()
while not os.path.exists("go"): time.sleep(0.01)
area[:4] = b"mine"
with open("done.tmp", "wb") as out: out.write(library[:7])
os.rename("done.tmp", "done")
time.sleep(1000)
"""


@pytest.fixture
def sharing(disk):
    """A job that maps a file of a disk shared and writable, another privately, in a directory below; and its point."""
    place = disk / "place"
    place.mkdir()
    data = place / "data"
    data.write_bytes(b"data".ljust(4096))
    (place / "data.library").write_bytes(b"library".ljust(4096))
    child = subprocess.Popen(
        [sys.executable, "-c", SHARING, data], stdin=-3, stdout=-3, stderr=-3, start_new_session=True
    )
    try:
        wait_until((place / "ready").exists, "ready")
        yield child, memory_store.take(child.pid), data
    finally:
        child.kill()
        child.wait()


@pytest.fixture
def disk():
    """A directory on a file system that is no tmpfs."""
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="snap-test-") as folder:
        yield pathlib.Path(folder)


def test_a_symbolic_link_is_not_followed_to_another_file(sharing, disk):
    child, point, data = sharing
    secret = disk / "secret"
    secret.write_bytes(b"secret".ljust(4096))
    data.rename(disk / "aside")
    data.symlink_to(secret)
    with pytest.raises(RestoreConflictError, match=r"place/data.*symbolic link"):
        memory_store.rollback(point)
    assert child.poll() is None
    data.unlink()
    secret.rename(data)
    with pytest.raises(RestoreConflictError, match=r"place/data.*was replaced by another"):
        memory_store.rollback(point)
    assert child.poll() is None


def test_a_directory_that_became_a_link_is_not_followed(sharing, disk):
    child, point, data = sharing
    data.parent.rename(disk / "moved")
    data.parent.symlink_to(disk / "moved")
    with pytest.raises(RestoreConflictError, match="no directory any more"):
        memory_store.rollback(point)
    assert child.poll() is None


def test_a_file_swapped_after_the_check_is_not_mapped(sharing, disk, monkeypatch):
    _, point, data = sharing
    secret = disk / "secret"
    secret.write_bytes(b"secret".ljust(4096))

    def swap(at):
        if at == "restore.killed":
            for name in ("data", "data.library"):
                (data.parent / name).rename(disk / name)
                (data.parent / name).symlink_to(secret)

    monkeypatch.setattr(restore.faults, "point", swap)
    memory_store.rollback(point)
    (data.parent / "go").touch()
    wait_until((data.parent / "done").exists, "the job has written")
    assert secret.read_bytes()[:6] == b"secret"
    assert (disk / "data").read_bytes()[:4] == b"mine"
    assert (data.parent / "done").read_bytes() == b"library"


def test_nothing_stays_open(sharing):
    _, point, data = sharing
    before = os.listdir("/proc/self/fd")
    restore.plan(point.image, point.image_names(), point)
    assert os.listdir("/proc/self/fd") == before
    data.unlink()
    with pytest.raises(RestoreConflictError, match="gone"):
        memory_store.rollback(point)
    assert os.listdir("/proc/self/fd") == before


def test_what_is_written_to_a_shared_file_meanwhile_is_said(sharing):
    _, point, data = sharing
    assert not any(str(data) in text for text in memory_store.rollback(point, dry_run=True).warnings)
    with data.open("r+b") as file:
        file.write(b"newer")
    os.utime(data, (1, 1))
    warnings = memory_store.rollback(point, dry_run=True).warnings
    assert any(str(data) in text and "shared and writable" in text for text in warnings)
