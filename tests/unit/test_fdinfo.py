"""fdinfo as the kernel wrote it on real descriptors, and as no kernel ever would."""

from __future__ import annotations

import os
import struct
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoint.kernel.fdinfo import FdInfo, parse_fdinfo
from checkpoint.kernel.sockdiag import parse_unix_message

PLAIN = b"pos:\t42\nflags:\t0102002\nmnt_id:\t27\nino:\t2146402\n"
LOCKS = (
    PLAIN + b"lock:\t1: FLOCK  ADVISORY  WRITE 15655 fe:01:2146402 0 EOF\n"
    b"lock:\t2: POSIX  ADVISORY  READ 15655 fe:01:2146402 5 14\n"
)
EPOLL = (
    b"pos:\t0\nflags:\t02000002\nmnt_id:\t17\nino:\t1038\n"
    b"tfd:        4 events: 80000001 data: deadbeef12345678  pos:0 ino:a223 sdev:9\n"
    b"tfd:       30 events:       19 data:                4  pos:0 ino:31 sdev:10000a\n"
)
TIMER = (
    b"pos:\t0\nflags:\t02\nmnt_id:\t17\nino:\t1038\nclockid: 1\nticks: 3\nsettime flags: 01\n"
    b"it_value: (2, 999968884)\nit_interval: (0, 7)\n"
)
EVENTFD = (
    b"pos:\t0\nflags:\t02\nmnt_id:\t17\nino:\t1038\n"
    b"eventfd-count:                1f\neventfd-id: 1\neventfd-semaphore: 1\n"
)


def test_plain():
    info = parse_fdinfo(PLAIN)
    assert (info.pos, info.flags, info.cloexec, info.mnt_id, info.ino) == (42, 0o102002, False, 27, 2146402)
    assert info.access == os.O_RDWR and info.readable and info.writable


def test_close_on_exec_is_no_flag_of_the_description():
    info = parse_fdinfo(b"pos:\t0\nflags:\t02000001\nmnt_id:\t16\nino:\t7\n")
    assert (info.flags, info.cloexec, info.readable) == (1, True, False)


def test_locks():
    flock, posix = parse_fdinfo(LOCKS).locks
    assert (flock.kind, flock.write, flock.start, flock.end) == ("FLOCK", True, 0, None)
    assert (posix.kind, posix.write, posix.start, posix.end, posix.pid) == ("POSIX", False, 5, 14, 15655)


def test_epoll_entries():
    first, second = parse_fdinfo(EPOLL).epoll
    assert (first.fd, first.events, first.data) == (4, 0x80000001, 0xDEADBEEF12345678)
    assert (first.ino, first.dev) == (0xA223, 9)
    assert (second.fd, second.dev) == (30, os.makedev(1, 10))


def test_epoll_entries_of_older_kernels_lack_the_inode():
    (entry,) = parse_fdinfo(
        b"pos:\t0\nflags:\t02\nmnt_id:\t9\ntfd:        5 events:       19 data:      5\n"
    ).epoll
    assert (entry.fd, entry.ino) == (5, 0)


def test_timer():
    timer = parse_fdinfo(TIMER).timer
    assert timer is not None
    assert (timer.clock_id, timer.ticks, timer.settime_flags) == (1, 3, 1)
    assert (timer.value_ns, timer.interval_ns) == (2_999_968_884, 7)


def test_eventfd_and_what_is_not_known():
    info = parse_fdinfo(EVENTFD)
    assert (info.eventfd_count, info.eventfd_semaphore) == (0x1F, True)
    assert info.extra == {"eventfd-id": "1"}


def test_signalfd_and_pidfd():
    assert parse_fdinfo(PLAIN + b"sigmask:\t0000000000000400\n").sigmask == 0x400
    assert parse_fdinfo(PLAIN + b"Pid:\t-1\nNSpid:\t-1\n").pid == -1


@given(st.lists(st.sampled_from([*LOCKS.splitlines(), *EPOLL.splitlines(), *TIMER.splitlines()])))
def test_any_order_of_lines(lines):
    assert isinstance(parse_fdinfo(b"\n".join(lines)), FdInfo)


def test_unix_diag_message():
    name = b"/run/sock\0"
    attributes = b"".join(
        struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)
        for kind, value in (
            (0, name),
            (1, struct.pack("=II", 77, 5)),
            (4, struct.pack("=II", 3, 128)),
            (6, b"\x02"),
        )
    )
    info = parse_unix_message(struct.pack("=BBBBIII", 1, 1, 10, 0, 4711, 0, 0) + attributes)
    assert (info.ino, info.type, info.state, info.name) == (4711, 1, 10, name)
    assert (info.vfs_ino, info.rqueue, info.wqueue, info.shutdown, info.peer) == (77, 3, 128, 2, 0)


@pytest.mark.parametrize("data", [b"", b"\n\n", b"flags:\t0\n", b"nonsense without colon\n"])
def test_little_or_nothing(data):
    assert parse_fdinfo(data).locks == ()


@given(st.integers(-1, 2**63 - 1), st.integers(0, 2**25), st.integers(0, 2**31), st.integers(0, 2**64 - 1))
def test_the_short_way_for_plain_descriptors_says_the_same(pos, flags, mnt_id, ino):
    text = f"pos:\t{pos}\nflags:\t0{flags:o}\nmnt_id:\t{mnt_id}\nino:\t{ino}\n".encode()
    long = parse_fdinfo(text + b"other:\t1\n")
    assert long.extra == {"other": "1"}
    assert parse_fdinfo(text) == replace(long, extra={})
