"""Pipes and FIFOs of a child of ours: what is in them, who else has them, FIFOs that are gone."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import socket
import stat

import pytest

from checkpoint.kernel import descriptors as sys
from checkpoint.kernel.fdinfo import O_DIRECT
from checkpoint.resources import files
from snapshotter.base.errors import Finding, RestoreConflictError
from tests.kernel.descriptor_jobs import Restored, child, child_keeping, dump

pytestmark = pytest.mark.requires("kcmp", "pidfd_getfd")
libc = ctypes.CDLL(None, use_errno=True)


def test_pipe_with_contents_capacity_and_both_ends(again):
    def prepare():
        read_end, write_end = os.pipe()
        assert (read_end, write_end) == (3, 4)
        fcntl.fcntl(write_end, sys.F_SETPIPE_SZ, 1 << 17)
        os.write(write_end, b"x" * 100_000)
        os.set_blocking(read_end, False)

    r = again(prepare)
    assert fcntl.fcntl(r[3], sys.F_GETPIPE_SZ) == 1 << 17
    assert fcntl.fcntl(r[3], fcntl.F_GETFL) == os.O_NONBLOCK
    assert fcntl.fcntl(r[4], fcntl.F_GETFL) == os.O_WRONLY
    assert sum(len(os.read(r[3], 65536)) for _ in range(2)) == 100_000
    with pytest.raises(BlockingIOError):
        os.read(r[3], 1)
    os.write(r[4], b"more")
    assert os.read(r[3], 10) == b"more"


def test_dump_consumes_nothing():
    def prepare():
        os.write(os.pipe()[1], b"kept")
        a, b = socket.socketpair()
        a.sendall(b"kept too")
        return a, b

    with child(prepare) as pid:
        dump(pid)
        ctx = dump(pid)
    assert [p.data for p in ctx.images["files"].pipes] == [b"kept"]
    queues = [d.unix.queue for d in ctx.images["files"].descriptions if d.HasField("unix")]
    assert sorted(m.data for q in queues for m in q) == [b"kept too"]


def test_lone_pipe_ends_and_packets(again):
    def prepare():
        read_end, write_end = os.pipe2(O_DIRECT)
        os.write(write_end, b"first")
        os.write(write_end, b"second one")
        lone_read, other = os.pipe()
        os.write(other, b"rest")
        os.close(other)
        other, lone_write = os.pipe()
        os.close(other)
        assert (read_end, write_end, lone_read, lone_write) == (3, 4, 5, 7) or lone_write

    r = again(prepare)
    assert os.read(r[3], 100) == b"first"
    assert os.read(r[3], 100) == b"second one"
    assert fcntl.fcntl(r[4], fcntl.F_GETFL) & O_DIRECT
    assert os.read(r[5], 100) == b"rest"
    assert os.read(r[5], 100) == b""
    lone_write = max(r.table)
    with pytest.raises(BrokenPipeError):
        os.write(r[lone_write], b"x")


def test_fifo(again, tmp_path):
    path = tmp_path / "fifo"
    os.mkfifo(path)

    def prepare():
        os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        os.write(os.open(path, os.O_WRONLY), b"through")

    r = again(prepare)
    assert os.read(r[3], 100) == b"through"
    os.write(r[4], b"again")
    assert os.read(r[3], 100) == b"again"


@pytest.mark.parametrize("now", ["gone", "another", "another's"])
def test_a_fifo_that_was_removed_is_made_again(tmp_path, now):
    path = tmp_path / "fifo"
    os.mkfifo(path)
    path.chmod(0o640)
    tmp_path.chmod(0o777)
    os.chown(path, 1234, 2345)

    def prepare():
        os.write(os.open(path, os.O_RDWR), b"through")

    with child(prepare) as pid:
        ctx = dump(pid)
    for _ in range(2):  # what was made is found the next time
        if now == "gone":
            path.unlink()
        else:
            other = tmp_path / "other"
            os.link(path, tmp_path / f"kept{path.stat().st_ino}")  # so that its inode is not used again
            os.mkfifo(other)
            other.chmod(0o640)
            if now == "another":
                os.chown(other, 1234, 2345)
            other.replace(path)
        if now == "another's":
            with pytest.raises(RestoreConflictError, match="was replaced by another"):
                Restored(ctx, pid)
            continue
        r = Restored(ctx, pid)
        assert os.read(r[3], 100) == b"through"
        assert any(now in text for text in r.warnings)
        node = path.stat()
        assert stat.S_ISFIFO(node.st_mode)
        assert (node.st_uid, node.st_gid, node.st_mode & 0o7777) == (1234, 2345, 0o640)
        assert os.path.samestat(os.fstat(r[3]), node)
        r.opening.close()


def test_a_pipe_to_the_outside_is_recorded():
    read_end, write_end = os.pipe()
    with child_keeping(read_end) as holder, child_keeping(write_end) as pid:
        os.close(read_end)
        os.close(write_end)
        report: list[Finding] = []
        files.look_job([pid], report)
        assert report == []
        ctx = dump(pid)
        (pipe,) = ctx.images["files"].pipes
        assert [(h.pid, h.fd) for h in pipe.holders] == [(holder, 3)]
        assert f"process {holder}" in ctx.warnings[0]


def test_a_child_born_at_the_look_is_not_the_outside():
    read_end, write_end = os.pipe()
    report: list[Finding] = []
    with child_keeping(write_end) as pid, child_keeping(read_end) as born:
        with child_keeping(read_end):
            files.look_job([pid], report)  # which does not know yet that the others are the job's
        os.close(read_end)
        os.close(write_end)
        ctx = dump(pid, born)
        (pipe,) = ctx.images["files"].pipes
        assert (list(pipe.holders), ctx.warnings, report) == ([], [], [])


@pytest.mark.parametrize("left", [b"through", b""])
def test_a_fifo_that_an_outsider_keeps_open_keeps_what_is_in_it(tmp_path, left):
    path = tmp_path / "fifo"
    os.mkfifo(path)
    outside = os.open(path, os.O_RDWR | os.O_NONBLOCK)
    with child_keeping(outside), child(lambda: os.open(path, os.O_RDWR | os.O_NONBLOCK)) as pid:
        os.write(outside, b"through")
        ctx = dump(pid)
        if not left:
            os.read(outside, 100)
        os.close(outside)
        r = Restored(ctx, pid)
        with contextlib.suppress(BlockingIOError):
            assert os.read(r[3], 100) == left
            left = b""
        assert not left and any(str(path) in text for text in r.warnings)
        r.opening.close()
