"""What the kernel tells of System V semaphores and message queues."""

from __future__ import annotations

import ctypes
import os

import pytest

from checkpoint.kernel import sysvipc
from checkpoint.resources import sysv
from tests.kernel.descriptor_jobs import child

_IPC_RMID, _SETVAL, _CREATE = 0, 16, 0o1600
libc = ctypes.CDLL(None)


def test_tables():
    rows = sysvipc.parse_table(
        b"  key  semid perms nsems\n  -1      7   600     3\n   0      8   666     1\n"
    )
    assert rows == [
        {"key": -1, "semid": 7, "perms": 600, "nsems": 3},
        {"key": 0, "semid": 8, "perms": 666, "nsems": 1},
    ]
    assert sysvipc.parse_table(b"") == []


@pytest.fixture
def objects():
    """(semaphore set, message queue)"""
    made = libc.semget(0, 3, _CREATE), libc.msgget(0, _CREATE)
    assert min(made) >= 0
    yield made
    libc.semctl(made[0], 0, _IPC_RMID)
    libc.msgctl(made[1], _IPC_RMID, None)


def test_who_used_them_is_named(objects):
    semaphores, queue = objects

    def use():
        assert libc.semop(semaphores, (ctypes.c_short * 3)(2, 1, 0), ctypes.c_size_t(1)) == 0
        assert libc.msgsnd(queue, ctypes.c_char_p(b"\1" + bytes(7) + b"text"), ctypes.c_size_t(4), 0) == 0

    with child(use) as pid, child(lambda: None) as other:
        found: list[str] = []
        sysv.look_job([other, pid], found.append)
        assert [text.split(":")[0] for text in found] == [
            f"task {pid} used System V semaphore set {semaphores}",
            f"task {pid} used System V message queue {queue}",
        ]
        found.clear()
        sysv.look_job([other, os.getpid()], found.append)
        assert not found
