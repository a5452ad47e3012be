"""What a take may refuse although no look from outside could see it: it takes a stopped task, or a duplicate of a descriptor.

A take that finds it lets the job go on as it was. `check` names what there is of this in a job; in everything else the two agree (tests/roundtrip/test_check_agrees.py).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterator

from checkpoint.kernel.features import probe
from checkpoint.resources import landlock
from checkpoint.resources.files.kind import descriptors

_OF_TASKS = (
    "system calls dispatched to the program itself (PR_SET_SYSCALL_USER_DISPATCH)",
    "segments (modify_ldt, set_thread_area) and I/O ports (ioperm) of its own",
    "no room for its registers on a stack that is full",
)
_OF_SOCKETS = (
    "what descriptors in flight in its sockets (SCM_RIGHTS) lead to",
    "unread data of connections that have ended",
    "unfinished datagrams (MSG_MORE)",
)


_OF_RINGS = "what an io_uring is used for"


def of_job(pids: Collection[int]) -> tuple[str, ...]:
    """What cannot be excluded for these processes, in words."""
    found: list[str] = [landlock.UNSEEN] if probe("landlock").ok else []
    found += _OF_TASKS
    links = {link for pid in pids for link in _links(pid)}
    if any(link.startswith("socket:") for link in links):
        found += _OF_SOCKETS
    if "anon_inode:[io_uring]" in links:
        found.append(_OF_RINGS)
    return tuple(found)


def _links(pid: int) -> Iterator[str]:
    with contextlib.suppress(OSError):
        for fd in descriptors(pid):
            yield os.readlink(f"/proc/{pid}/fd/{fd}")
