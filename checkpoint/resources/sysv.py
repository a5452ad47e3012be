"""System V semaphores and message queues: they are the system's, and a point says so.

(Segments of shared memory are mappings: model/vma.py.) They stay as they are when a job ends, and a rollback finds them as they are by
then; but what the job has to undo (SEM_UNDO) is undone when it is killed. The kernel tells of a set who changed each
semaphore last, of a queue who sent and received last, and nothing else of who uses it: a job that others have overtaken is
not seen.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from checkpoint.kernel import sysvipc


def look_job(pids: Collection[int], warn: Callable[[str], None]) -> None:
    """Warn of every set and queue that a process of the job was the last to use."""
    kinds = (
        ("semaphore set", "what it would undo is undone when it is killed", sysvipc.semaphore_sets),
        ("message queue", "its messages are not part of the point", sysvipc.message_queues),
    )
    for kind, loss, listing in kinds:
        for number, users in listing():
            for pid in sorted(users.intersection(pids))[:1]:
                warn(
                    f"task {pid} used System V {kind} {number}: a rollback finds it as it is by then, and {loss}"
                )
