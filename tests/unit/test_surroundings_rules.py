"""What the death of a job's process does to its parent: the rule alone, and the lines of /proc that it goes by."""

from __future__ import annotations

from dataclasses import replace

import pytest

from checkpoint.environment import Holder
from checkpoint.kernel.waits import parse_syscall
from checkpoint.surroundings import Parent, judge, service_of

CHILD = Holder(pid=70, ppid=7, pgid=70, sid=70, state="S", start_time_ticks=5, comm="sim")
PARENT = Parent(7, "parent")


@pytest.mark.parametrize(
    ("known", "codes"),
    [
        ({"heir": True, "stopped": True, "zombie": 9}, []),
        ({"stopped": True, "waits": "any"}, ["parent_stopped"]),
        ({"zombie": 9, "told": "handler"}, ["parent_does_not_reap"]),
        ({"zombie": 9, "told": "ignored"}, ["supervised"]),
        ({"told": "ignored"}, ["supervised"]),
        ({"told": "ignored", "shell": True}, []),
        ({"told": "ignored", "above": True}, []),
        ({"told": "ignored", "heir": True}, []),
        ({"waits": "this"}, ["supervised"]),
        ({"waits": "any"}, ["supervised"]),
        ({"told": "handler"}, ["supervised"]),
        ({"told": "signalfd"}, ["supervised"]),
        ({"told": "pidfd"}, ["supervised"]),
        ({}, ["parent_may_not_reap"]),
        ({"waits": "any", "younger": True}, []),
        ({"told": "handler", "background": True}, []),
        ({"waits": "any", "above": True}, []),
        ({"above": True}, ["parent_may_not_reap"]),
        ({"background": True}, ["parent_may_not_reap"]),
    ],
)
def test_rule(known, codes):
    found = judge(CHILD, replace(PARENT, **known))
    assert [one.code for one in found] == codes
    assert all(one.what and one.hint and one.pid == 70 for one in found)
    assert all(not one.option or f"--{one.option}" in one.hint for one in found)


@pytest.mark.parametrize(
    ("line", "waits"),
    [
        ("61 0xffffffffffffffff 0x7ffd 0x0 0x0 0x0 0x0 0x7ffd 0x7f", "any"),
        ("61 0xffffffff 0x7ffd 0x0 0x0 0x0 0x0 0x7ffd 0x7f", "any"),
        ("61 0x46 0x7ffd 0x0 0x0 0x0 0x0 0x7ffd 0x7f", "this"),
        ("61 0x47 0x7ffd 0x0 0x0 0x0 0x0 0x7ffd 0x7f", ""),
        ("61 0x0 0x7ffd 0x0 0x0 0x0 0x0 0x7ffd 0x7f", "any"),
        ("247 0x1 0x46 0x7ffd 0x4 0x0 0x0 0x7ffd 0x7f", "this"),
        ("247 0x1 0x47 0x7ffd 0x4 0x0 0x0 0x7ffd 0x7f", ""),
        ("247 0x0 0x0 0x7ffd 0x4 0x0 0x0 0x7ffd 0x7f", "any"),
        ("7 0x46 0x1 0x0 0x0 0x0 0x0 0x7ffd 0x7f", ""),
        ("running", ""),
        ("-1 0x7ffd 0x7f", ""),
        ("", ""),
    ],
)
def test_what_a_thread_waits_for(line, waits):
    assert parse_syscall(line, 70) == waits


def test_the_service_of_a_process():
    assert service_of("0::/system.slice/sim.service\n") == "sim.service"
    assert service_of("0::/user.slice/user-0.slice/user@0.service/app.slice/a.service/x\n") == "a.service"
    assert service_of("0::/user.slice/user-0.slice/session-3.scope\n") == ""
    assert service_of("") == ""
