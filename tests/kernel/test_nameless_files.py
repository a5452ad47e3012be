"""Descriptors of what has lost its name, and of /proc, where the self-checking programs cannot reach: races, refusals, fallbacks."""

from __future__ import annotations

import os
import pathlib
import signal
import socket
import stat
import subprocess
import threading
from collections.abc import Callable

import pytest

from checkpoint.kernel import descriptors
from checkpoint.resources import files
from snapshotter.base.errors import Finding
from tests.kernel.descriptor_jobs import Restored, child, dump

pytestmark = pytest.mark.requires("root", "kcmp", "pidfd_getfd")


@pytest.fixture
def sleeper():
    process = subprocess.Popen(["sleep", "1000"])
    yield process
    process.kill()
    process.wait()


def findings(prepare) -> str:
    with child(prepare) as pid:
        report: list[Finding] = []
        files.look(pid, report)
        files.look_job([pid], report)
        return " ".join(map(str, report))


def test_a_file_of_a_process_outside_the_job(sleeper):
    def prepare():
        os.open(f"/proc/{sleeper.pid}/stat", os.O_RDONLY)

    with child(prepare) as pid:
        ctx = dump(pid)
    r = Restored(ctx, pid)
    assert os.read(r[3], 100).startswith(b"%d (sleep)" % sleeper.pid)
    assert r.warnings == []
    r.opening.close()
    sleeper.send_signal(signal.SIGKILL)
    sleeper.wait()
    r = Restored(ctx, pid)
    with pytest.raises(ProcessLookupError):
        os.read(r[3], 100)
    assert "has ended" in r.warnings[0]
    r.opening.close()


def test_what_of_proc_is_refused(sleeper):
    assert "another process" in findings(lambda: os.open(f"/proc/{sleeper.pid}/maps", os.O_RDONLY))
    assert "holds state of the kernel" in findings(lambda: os.open("/proc/self/clear_refs", os.O_WRONLY))
    assert "holds state of the kernel" in findings(lambda: os.open("/proc/self/mem", os.O_RDWR))

    def of_a_thread():
        thread = threading.Thread(target=signal.pause, daemon=True)
        thread.start()
        os.open(f"/proc/self/task/{thread.native_id}/stat", os.O_RDONLY)

    assert "single thread" in findings(of_a_thread)


def test_memory_in_a_job_of_several_users_is_for_who_may_open_it():
    def of(pid: int, user: int) -> Callable[[], None]:
        def prepare() -> None:
            os.open(f"/proc/{pid}/maps", os.O_RDONLY)
            os.setuid(user)

        return prepare

    def look(*pids: int) -> list[Finding]:
        report: list[Finding] = []
        files.look_job(pids, report)
        return report

    with child(lambda: None) as roots, child(lambda: os.setuid(65534)) as nobodys:
        with child(of(nobodys, 0)) as pid:
            assert look(roots, nobodys, pid) == []
        with child(of(roots, 65534)) as pid:
            (found,) = look(roots, nobodys, pid)
            assert "may not look into by its own rights" in str(found)
            assert found.pid == pid


def test_a_deleted_directory_whose_name_is_taken(tmp_path):
    def prepare():
        os.mkdir(tmp_path / "gone", 0o710)
        os.chown(tmp_path / "gone", 65534, 65534)
        os.open(tmp_path / "gone", os.O_RDONLY)
        os.rmdir(tmp_path / "gone")

    with child(prepare) as pid:
        ctx = dump(pid)
    for taken in (False, True):
        if taken:
            (tmp_path / "gone").mkdir()
        r = Restored(ctx, pid)
        now = os.fstat(r[3])
        assert (stat.filemode(now.st_mode), now.st_uid, now.st_nlink) == ("drwx--x---", 65534, 0)
        assert os.readlink(f"/proc/self/fd/{r[3]}") == f"{tmp_path}/gone (deleted)"
        assert (now.st_dev == os.stat(tmp_path).st_dev) != taken
        assert os.listdir(tmp_path) == ["gone"] * taken
        r.opening.close()


def test_a_fifo_without_a_name_leaves_no_trace(again, tmp_path):
    def prepare():
        os.mkfifo(tmp_path / "fifo")
        os.open(tmp_path / "fifo", os.O_RDWR)
        os.unlink(tmp_path / "fifo")
        os.write(3, b"kept")

    r = again(prepare)
    assert os.read(r[3], 100) == b"kept"
    assert os.readlink(f"/proc/self/fd/{r[3]}") == f"{tmp_path}/fifo (deleted)"
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("moved", [False, True])
def test_one_of_several_hard_links(again, tmp_path, moved):
    def prepare():
        os.open(tmp_path / "one", os.O_RDWR | os.O_CREAT)
        os.link(tmp_path / "one", tmp_path / "two")
        os.unlink(tmp_path / "one")
        if moved:
            (tmp_path / "below").mkdir()

    with child(prepare) as pid:
        ctx = dump(pid)
    path = tmp_path / "two"
    if moved:
        path = path.rename(tmp_path / "below" / "three")
    r = Restored(ctx, pid)
    assert os.path.samestat(os.fstat(r[3]), path.stat())
    r.opening.close()


def test_a_hidden_address_without_the_right_to_hide_it(again, tmp_path, monkeypatch):
    """It is bound in its old place for a moment; nothing stays there."""
    monkeypatch.chdir(tmp_path)

    def refuse() -> int:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(descriptors, "detached_tmpfs", refuse)
    address = pathlib.Path(tmp_path, "s")

    def prepare():
        server = socket.socket(socket.AF_UNIX)
        server.bind(str(address))
        server.listen(1)
        address.unlink()
        return server

    r = again(prepare)
    assert r.socket(3).getsockname() == str(address)
    assert os.listdir(tmp_path) == []
