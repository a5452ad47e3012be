"""Descriptors of a child of ours are dumped, the child is killed, and they are made again in this process."""

from __future__ import annotations

import ctypes
import fcntl
import os
import select
import signal
import socket
import struct
import termios
import time

import pytest

from checkpoint.kernel import descriptors as sys
from checkpoint.kernel import proc
from checkpoint.kernel.descriptors import CLONE_FILES, CLONE_FS
from checkpoint.kernel.fdinfo import O_PATH
from checkpoint.kernel.tasks import children
from checkpoint.resources import files, sharing
from snapshotter.base.errors import Finding, RestoreConflictError, UnsupportedError
from tests.kernel.descriptor_jobs import Restored, child, child_keeping, dump

pytestmark = pytest.mark.requires("kcmp", "pidfd_getfd")
libc = ctypes.CDLL(None, use_errno=True)


def test_regular_files_share_offset_and_keep_flags(again, tmp_path):
    path = tmp_path / "data"
    path.write_bytes(b"0123456789")

    def prepare():
        fd = os.open(path, os.O_RDWR | os.O_APPEND)
        assert fd == 3
        os.lseek(fd, 4, os.SEEK_SET)
        os.dup2(fd, 10)
        os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    r = again(prepare)
    assert r.table[3].description == r.table[10].description != r.table[4].description
    assert os.lseek(r[3], 0, os.SEEK_CUR) == 4
    assert fcntl.fcntl(r[3], fcntl.F_GETFL) & os.O_APPEND
    assert not r.table[10].cloexec
    assert r.table[4].cloexec
    assert os.read(r[4], 100) == b"0123456789"
    assert r.warnings == []


def test_of_a_file_that_is_appended_to_no_old_offset_is_promised(tmp_path):
    path = tmp_path / "log"
    path.write_bytes(b"old")
    with child(lambda: os.open(path, os.O_WRONLY | os.O_APPEND)) as pid:
        ctx = dump(pid)
    with path.open("ab") as file:
        file.write(b" and new")
    r = Restored(ctx, pid)
    assert "goes on at its end" in r.warnings[0]
    os.write(r[3], b", appended")
    assert path.read_bytes() == b"old and new, appended"
    r.opening.close()


def test_a_changed_file_is_said_and_a_replaced_one_is_a_conflict(tmp_path):
    path = tmp_path / "log"
    path.write_bytes(b"old")
    with child(lambda: os.lseek(os.open(path, os.O_RDONLY), 3, 0)) as pid:
        ctx = dump(pid)
    with path.open("ab") as file:
        file.write(b" and new")
    r = Restored(ctx, pid)
    assert "changed since" in r.warnings[0] and str(path) in r.warnings[0]
    assert "at its old offset 3" in r.warnings[0]
    assert os.read(r[3], 100) == b" and new"
    r.opening.close()
    path.rename(tmp_path / "aside")
    with pytest.raises(RestoreConflictError, match="gone"):
        Restored(ctx, pid)
    path.write_bytes(b"another")
    with pytest.raises(RestoreConflictError, match="replaced"):
        Restored(ctx, pid)


def test_directory_devices_and_path_only(again, tmp_path):
    for name in "abc":
        (tmp_path / name).touch()

    def prepare():
        os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
        os.open(tmp_path / "a", O_PATH)
        os.open("/dev/zero", os.O_RDONLY)
        os.open("/dev/urandom", os.O_RDONLY | os.O_NONBLOCK)

    r = again(prepare)
    assert sorted(os.listdir(r[3])) == ["a", "b", "c"]
    assert r.info(4).flags & O_PATH
    assert os.read(r[5], 4) == bytes(4)
    assert os.fstat(r[6]).st_rdev == os.makedev(1, 9)
    assert fcntl.fcntl(r[6], fcntl.F_GETFL) & os.O_NONBLOCK
    assert os.fstat(r[0]).st_rdev == os.makedev(1, 3)


def test_eventfd_timerfd_signalfd(again):
    def prepare():
        os.write(os.eventfd(3, os.EFD_SEMAPHORE), struct.pack("=Q", 4))
        os.eventfd(0, os.EFD_NONBLOCK)
        timer = sys.timerfd_create(time.CLOCK_MONOTONIC, 0)
        sys.timerfd_settime(timer, 0, 50 * 10**9, 7 * 10**9)
        timer = sys.timerfd_create(time.CLOCK_BOOTTIME, os.O_NONBLOCK)
        sys.timerfd_settime(timer, 0, 60 * 10**9, 10**9)
        sys.timerfd_set_ticks(timer, 5)
        sys.signalfd(1 << (signal.SIGUSR2 - 1), 0)

    r = again(prepare)
    if r.info(3).eventfd_semaphore is None:  # before Linux 6.5: a warning says so
        assert os.read(r[3], 8) == struct.pack("=Q", 7)
    else:
        assert os.read(r[3], 8) == struct.pack("=Q", 1)
        assert r.info(3).eventfd_count == 6
    with pytest.raises(BlockingIOError):
        os.read(r[4], 8)
    timer = r.info(5).timer
    assert 49 * 10**9 < timer.value_ns <= 50 * 10**9 and timer.interval_ns == 7 * 10**9
    assert os.read(r[6], 8) == struct.pack("=Q", 5)
    assert r.info(6).timer.clock_id == time.CLOCK_BOOTTIME
    assert r.info(7).sigmask == 1 << (signal.SIGUSR2 - 1)


def test_a_timer_that_fires_all_the_time_is_not_disarmed(again):
    def prepare():
        timer = sys.timerfd_create(time.CLOCK_MONOTONIC, 0)
        sys.timerfd_settime(timer, 0, 1, 1_000)
        select.select([timer], [], [])

    r = again(prepare)
    assert struct.unpack("=Q", os.read(r[3], 8))[0] >= 1
    assert select.select([r[3]], [], [], 5)[0], "it fires again"


def test_a_periodic_timer_that_fired_unread_fires_again(again):
    def prepare():
        for flags, clock in ((0, time.CLOCK_MONOTONIC), (3, time.CLOCK_REALTIME), (1, time.CLOCK_BOOTTIME)):
            timer = sys.timerfd_create(clock, 0)
            start = time.clock_gettime_ns(clock) if flags else 0
            sys.timerfd_settime(timer, flags, start + 1_000_000, 50_000_000)
            select.select([timer], [], [])

    r = again(prepare)
    for fd, flags in ((3, 0), (4, 3), (5, 1)):
        assert struct.unpack("=Q", os.read(r[fd], 8))[0] >= 1
        assert select.select([r[fd]], [], [], 5)[0], "it fires again"
        assert r.info(fd).timer.settime_flags == flags
        assert r.info(fd).timer.interval_ns == 50_000_000


def test_epoll_keeps_numbers_data_and_dead_numbers(again):
    def prepare():
        poll = select.epoll()
        counter = os.eventfd(1)
        assert (poll.fileno(), counter) == (3, 4)
        poll.register(counter, select.EPOLLIN | select.EPOLLET)
        read_end, write_end = os.pipe()
        sys.epoll_add(3, read_end, select.EPOLLIN, 0xDEADBEEF12345678)
        os.dup2(read_end, 20)
        os.close(read_end)  # the entry lives on under a number that is gone
        os.write(write_end, b"x")
        return poll

    r = again(prepare)
    entries = {e.fd: e for e in r.info(3).epoll}
    assert set(entries) == {4, 5}
    assert entries[5].data == 0xDEADBEEF12345678
    assert entries[4].events & select.EPOLLET
    poll = select.epoll.fromfd(os.dup(r[3]))
    assert len(poll.poll(0)) == 2
    poll.close()


def test_locks_and_owner(again, tmp_path):
    path = tmp_path / "locked"

    def prepare():
        fd = os.open(path, os.O_RDWR | os.O_CREAT)
        fcntl.flock(fd, fcntl.LOCK_EX)
        fcntl.fcntl(fd, fcntl.F_SETLK, struct.pack("=hh4xqqi4x", fcntl.F_WRLCK, 0, 5, 10, 0))

    r = again(prepare)
    (of_description,) = r.opening.descriptions[r.table[3].description].locks
    (of_process,) = r.table[3].locks
    assert (of_description.kind, of_description.write) == ("FLOCK", True)
    assert (of_process.kind, of_process.start, of_process.end) == ("POSIX", 5, 14)
    assert of_description.pid == of_process.pid > 0
    assert not r.info(3).locks, "they are taken by who had them, not here"


def test_many_eventfds_are_told_apart(again):
    def prepare():
        for _ in range(200):
            os.eventfd(0)
        for number in range(3, 103):
            os.dup2(number, number + 400)

    r = again(prepare)
    assert len({e.description for e in r.table.values()}) == 201
    assert all(r.table[n].description == r.table[n + 400].description for n in range(3, 103))


def test_two_processes_share_descriptions(tmp_path):
    path = tmp_path / "shared"
    path.write_bytes(b"abcdef")

    def prepare():
        os.open(path, os.O_RDONLY)
        read_end, write_end = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(900)
            os.close(read_end)
            os.write(write_end, str(os.getpid()).encode().ljust(8))
            signal.pause()
        select.select([read_end], [], [])

    with child(prepare) as pid:
        with open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as file:
            other = int(file.read())
        ctx = dump(pid, other)
        report: list[Finding] = []
        files.look_job([pid, other], report)
        files.look(pid, report)
        assert report == []
        os.kill(other, signal.SIGKILL)
    tables = [{e.fd: e.description for e in ctx.images[f"fdtable/{p}"].entries} for p in (pid, other)]
    assert tables[0][3] == tables[1][3]
    assert tables[0][5] == tables[1][5] and 4 not in tables[1]


def test_inotify_watches_keep_their_numbers(again, tmp_path):
    (tmp_path / "file").touch()

    def prepare():
        fd = sys.inotify_init(0)
        for number in range(1, 6):
            assert sys.inotify_add_watch(fd, b"/", 2) == number
            sys.inotify_rm_watch(fd, number)
        os.read(fd, 4096)
        sys.inotify_add_watch(fd, os.fsencode(tmp_path), 0x100)
        sys.inotify_add_watch(fd, os.fsencode(tmp_path / "file"), 0x2 | 0x80000000)

    r = again(prepare)
    assert [(w.wd, w.mask & 0xFFF) for w in sorted(r.info(3).inotify, key=lambda w: w.wd)] == [
        (6, 0x100),
        (7, 0x2),
    ]
    assert not fcntl.fcntl(r[3], fcntl.F_GETFL) & os.O_NONBLOCK
    (tmp_path / "new").touch()
    wd, mask, _, length = struct.unpack_from("=iIII", os.read(r[3], 4096))
    assert (wd, mask) == (6, 0x100) and length
    assert r.warnings == []


def test_what_cannot_be_dumped_is_named():
    def prepare():

        libc = ctypes.CDLL(None)
        assert libc.fanotify_init(0, 0) == 3
        os.openpty()
        return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)

    with child(prepare) as pid:
        report: list[Finding] = []
        files.look(pid, report)
        said = " ".join(map(str, report))
        assert "fanotify" in said and "master side" in said and "NETLINK" in said
        with pytest.raises(UnsupportedError, match="fanotify"):
            dump(pid)


def test_terminal_that_stays_and_one_that_goes():
    master, slave = os.openpty()
    with child_keeping(slave) as pid:
        ctx = dump(pid)
    r = Restored(ctx, pid)
    assert os.ttyname(r[3]) == os.ttyname(slave)
    r.opening.close()
    os.close(slave)
    os.close(master)
    with pytest.raises(RestoreConflictError, match="terminal"):
        Restored(ctx, pid)
    r = Restored(ctx, pid, terminal="null")
    assert os.fstat(r[3]).st_rdev == os.makedev(1, 3) and "gone" in r.warnings[0]
    r.opening.close()


def test_pidfd_of_itself(again):
    with child(lambda: os.pidfd_open(os.getpid())) as pid:
        ctx = dump(pid)
        r = Restored(ctx, pid)
        assert r.info(3).pid == pid
        r.opening.close()


def test_a_terminal_of_the_same_number_that_is_somebody_elses():
    master, slave = os.openpty()
    with child_keeping(slave) as pid:
        ctx = dump(pid)
    uid = os.fstat(slave).st_uid
    os.fchown(slave, 65534, -1)
    with pytest.raises(RestoreConflictError, match="belongs to user 65534"):
        Restored(ctx, pid)
    r = Restored(ctx, pid, terminal="null")
    assert os.fstat(r[3]).st_rdev == os.makedev(1, 3) and "user 65534" in r.warnings[0]
    r.opening.close()
    os.fchown(slave, uid, -1)

    name = os.ttyname(slave)

    def lead():
        os.setsid()
        fcntl.ioctl(os.open(name, os.O_RDWR), termios.TIOCSCTTY, 0)

    with child(lead) as other, pytest.raises(RestoreConflictError, match=f"session of process {other}"):
        Restored(ctx, pid)
    Restored(ctx, pid).opening.close()
    (terminal,) = [d.terminal for d in ctx.images["files"].descriptions if d.HasField("terminal")]
    terminal.boot_id = "another"
    with pytest.raises(RestoreConflictError, match="booted"):
        Restored(ctx, pid)
    os.close(slave)
    os.close(master)


def test_the_session_on_a_terminal_is_recorded():
    master, slave = os.openpty()
    name = os.ttyname(slave)

    def lead():
        os.setsid()
        fcntl.ioctl(os.open(name, os.O_RDWR), termios.TIOCSCTTY, 0)

    with child(lead) as leader, child(lambda: os.open(name, os.O_RDWR | os.O_NOCTTY)) as pid:
        ctx = dump(pid)
        (terminal,) = [d.terminal for d in ctx.images["files"].descriptions if d.HasField("terminal")]
        assert terminal.leader == leader and not terminal.session
        r = Restored(ctx, pid)
        assert os.ttyname(r[3]) == name
        r.opening.close()
    with pytest.raises(RestoreConflictError, match=f"session of process {leader} on it has ended"):
        Restored(ctx, pid)
    os.close(slave)
    os.close(master)


def clone(flags: int) -> int:
    """Like fork; the child ends with its parent."""
    made = libc.syscall(56, flags | signal.SIGCHLD, 0, 0, 0, 0)
    if made == 0:
        libc.prctl(1, signal.SIGKILL)
        if not flags & CLONE_FILES:
            os.close(900)  # of child(), which waits for its end
        signal.pause()
    return made


def findings(root: int, *pids: int) -> list[str]:
    found: list[Finding] = []
    tasks = {pid: proc.read_stat(pid).start_time_ticks for pid in (root, *pids)}
    sharing.look_job(root, tasks, found)
    return [str(finding) for finding in found]


@pytest.mark.parametrize(
    ("flag", "what"), [(CLONE_FILES, "descriptor table: is shared"), (CLONE_FS, "root and umask: is shared")]
)
def test_a_table_that_is_shared_with_the_outside_is_refused(flag, what):
    with child(lambda: clone(flag)) as pid:
        (below,) = children(pid, [pid])
        assert findings(pid, below) == []
        (outside,) = findings(pid)
        assert what in outside and f"with process {below}, which is not part of the job" in outside
        (outside,) = findings(below)
        assert f"with process {pid}" in outside


def test_who_shares_is_found_and_written_down():
    def prepare():
        clone(CLONE_FILES)
        clone(CLONE_FS)

    with child(prepare) as pid:
        files_too, fs_too = sorted(children(pid, [pid]))
        ctx = dump(pid, files_too, fs_too)
    assert ctx.images[f"process/{files_too}"].files == ctx.images[f"process/{pid}"].files == f"fdtable/{pid}"
    assert ctx.images[f"process/{fs_too}"].files == f"fdtable/{fs_too}"
    assert [ctx.images[f"process/{one}"].fs_of for one in (pid, files_too, fs_too)] == [0, 0, pid]
    assert f"fdtable/{files_too}" not in ctx.images
