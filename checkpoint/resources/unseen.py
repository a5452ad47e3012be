"""What a take may refuse although no look from outside could see it: it takes a stopped task, or a duplicate of a descriptor.

A take that finds it lets the job go on as it was. README.md and `check` itself name these exceptions; in everything else the two agree.
"""

from __future__ import annotations

import os
from collections.abc import Collection

from checkpoint.kernel.features import probe
from checkpoint.resources import landlock
from checkpoint.resources.files.kind import descriptors

_OF_TASKS = (
    "system calls dispatched to the program itself (PR_SET_SYSCALL_USER_DISPATCH)",
    "segments (modify_ldt, set_thread_area) and I/O ports (ioperm) of its own",
)
_OF_SOCKETS = (
    "what descriptors in flight in its sockets (SCM_RIGHTS) lead to",
    "unread data of connections that have ended",
    "unfinished datagrams (MSG_MORE)",
)


def of_job(pids: Collection[int]) -> tuple[str, ...]:
    """What cannot be excluded for these processes, in words."""
    found: list[str] = [landlock.UNSEEN] if probe("landlock").ok else []
    found += _OF_TASKS
    if any(_has_sockets(pid) for pid in pids):
        found += _OF_SOCKETS
    return tuple(found)


def _has_sockets(pid: int) -> bool:
    try:
        return any(os.readlink(f"/proc/{pid}/fd/{fd}").startswith("socket:") for fd in descriptors(pid))
    except OSError:
        return False
