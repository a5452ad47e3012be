"""Many descriptors read in one call of C, against each read by itself."""

from __future__ import annotations

import os
import select
import socket
import subprocess
import tempfile

import pytest

from checkpoint.kernel import descriptors
from checkpoint.kernel.fdinfo import parse_fdinfo
from checkpoint.resources.files import kind

pytestmark = pytest.mark.requires("root")


def test_many_descriptors_read_in_one_go_are_what_each_is_by_itself(tmp_path):
    long_name = tmp_path / ("x" * 200)
    gone = tempfile.TemporaryFile(dir=tmp_path)  # noqa: SIM115
    epoll = select.epoll()
    with gone, epoll, socket.socket(socket.AF_UNIX) as sock, open(long_name, "wb") as file:
        file.write(b"some")
        file.flush()
        os.lseek(file.fileno(), 3, os.SEEK_SET)
        pipe = os.pipe()
        many = [os.eventfd(number) for number in range(300)]
        for fd in many:
            epoll.register(fd, select.EPOLLIN)  # an fdinfo of many pages
        systems: dict[int, int] = {}
        with subprocess.Popen(
            ["sleep", "1000"],
            pass_fds=[file.fileno(), gone.fileno(), sock.fileno(), epoll.fileno(), *pipe, *many],
        ) as job:
            try:
                found = {seen.fd: seen for seen in kind.see_all(job.pid, systems) if seen is not None}
                assert sorted(found) == kind.descriptors(job.pid)
                for fd, seen in found.items():
                    alone = kind.see(job.pid, fd)
                    assert alone is not None
                    assert (seen.link, seen.info) == (alone.link, alone.info)
                    for name in (
                        "st_mode",
                        "st_ino",
                        "st_dev",
                        "st_nlink",
                        "st_uid",
                        "st_gid",
                        "st_size",
                        "st_rdev",
                        "st_mtime_ns",
                        "st_ctime_ns",
                        "st_mtime",
                    ):
                        assert getattr(seen.stat, name) == getattr(alone.stat, name), name
                assert descriptors.shown(job.pid, [99999]) == [None]
                folder = os.fsencode(os.path.dirname(file.name))
                for apart, asked in (
                    ([folder], False),
                    ([b"/none", os.fsencode(file.name)], False),
                    ([folder[:-1]], True),
                ):
                    (one,) = descriptors.shown(job.pid, [file.fileno()], apart)
                    assert one is not None
                    assert ((one.stat is not None), one.link) == (asked, found[file.fileno()].link)
                    assert parse_fdinfo(one.info) == found[file.fileno()].info
            finally:
                job.kill()
        for fd in (*pipe, *many):
            os.close(fd)


def test_what_lies_on_a_distant_file_system_is_asked_for_by_another_process(tmp_path, monkeypatch):
    far, near = tmp_path / "far", tmp_path / "farther"
    for folder in (far, near):
        folder.mkdir()
        (folder / "file").write_bytes(b"some")
    asked = []
    own = os.stat_result(range(10))

    def stat(path, link):
        asked.append((path, link))
        return own

    monkeypatch.setattr(kind.distant, "mounts", lambda: [os.fsencode(far)])
    monkeypatch.setattr(kind.distant, "stat", stat)
    with open(far / "file") as one, open(near / "file") as other:
        found = {seen.fd: seen for seen in kind.see_all(os.getpid(), {}) if seen is not None}
        assert asked == [(f"/proc/{os.getpid()}/fd/{one.fileno()}", os.fsencode(far / "file"))]
        assert found[one.fileno()].stat is own
        assert found[other.fileno()].stat == os.fstat(other.fileno())
