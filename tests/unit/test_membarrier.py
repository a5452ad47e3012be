"""What a process has registered for, on kernels that cannot say: each barrier is tried in a process of its own."""

import errno
import os

import pytest

from checkpoint.kernel import sys as ksys
from checkpoint.resources import membarrier

PRIVATE, REGISTER_PRIVATE, REGISTER_GLOBAL, SYNC_CORE = 1 << 3, 1 << 4, 1 << 2, 1 << 5


class Here:
    """Calls are made at once, by this process; a result is its own key."""

    def call(self, name, *args, check):
        try:
            return ksys.syscall(name, *args)
        except OSError as error:
            return -error.errno

    def __getitem__(self, result):
        return result


def in_a_child(check):
    """Without the registrations of whoever runs the tests."""
    child = os.fork()
    if child == 0:
        os._exit(0 if check() else 1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("old", [False, True])
def test_registrations(old, monkeypatch):
    if not membarrier._commands() & PRIVATE:
        pytest.skip("this kernel has no private barriers (CONFIG_MEMBARRIER)")
    if old:
        monkeypatch.setattr(membarrier, "_can_say", lambda: False)
    elif not membarrier._can_say():
        pytest.skip("this kernel cannot say what a process has registered for (before Linux 6.3)")

    def found():
        return membarrier.answer(Here(), membarrier.ask(Here())) & (PRIVATE | REGISTER_PRIVATE)

    def check():
        before = found()
        ksys.syscall("membarrier", REGISTER_PRIVATE, 0, 0)
        return (before, found()) == (0, REGISTER_PRIVATE)

    assert in_a_child(check)


def test_of_an_old_kernel_the_global_one_is_assumed(monkeypatch):
    monkeypatch.setattr(membarrier, "_can_say", lambda: False)
    monkeypatch.setattr(
        membarrier, "_commands", lambda: PRIVATE | REGISTER_PRIVATE | REGISTER_GLOBAL | SYNC_CORE
    )
    asked = membarrier.Asked(None, [(PRIVATE, 0), (SYNC_CORE, -errno.EPERM)])
    assert membarrier.answer(Here(), asked) == REGISTER_PRIVATE | REGISTER_GLOBAL
