"""The C helpers at the edges of what the kernel answers."""

from __future__ import annotations

import errno
import os
import signal

import pytest
from parasite_c._native import ffi, lib

from checkpoint.kernel.mem import ProcMem
from tests.jobs import reap

pytestmark = pytest.mark.requires("root")


def test_an_old_errno_is_not_taken_for_an_interrupted_read():
    """The memory file of a process that has ended reads as 0 bytes, which sets no errno."""
    target = os.fork()
    if target == 0:
        while True:
            signal.pause()
    mem = ProcMem(target)
    os.kill(target, signal.SIGKILL)
    reap(target)
    reader = os.fork()  # one that never comes back can be killed
    if reader == 0:
        signal.alarm(10)
        runs = ffi.new("struct snap_run_pages[]", [(16, 1)])
        ffi.errno = errno.EINTR
        got = lib.snap_move_runs(target, mem.fileno(), runs, 1, ffi.new("char[4096]"), 0, ffi.NULL, 0)
        os._exit(0 if got == -errno.ESRCH else 1)
    mem.close()
    assert reap(reader) == 0
