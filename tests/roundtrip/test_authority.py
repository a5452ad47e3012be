"""The rule: a rollback gives a process no access that its credentials could not obtain now, but for what SECURITY.md lists.

One matrix: a job of nobody holds one thing (programs/holds.c), the point is taken, root changes something about that thing, and the
point is rolled back over the living job. Either it is a conflict that names the path (the job goes on, nothing is made,
root's file is untouched), or the job has it again.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
from dataclasses import dataclass

import pytest

from checkpoint.kernel import rights
from checkpoint.kernel import sys as ksys
from checkpoint.kernel.fdinfo import parse_fdinfo
from checkpoint.kernel.sys import syscall
from checkpoint.model.holders import Rights
from checkpoint.resources import files as job_files
from snapshotter.base.errors import RestoreConflictError
from tests import memory_store
from tests.jobs import reap_all, state, wait_until

pytestmark = pytest.mark.requires("root")

NOBODY = 65534
REGULAR = ("r", "w", "rw", "private", "code", "shared", "flight-r", "flight-rw")
DIRECTORIES = ("dir", "cwd", "root", "flight-dir")
HOLDERS = (
    *REGULAR,
    *DIRECTORIES,
    "path",
    "flight-path",
    "fifo",
    "flight-fifo",
    "device",
    "inotify",
    "node",
    "exe",
)


@pytest.fixture(scope="module")
def program():
    """The job's program, where nobody may run it; static, so that it does inside of a changed root, too."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        pathlib.Path(folder).chmod(0o755)
        target = pathlib.Path(folder) / "holds"
        source = pathlib.Path(__file__).parent / "programs" / "holds.c"
        subprocess.run(
            ["gcc", "-static", "-O1", "-Wall", "-Wextra", "-Werror", "-o", target, source], check=True
        )
        yield target


@dataclass
class Held:
    """A job that holds what is at `path`, in a directory of its own inside of `top`."""

    what: str
    top: pathlib.Path
    path: pathlib.Path
    pid: int
    point: memory_store.MemoryPoint
    program: pathlib.Path
    killed: bool = False

    @property
    def folder(self) -> pathlib.Path:
        return self.path.parent

    def has_it(self) -> bool:
        """Whether the job, rolled back, holds what it held."""
        kind = self.what.removeprefix("flight-")
        if kind in {"cwd", "root"}:
            return os.path.samefile(f"/proc/{self.pid}/{kind}", self.path)
        if kind in {"private", "code", "shared", "exe"}:
            maps = pathlib.Path(f"/proc/{self.pid}/maps").read_text()
            return f" {self.path}\n" in maps
        if self.what.startswith("flight-"):
            received = self.received()
            try:
                return os.path.samefile(f"/proc/self/fd/{received}", self.path)
            finally:
                os.close(received)
        if kind == "inotify":
            return (
                f"ino:{self.path.stat().st_ino:x} " in pathlib.Path(f"/proc/{self.pid}/fdinfo/3").read_text()
            )
        if kind == "node":
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(str(self.path))
            return True
        with open(f"/proc/{self.pid}/fdinfo/3", "rb") as file:
            assert parse_fdinfo(file.read()) is not None
        return os.path.samefile(f"/proc/{self.pid}/fd/3", self.path)

    def received(self) -> int:
        """A descriptor of what is in the socket's queue; the caller closes it."""
        pidfd = os.pidfd_open(self.pid)
        with socket.socket(fileno=ksys.pidfd_getfd(pidfd, 5)) as end:
            os.close(pidfd)
            _, ancillary, _, _ = end.recvmsg(1, socket.CMSG_SPACE(4), socket.MSG_PEEK)
        found = array.array("i")
        found.frombytes(ancillary[0][2])
        return found[0]


def make(what: str, path: pathlib.Path, program: pathlib.Path, mode: int) -> None:
    """What the job will hold: root's, open to all or to root alone."""
    kind = what.removeprefix("flight-")
    if kind in {"dir", "cwd", "root"}:
        path.mkdir()
        mode |= 0o111 if mode & 0o006 else 0o100
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        os.mknod(path, 0o020600, os.makedev(1, 3))
    elif kind == "exe":
        shutil.copy(program, path)
        mode |= 0o111
    elif kind not in {"node", "ghost"}:
        path.write_bytes(b"x" * 4096)
    if kind != "node":
        path.chmod(mode)


@pytest.fixture
def hold(program):
    """hold(what, handed): the job, taken."""
    stack = contextlib.ExitStack()
    pids = []

    def run(what: str, *, handed: bool = False, sticky: bool = False, own: bool = False) -> Held:
        top = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/var/tmp")))
        top.chmod(0o755)
        folder = top / "folder"
        folder.mkdir()
        folder.chmod(0o1777 if sticky else 0o755 if handed else 0o777)
        path = folder / "thing"
        if what != "ghost":
            make(what, path, program, 0o600 if handed else 0o666)
        if own:
            os.chown(path, NOBODY, NOBODY)
        command = [path if what == "exe" else program, what, path, "1" if handed else "0"]
        child = subprocess.Popen(
            command, stdin=-3, stdout=subprocess.PIPE, stderr=-3, cwd="/", start_new_session=True
        )
        child.returncode = 0
        pids.append(child.pid)
        assert child.stdout is not None
        assert child.stdout.read(5) == b"ready"
        held = Held(what, top, path, child.pid, None, program)
        held.point = memory_store.take(child.pid)
        stack.callback(child.stdout.close)
        return held

    yield run
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    wait_until(lambda: reap_all() or not any(map(state, pids)), "the jobs gone")
    stack.close()


# -- what root does in between ----------------------------------------------------------------------------------


def nothing(held: Held) -> None:
    """The control."""


def owner(held: Held) -> None:
    os.chown(held.path, 1234, 1234)
    held.path.chmod(0o700 if held.what in DIRECTORIES else 0o600)


def mode(held: Held) -> None:
    held.path.chmod(0o700 if held.path.is_dir() else 0o600)


def again(held: Held) -> None:
    """Removes it and makes it anew, open to all."""
    if held.path.is_dir():
        held.path.rmdir()
    else:
        held.path.unlink()
    make_anew(held)


def make_anew(held: Held) -> None:
    if held.what == "node":
        held.path.write_text("root's")
    else:
        make(held.what, held.path, held.program, 0o666)


def kill(held: Held) -> None:
    os.kill(held.pid, signal.SIGKILL)
    wait_until(lambda: reap_all() or not state(held.pid), "the job gone")
    held.killed = True


def reused(held: Held) -> None:
    """The job ends, and what is made anew, open to all, has the inode number that it was."""
    before = held.path.stat().st_ino
    kill(held)
    again(held)
    for spare in range(200):  # the lowest free number of its group is next
        if held.path.lstat().st_ino == before:
            return
        held.path.rename(held.top / f"spare{spare}")
        make_anew(held)
    kind = subprocess.run(["stat", "-f", "-c", "%T", held.top], capture_output=True, text=True, check=True)
    assert "ext" not in kind.stdout, "ext4 gives the inode number again"
    pytest.skip(f"{kind.stdout.strip()} does not give an inode number again")


def reowned(held: Held) -> None:
    """The job ends, and root takes the file for itself."""
    kill(held)
    os.chown(held.path, 0, 0)
    held.path.chmod(0o700 if held.path.is_dir() else 0o600)


def replaced(held: Held) -> None:
    held.path.rename(held.top / "old")
    make(held.what, held.path, held.program, 0o644)
    if held.what == "node":
        held.path.write_text("root's")
    if held.what in {"exe", "private", "code"}:
        held.path.write_bytes(b"y" * 5000)


def link(held: Held) -> None:
    secret = held.top / "secret"
    make(held.what, secret, held.program, 0o600)
    if held.path.is_dir():
        held.path.rmdir()
    else:
        held.path.unlink()
    held.path.symlink_to(secret)


def directory(held: Held) -> None:
    held.folder.rename(held.top / "old")
    held.folder.mkdir(0o777)
    make(held.what, held.path, held.program, 0o644)
    if held.what in {"exe", "private", "code", "node"}:
        held.path.write_bytes(b"y" * 5000)


def directory_link(held: Held) -> None:
    held.folder.rename(held.top / "old")
    held.folder.symlink_to("old")


def closed(held: Held) -> None:
    held.folder.chmod(0o700)


def deleted(held: Held) -> None:
    if held.path.is_dir():
        held.path.rmdir()
    else:
        held.path.unlink()


CHANGES = (owner, mode, reowned, reused, replaced, link, directory, directory_link, closed, deleted)
COMES_BACK = {
    ("path", reowned), ("flight-path", reowned),
    ("path", owner), ("path", mode), ("flight-path", owner), ("flight-path", mode),  # a place only, which it may still reach
    ("exe", reused),  # the same program, by its build id, which he may run
    ("device", reused),  # every node of that number is the same device
    ("fifo", reused), ("flight-fifo", reused),  # another one of the same owner and mode does as well
    ("node", deleted),  # its own, in a directory in which it may make it
    ("node", mode),  # its own as well: it makes it again as it was
}  # fmt: skip
OTHER_WARNS = {("cwd", reused), ("cwd", replaced), ("cwd", directory)}
"""Another working directory, which it may enter: a warning."""


def untouched(held: Held) -> list[tuple[str, int, int, int]]:
    found = []
    for place, folders, files in os.walk(held.top):
        for name in (*folders, *files):
            info = os.lstat(os.path.join(place, name))
            found.append((os.path.join(place, name), info.st_ino, info.st_uid, info.st_mode))
    return sorted(found)


def refused(held: Held) -> RestoreConflictError:
    def born() -> str:
        return "" if held.killed else pathlib.Path(f"/proc/{held.pid}/stat").read_text().split()[21]

    before, was_born = untouched(held), born()
    with pytest.raises(RestoreConflictError) as error:
        memory_store.rollback(held.point)
    assert str(held.folder) in str(error.value), "names the path"
    assert error.value.hint, "says what to do"
    assert born() == was_born, "the job goes on"
    assert not held.killed or not state(held.pid), "nothing is made"
    assert untouched(held) == before
    return error.value


@pytest.mark.parametrize("what", HOLDERS)
def test_what_nobody_may_open_comes_back_as_long_as_he_may(hold, what):
    held = hold(what)
    memory_store.rollback(held.point)
    assert held.has_it()


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("what", HOLDERS)
def test_access_that_is_gone_does_not_come_back(hold, what, change):
    held = hold(what)
    change(held)
    if (what, change) in COMES_BACK | OTHER_WARNS:
        result = memory_store.rollback(held.point)
        assert held.has_it()
        assert (what, change) not in OTHER_WARNS or any(
            "another directory" in text for text in result.warnings
        )
    else:
        refused(held)


HANDED = (
    "r",
    "w",
    "rw",
    "shared",
    "private",
    "dir",
    "fifo",
    "device",
    "inotify",
    "flight-r",
    "flight-rw",
    "cwd",
    "path",
)


@pytest.mark.parametrize("what", HANDED)
def test_what_root_had_opened_and_handed_down_comes_back_unchanged(hold, what):
    """A log of root's in a server that dropped its rights."""
    held = hold(what, handed=True)
    memory_store.rollback(held.point)
    assert held.has_it()


@pytest.mark.parametrize(
    "change",
    (owner, mode, reused, replaced, link, directory_link, closed, deleted),
    ids=lambda one: one.__name__,
)
@pytest.mark.parametrize("what", ("r", "rw", "shared", "dir", "fifo", "inotify", "flight-rw"))
def test_what_was_handed_down_does_not_come_back_when_it_changed(hold, what, change):
    held = hold(what, handed=True)
    if change is mode:  # any change, also one that looks harmless
        held.path.chmod(0o640)
    else:
        change(held)
    refused(held)


def lease(held: Held) -> int:
    pidfd = os.pidfd_open(held.pid)
    fd = ksys.pidfd_getfd(pidfd, 3)
    os.close(pidfd)
    try:
        return fcntl.fcntl(fd, fcntl.F_GETLEASE)
    finally:
        os.close(fd)


@pytest.mark.parametrize("killed", [False, True])
def test_a_lease_comes_back_to_the_owner_of_the_file(hold, killed):
    held = hold("lease", own=True)
    if killed:
        kill(held)
    memory_store.rollback(held.point)
    assert lease(held) == fcntl.F_RDLCK


@pytest.mark.parametrize("killed", [False, True])
def test_a_lease_of_a_file_that_belongs_to_somebody_else_now_does_not(hold, killed):
    """He may read it still, but take no lease (fcntl(2): the owner, or CAP_LEASE)."""
    held = hold("lease", own=True)
    if killed:
        kill(held)
    os.chown(held.path, 1234, 1234)
    held.path.chmod(0o666)
    assert "lease" in str(refused(held))


# -- what is made again -----------------------------------------------------------------------------------------


def test_a_file_without_a_name_is_not_made_behind_a_link(hold):
    """Its directory has become a link into root's: nothing is opened there, and the content lives on in memory."""
    held = hold("ghost")
    before = os.stat(held.folder).st_dev
    secret = held.top / "secret"
    secret.mkdir(0o700)
    held.folder.rmdir()
    held.folder.symlink_to(secret)
    memory_store.rollback(held.point)
    link = os.readlink(f"/proc/{held.pid}/fd/3")
    assert pathlib.Path(f"/proc/{held.pid}/fd/3").read_bytes() == b"ghost"
    assert not link.startswith(str(held.top)), link
    assert os.stat(f"/proc/{held.pid}/fd/3").st_dev != before


def test_a_file_without_a_name_is_made_where_it_was_and_cannot_be_given_one(hold):
    held = hold("ghost")
    memory_store.rollback(held.point)
    assert os.readlink(f"/proc/{held.pid}/fd/3").startswith(str(held.folder))
    info = os.stat(f"/proc/{held.pid}/fd/3")
    assert (info.st_uid, info.st_nlink) == (NOBODY, 0)
    with pytest.raises(FileNotFoundError):  # linkat(2) of a file that was deleted
        old, new = os.fsencode(f"/proc/{held.pid}/fd/3\0"), os.fsencode(f"{held.folder}/linked\0")
        syscall("linkat", -100, old, -100, new, 0x400)  # AT_FDCWD, AT_SYMLINK_FOLLOW


@pytest.mark.parametrize("what", ["r", "flight-r", "shared"])
def test_a_lock_file_of_roots_does_not_come_back_when_root_has_deleted_it(hold, what):
    """The job's user could make one there, but not one of root's."""
    held = hold(what, sticky=True)
    held.path.unlink()
    refused(held)


def test_a_temporary_file_of_his_own_does_come_back(hold):
    held = hold("rw", sticky=True, own=True)
    held.path.unlink()
    memory_store.rollback(held.point)
    assert held.has_it()
    assert held.path.stat().st_uid == NOBODY


@pytest.mark.parametrize("failing", ["files.open_all", "files.close_all", "files.check"])
def test_no_thread_with_others_rights_outlives_the_rollback(hold, monkeypatch, failing):
    """On every way out. They would keep snap from forking, too."""

    def fail(_ctx):
        raise RestoreConflictError("fails on purpose")

    def acting():
        return [thread for thread in threading.enumerate() if thread.name == "snap-acting"]

    held = hold("rw")
    seen = []
    monkeypatch.setattr(
        rights.Acting, "close", lambda own, close=rights.Acting.close: (seen.extend(acting()), close(own))
    )
    name = failing.removeprefix("files.")
    original = getattr(job_files, name)

    def called(ctx):
        if name != "open_all":
            original(ctx)
        ctx.acting.start(Rights(NOBODY, NOBODY))
        fail(ctx)

    monkeypatch.setattr(job_files, name, called)
    with contextlib.suppress(RestoreConflictError):
        memory_store.rollback(held.point)
    assert seen, "there was one"
    assert acting() == []


# -- what else root does for a job --------------------------------------------------------------------------------


def test_signals_of_a_descriptor_reach_no_process_that_its_owner_may_not_signal(program):
    """F_SETOWN to a process of root's: snap must not set it as root."""
    victim = subprocess.Popen(["/bin/sleep", "1000"], start_new_session=True)
    job = subprocess.Popen(
        [program, "signals", str(victim.pid), "0"],
        stdin=-3,
        stdout=subprocess.PIPE,
        stderr=-3,
        cwd="/",
        start_new_session=True,
    )
    job.returncode = 0
    try:
        assert job.stdout is not None
        assert job.stdout.read(5) == b"ready"
        point = memory_store.take(job.pid)
        memory_store.rollback(point)
        pidfd = os.pidfd_open(job.pid)
        far, near = (ksys.pidfd_getfd(pidfd, number) for number in (4, 3))
        assert fcntl.fcntl(near, fcntl.F_GETOWN) == victim.pid
        os.write(far, b"x")  # a signal for the owner, if it may be sent
        for fd in (pidfd, far, near):
            os.close(fd)
        assert victim.poll() is None
        wait_until(lambda: state(victim.pid) == "S", "the other process asleep")
        assert victim.poll() is None, "SIGUSR1 would have ended it"
    finally:
        for process in (job, victim):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        victim.wait()
        wait_until(lambda: reap_all() or not state(job.pid), "the job gone")
        job.stdout.close()
