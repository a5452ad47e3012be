"""Locks that no descriptor of a job accounts for: which they are, and what is said of those that are not kept."""

import fcntl
import os
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from checkpoint.kernel import fdinfo
from checkpoint.resources import locks
from images import mm_pb2
from images.codec import parse, serialise
from snapshotter.base.errors import VerificationError
from tests.jobs import wait_until

LOCKS = b"""\
1: FLOCK  ADVISORY  WRITE 40 fe:00:7 0 EOF
1: -> FLOCK  ADVISORY  WRITE 41 fe:00:7 0 EOF
2: OFDLCK ADVISORY  READ -1 00:1b:8 12 13
3: POSIX  ADVISORY  READ 99 fe:00:9 1073741826 1073742335
4: LEASE  ACTIVE    WRITE 40 fe:00:11 0 EOF
5: FLOCK  ADVISORY  WRITE 40 fe:00:12 0 EOF
"""
FDINFO = (
    b"pos:\t0\nflags:\t0100002\nmnt_id:\t29\nino:\t12\nlock:\t1: FLOCK  ADVISORY  WRITE 40 fe:00:12 0 EOF\n"
)


def test_parser():
    held = fdinfo.parse_locks(LOCKS)
    assert [(lock.kind, lock.pid, lock.place) for lock in held] == [
        ("FLOCK", 40, "fe:00:7"),
        ("OFDLCK", -1, "00:1b:8"),
        ("POSIX", 99, "fe:00:9"),
        ("LEASE", 40, "fe:00:11"),
        ("FLOCK", 40, "fe:00:12"),
    ]
    assert (held[1].start, held[1].end, held[1].write) == (12, 13, False)
    assert fdinfo.parse_fdinfo(FDINFO).locks == (held[-1],)


def dumped(text, monkeypatch, outside=()):
    """A job of process 40, which maps file 7 privately and shared and 11 shared, and has 12 open."""
    said = []
    ctx = SimpleNamespace(
        processes={40: None}, resources={}, images={"mm/40": mm_pb2.Mm()}, warn=said.append, later=[]
    )
    ctx.images["mm/40"].vmas.extend([mm_pb2.Vma(flags=2), mm_pb2.Vma(flags=1), mm_pb2.Vma(flags=1)])
    lines = [SimpleNamespace(dev=0xFE << 20, ino=ino, path=b"/f%d" % ino) for ino in (7, 7, 11)]
    space = SimpleNamespace(vmas=ctx.images["mm/40"].vmas, mappings=lines)
    locks.account(ctx, fdinfo.parse_fdinfo(FDINFO).locks)
    monkeypatch.setattr(locks, "held_outside", lambda wanted, _job: wanted & set(outside))
    locks._answer(ctx, {40: space}, fdinfo.parse_locks(text))
    return ctx.images["mm/40"], said


def test_those_of_mappings_are_kept_and_others_named(monkeypatch):
    image, said = dumped(LOCKS, monkeypatch)
    (kept,) = image.locks
    assert (kept.vma, kept.lock.kind, kept.lock.write) == (1, "FLOCK", True)
    (text,) = said
    assert "task 40" in text and "/f11" in text and "LEASE" in text
    image, (text,) = dumped(b"1: POSIX  ADVISORY  READ 40 fe:00:9 1 2\n", monkeypatch)
    assert not image.locks and "file fe:00:9 (POSIX)" in text


def test_those_of_descriptors_outside_are_theirs(monkeypatch):
    image, said = dumped(LOCKS, monkeypatch, outside=fdinfo.parse_locks(LOCKS))
    assert not image.locks and said == []


def test_finding_whose_descriptor_it_is(tmp_path):
    place = os.stat(tmp_path).st_dev
    with open(tmp_path / "file", "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        ino = os.fstat(file.fileno()).st_ino
        mine = {
            lock for lock in fdinfo.parse_locks(Path("/proc/locks").read_bytes()) if lock.pid == os.getpid()
        }
        (lock,) = [
            lock for lock in mine if lock.place == f"{os.major(place):02x}:{os.minor(place):02x}:{ino}"
        ]
        assert locks.held_outside({lock}, ()) == {lock}
        assert locks.held_outside({lock}, (os.getpid(),)) == set()


def test_images_with_such_locks():
    image = mm_pb2.Mm(vmas=[mm_pb2.Vma(start=4096, end=8192)])
    image.locks.add(lock=locks.message(fdinfo.parse_locks(LOCKS)[0]))
    data = serialise("mm/42", image)
    assert parse("mm/42", data).format_version == 2
    for change in (
        {"vma": 1},
        {"lock": {"kind": "POSIX"}},
        {"lock": {"kind": "OFDLCK", "start": 9, "end": 3}},
    ):
        bad = mm_pb2.Mm(format_version=2, vmas=image.vmas)
        bad.locks.add(**change)
        with pytest.raises(VerificationError):
            parse("mm/42", bad.SerializeToString())
    image.format_version = 1
    with pytest.raises(VerificationError):
        parse("mm/42", image.SerializeToString())


def test_nothing_is_left_of_what_keeps_the_file_ready():
    with locks.kept_ready():
        assert "snap-locks" in {thread.name for thread in threading.enumerate()}
    wait_until(lambda: "snap-locks" not in {thread.name for thread in threading.enumerate()}, "it ends")
