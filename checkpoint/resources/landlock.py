"""Landlock domains: found out in the frozen window, and refused, for what a domain denies the kernel shows to nobody.

A task in a domain may not look at a task outside of it, whatever its ids and capabilities are (landlock(7), "Ptrace restrictions";
hook_ptrace_access_check in the kernel's security/landlock). So each thread asks kcmp(2) about a *bystander*: a process of snap's with the
thread's own ids and no rights, which every task with these ids may look at. EPERM says that there is a domain. Nothing is
made in the job, and it costs one system call in the batch that each thread runs anyway.

A domain that snap is in, too, is not found, and is not lost: a rollback is made inside of it.
Where a security module with labels (SELinux, AppArmor, Smack) has another label for the task than for snap, EPERM may be that module's
answer: then it is a warning.
"""

from __future__ import annotations

import contextlib
import errno
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from checkpoint.kernel.features import probe
from checkpoint.kernel.sys import KCMP_VM
from checkpoint.resources.policies import security_label
from snapshotter.base.errors import Finding, UnsupportedError

if TYPE_CHECKING:
    from checkpoint.context import DumpContext, FrozenProcess, FrozenTask
    from checkpoint.parasite import Batch, Ref, Results

BINARY = Path(__file__).resolve().parents[2] / "parasite_c" / "bystander.bin"
UNSEEN = "Landlock domains"
_HINT = "start the job without its sandbox"
Ids = tuple[int, int]
"""Real user and group id: those that kcmp(2) goes by."""


class Bystanders:
    """The bystanders of one take, by their ids. A context manager: leaving it ends them, and so does snap's end."""

    def __init__(self) -> None:
        self._processes: dict[Ids, subprocess.Popen[bytes] | None] = {}
        self._wanted = probe("landlock").ok

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes.values():
            if process is not None:
                _end(process)
        self._processes.clear()

    def of(self, ids: Ids) -> int:
        """The pid of the one with these ids, made at the first call; 0: this kernel has no Landlock, or snap may not have these ids."""
        if not self._wanted:
            return 0
        if ids not in self._processes:
            self._processes[ids] = _start(ids)
        process = self._processes[ids]
        return 0 if process is None else process.pid


def _start(ids: Ids) -> subprocess.Popen[bytes] | None:
    command = [str(BINARY), *map(str, ids)]
    with contextlib.suppress(OSError):
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd="/", env={}, start_new_session=True
        )
        assert process.stdout is not None
        if process.stdout.read(1) == b"k":
            return process
        _end(process)
    return None


def _end(process: subprocess.Popen[bytes]) -> None:
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
    process.wait()


def ask(batch: Batch, bystander: int) -> Ref | None:
    """Add the question to the batch of a thread; None: there is nobody to ask about."""
    return batch.call("kcmp", bystander, bystander, KCMP_VM, 0, 0, check=False) if bystander else None


def judge(
    ctx: DumpContext, process: FrozenProcess, answers: Sequence[tuple[FrozenTask, Results, Ref | None]]
) -> None:
    """What the threads of a frozen process have answered.

    Raises:
        UnsupportedError: some of them are in a domain.
    """
    confined = [
        task
        for task, results, asked in answers
        if asked is not None and results[asked] == -errno.EPERM and _is_confined(ctx, task)
    ]
    unknown = [task for task, _, asked in answers if asked is None]
    if probe("landlock").ok and unknown:
        ctx.warn_unconfined(
            f"task {process.pid}: snap may not have its ids, so it cannot be told whether Landlock confines it; "
            "what Landlock denies is allowed after a rollback"
        )
    if not confined:
        return
    label = security_label(process.pid)
    if label != security_label("self"):
        ctx.warn_unconfined(
            f"task {process.pid}: its security label {label!r} lets it look at nobody, so it cannot be told whether Landlock "
            "confines it, too; what Landlock denies is allowed after a rollback"
        )
        return
    where = "task" if len(confined) == len(answers) else f"thread {confined[0].tid}"
    more = f" (and {len(confined) - 1} more threads)" if where != "task" and len(confined) > 1 else ""
    what = f"is confined by Landlock{more}, and nobody can read what that denies: after a rollback it would be allowed"
    raise UnsupportedError.of([Finding(process.pid, where, what, _HINT)], ctx.root_pid)


def _is_confined(ctx: DumpContext, task: FrozenTask) -> bool:
    """Asked once more, about a bystander with the ids of this very thread, which may be others than those of its process."""
    bystander = ctx.bystanders.of((task.facts.status.uids[0], task.facts.status.gids[0]))
    if not bystander:
        return False
    batch = task.infect().batch()
    asked = batch.call("kcmp", bystander, bystander, KCMP_VM, 0, 0, check=False)
    return task.infect().run(batch)[asked] == -errno.EPERM
