"""Parsers of /proc on captured bytes."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoint.kernel import proc

STAT = (
    b"4242 (a) b (c)) S 1 4242 4200 34816 4250 4194560 1 2 3 4 5 6 7 8 20 -5 3 0 744331 21291008 4315 "
    b"18446744073709551615 94223540379648 94223540379989 140731532339008 0 0 0 0 16781312 134235842 0 0 0 17 1 0 0 0 0 0 "
    b"94223540391344 94223540391960 94224169353216 140731532343824 140731532343843 140731532343843 140731532345319 9\n"
)


def test_stat_with_brackets_in_its_name():
    stat = proc.parse_stat(STAT)
    assert (stat.pid, stat.comm, stat.state, stat.ppid, stat.pgrp, stat.session) == (
        4242,
        b"a) b (c)",
        "S",
        1,
        4242,
        4200,
    )
    assert (stat.nice, stat.num_threads, stat.start_time_ticks, stat.exit_signal) == (-5, 3, 744331, 17)
    assert (stat.start_code, stat.start_brk, stat.env_end, stat.exit_code) == (
        94223540379648,
        94224169353216,
        140731532345319,
        9,
    )


def test_stat_of_ourselves():
    stat = proc.read_stat(os.getpid())
    assert stat.ppid == os.getppid()
    assert stat.pgrp == os.getpgrp()
    assert not stat.is_zombie


def test_status_of_ourselves():
    status = proc.read_status(os.getpid())
    assert status.pid == status.tgid == os.getpid()
    assert status.uids[0] == os.getuid()
    assert status.groups == tuple(sorted(os.getgroups()))
    assert status.seccomp == 0


MAPS = b"""\
00400000-00452000 r-xp 00000000 08:02 173521                             /usr/bin/a b\\012c (deleted)
7f0000000000-7f0000021000 rw-p 00000000 00:00 0 \n7ffc00000000-7ffc00021000 rw-p 00000000 00:00 0                          [stack]
7f1000000000-7f1000001000 rw-s 00001000 00:05 12                         /dev/zero (deleted)
7f2000000000-7f2000001000 rw-p 00000000 00:00 0                          [anon:Go: heap]
"""


def test_maps():
    code, anon, stack, shared, named = proc.parse_maps(MAPS)
    assert (code.start, code.end, code.major, code.minor, code.inode) == (0x400000, 0x452000, 8, 2, 173521)
    assert code.path == "/usr/bin/a b\nc (deleted)"
    assert code.executable and not code.writable and not code.is_anonymous
    assert anon.path == "" and anon.is_anonymous and anon.size_bytes == 0x21000
    assert stack.path == "[stack]" and stack.is_anonymous
    assert shared.shared and shared.offset == 4096
    assert named.is_anonymous


def test_maps_refuses_what_is_not_maps():
    with pytest.raises(ValueError, match="maps"):
        proc.parse_maps(b"hello\n")


def test_timers():
    data = (
        b"ID: 0\nsignal: 14/00005581f0a3c2a0\nnotify: signal/pid.2634\nClockID: 1\n"
        b"ID: 3\nsignal: 60/0000000000000007\nnotify: thread/tid.2635\nClockID: 0\n"
    )
    first, second = proc.parse_timers(data)
    assert (first.id, first.signo, first.sigval, first.notify, first.notify_kind, first.clock_id) == (
        0,
        14,
        0x5581F0A3C2A0,
        "signal",
        "pid",
        1,
    )
    assert (second.id, second.notify, second.notify_kind, second.notify_id) == (3, "thread", "tid", 2635)
    assert proc.parse_timers(b"") == []


@given(st.binary(min_size=1, max_size=15).filter(lambda name: b"\0" not in name))
def test_any_name_is_read_back(name):
    head, _, tail = STAT.partition(b"(a) b (c))")
    assert proc.parse_stat(head + b"(" + name + b")" + tail).comm == name


@given(st.binary(max_size=200))
def test_status_parser_takes_any_bytes_or_says_so(data):
    try:
        proc.parse_status(data)
    except ValueError:
        pass
