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
from tests.jobs import reap_all, signal_tree, state, tree, wait_until

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
    restore.plan(point.image, point.image_names(), point)
    assert os.listdir("/proc/self/fd") == before
    data.with_suffix(".library").unlink()
    with pytest.raises(RestoreConflictError, match="cannot be found"):
        memory_store.rollback(point)
    assert os.listdir("/proc/self/fd") == before


def test_a_small_file_that_is_gone_is_made_again(sharing):
    child, point, data = sharing
    data.write_bytes(b"later".ljust(4096))
    memory_store.rollback(point)
    assert data.read_bytes()[:5] == b"later", "what is there is the job's, as it is"
    data.chmod(0o640)
    later = memory_store.take(child.pid)
    for again in (later, later, point):  # any number of times, the one made last included
        kill_all(child.pid)
        if again is later:
            data.unlink()
        result = memory_store.rollback(again)
        assert any("made again" in text for text in result.warnings) == (again is later)
        assert data.stat().st_mode & 0o7777 == 0o640
        assert data.read_bytes()[:5] == b"later"
    (data.parent / "go").touch()
    wait_until((data.parent / "done").exists, "the job has written")
    assert data.read_bytes()[:4] == b"mine"
    kill_all(child.pid)
    other = data.with_name("other")
    other.write_bytes(b"somebody's".ljust(4096))
    other.replace(data)
    with pytest.raises(RestoreConflictError, match="was replaced by another"):
        memory_store.rollback(later)


def test_what_is_written_to_a_shared_file_meanwhile_is_said(sharing):
    child, point, data = sharing
    said = f"{data} is mapped shared and writable: the job gets the file as it is at the rollback"
    # It lives, and may write into a page that was dirty already.
    assert said in memory_store.rollback(point, dry_run=True).warnings
    child.kill()
    child.wait()
    assert not any(str(data) in text for text in memory_store.rollback(point, dry_run=True).warnings)
    os.utime(data, (1, 1))
    warnings = memory_store.rollback(point, dry_run=True).warnings
    assert any(text.startswith(said) and "modification time" in text for text in warnings)


SHARED_MEMORY = """
import os, sys, time
from multiprocessing import shared_memory
os.chdir(sys.argv[1])
shm = shared_memory.SharedMemory(create=True, size=3 * 4096)
with open("name", "w") as f: f.write(shm.name)
out = os.open("n", os.O_WRONLY | os.O_CREAT)
n = 0
while True:
    if int.from_bytes(shm.buf[:8], "little") != n or shm.buf[-1] != n % 251:
        open("bad", "w").close()
    n += 1
    shm.buf[:8] = n.to_bytes(8, "little")
    shm.buf[-1] = n % 251
    os.pwrite(out, b"%08d" % n, 0)
    time.sleep(0.003)
"""


def number(path: pathlib.Path) -> int:
    try:
        return int(path.read_text())
    except (FileNotFoundError, ValueError):
        return 0


@pytest.fixture
def counting(tmp_path):
    """A job that keeps a number in private and in POSIX shared memory: (pid, its directory, path of the memory)."""
    child = subprocess.Popen(
        [sys.executable, "-c", SHARED_MEMORY, tmp_path],
        stdin=-3,
        stdout=-3,
        stderr=-3,
        start_new_session=True,
    )
    child.returncode = 0
    try:
        wait_until(lambda: number(tmp_path / "n") > 5, "counting")
        shm = pathlib.Path("/dev/shm") / (tmp_path / "name").read_text()
        yield child.pid, tmp_path, shm
    finally:
        kill_all(child.pid)
        shm.unlink(missing_ok=True)


def kill_all(root: int) -> None:
    # Children first: Python's resource tracker removes the memory when it sees its parent go.
    signal_tree(root)
    wait_until(lambda: reap_all() or not state(root), "the job gone")


def goes_on(pid: int, folder: pathlib.Path, low: int, high: int) -> None:
    """From the point's number, and with both numbers the same."""
    wait_until(lambda: low <= number(folder / "n") < high, "counting from the point")
    at = number(folder / "n")
    wait_until(lambda: number(folder / "n") > at + 20 or (folder / "bad").exists(), "counting on")
    assert not (folder / "bad").exists(), "private and shared memory are of different times"


@pytest.mark.parametrize("before", ["alive", "killed", "unlinked"])
def test_posix_shared_memory_is_the_points(counting, before):
    pid, folder, shm = counting
    shm.chmod(0o640)
    os.chown(shm, 1234, 2345)
    low = number(folder / "n")
    point = memory_store.take(pid)
    high = number(folder / "n") + 50
    wait_until(lambda: number(folder / "n") > high + 50, "counting on")
    known = []
    for _ in range(3):  # any number of times, also when it had to be made anew
        if before != "alive":
            kill_all(pid)
        if before == "unlinked":
            shm.unlink()
        inode = shm.stat().st_ino if shm.exists() else 0
        known.append(memory_store.rollback(point, known_tasks=known).tasks)
        goes_on(pid, folder, low, high)
        node = shm.stat()
        assert not inode or node.st_ino == inode
        assert (node.st_uid, node.st_gid, node.st_mode & 0o7777) == (1234, 2345, 0o640)
        assert str(shm).encode() in pathlib.Path(f"/proc/{pid}/maps").read_bytes()
        wait_until(lambda: number(folder / "n") > high + 50, "counting on")
    # What was made anew is the same object for the points that come after, too.
    later = memory_store.take(pid)
    low, high = number(folder / "n") - 20, number(folder / "n") + 50
    wait_until(lambda: number(folder / "n") > high + 50, "counting on")
    kill_all(pid)
    shm.unlink()
    memory_store.rollback(later)
    goes_on(pid, folder, low, high)
    memory_store.rollback(point, known_tasks=[memory_store.rollback(later, known_tasks=[_now(pid)]).tasks])


def _now(pid: int) -> dict[int, int]:
    return {
        one: int(pathlib.Path(f"/proc/{one}/stat").read_text().rsplit(")", 1)[1].split()[19])
        for one in tree(pid)
    }


def test_another_file_of_that_name_is_left_alone(counting):
    pid, _, shm = counting
    point = memory_store.take(pid)
    shm.unlink()
    shm.write_bytes(b"somebody's")
    with pytest.raises(RestoreConflictError, match=rf"{shm}.*another file has the name"):
        memory_store.rollback(point)
    shm.unlink()
    secret = shm.with_name(shm.name + "-other")
    secret.write_bytes(b"somebody's")
    try:
        shm.symlink_to(secret)
        with pytest.raises(RestoreConflictError, match=f"{shm}"):
            memory_store.rollback(point)
        assert secret.read_bytes() == b"somebody's"
    finally:
        secret.unlink()
    assert state(pid) not in {"", "Z"}
