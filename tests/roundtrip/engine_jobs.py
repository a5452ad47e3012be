"""What tests of the engine without the store share: looking at a job, and killing all of it."""

from __future__ import annotations

import contextlib
import os
import pathlib

from tests.jobs import reap, reap_all, signal_tree, wait_until

# One file for ever: a point may be taken while it is open, and a rollback needs it to be there.
COUNTER = """
import os, time
fd = os.open("n", os.O_WRONLY | os.O_CREAT, 0o600)
n = 0
while True:
    n += 1
    os.pwrite(fd, b"%-20d" % n, 0)
    time.sleep(0.01)
"""


def number(path: pathlib.Path) -> int:
    try:
        return int(path.read_text())
    except (FileNotFoundError, ValueError):
        return 0


def cmdline(pid: int) -> bytes:
    try:
        return pathlib.Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def in_session(sid: int) -> list[int]:
    """What is left of a session, zombies included."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            fields = pathlib.Path(f"/proc/{name}/stat").read_text(errors="replace").rsplit(")", 1)[1].split()
            if int(fields[3]) == sid:
                found.append(int(name))
    return found


def kill(pid: int) -> None:
    signal_tree(pid)
    reap(pid)
    # A child forked meanwhile, a short sleep mostly, has become ours and holds the job's session until it is reaped.
    wait_until(lambda: reap_all() or not in_session(pid), "the job gone")
