"""The frozen tree: every task of a job seized and stopped, and let go again whatever happens.

Owns finding all tasks, those that appear meanwhile too, what each was doing, and the thaw; how one task is seized,
stopped and let go, seizure.py knows. Invariants:

- After `freeze()` every task of the tree is in `processes` and stopped, or is a zombie; none can appear any more,
  because only a running task can make one.
- Leaving the context thaws in reverse order of seizing (threads before leaders), also when tasks have died and when
  curing one failed.
- A task that stands in what a snap that was killed left in it is led out before its registers are read.

ptrace requests must come from the thread that seized: a FrozenTree belongs to the thread that made it.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Literal, Self

from checkpoint import watchdog
from checkpoint.context import FrozenProcess, FrozenTask, ProcessState
from checkpoint.finisher import Finisher, signal_all
from checkpoint.hurry import hurried
from checkpoint.kernel import cut_short, interrupted, proc, ptrace, threads, timeouts
from checkpoint.kernel import sys as ksys
from checkpoint.kernel.mem import ProcMem
from checkpoint.kernel.tasks import task_ids, tree_of, without_workers
from checkpoint.kernel.threads import ThreadFacts
from checkpoint.parasite import LostTaskError, attending, cure, frames, stranded
from checkpoint.parasite.remote import MAGIC_SIZE, blob
from checkpoint.seizure import CannotStopError, Seized, Seizure
from checkpoint.uninterrupted import stops_wait
from snapshotter.base import faults
from snapshotter.base.errors import SnapshotterError, TargetGoneError, UnsupportedError

__all__ = [
    "CannotStopError",
    "FrozenTree",
    "TreeChangedError",
    "lead_out",
    "let_go_whole",
    "settled_tree",
    "stopped_process",
]

_MAX_PASSES = 64
_TRIES = 5
_IGNORED_BY_DEFAULT = sum(
    1 << (signo - 1) for signo in (signal.SIGCHLD, signal.SIGCONT, signal.SIGURG, signal.SIGWINCH)
)
_FIRST_TRY_S, _SETTLE_S = 0.5, 0.02
"""How long the first of them may take and the pause after it; the n-th n times that."""


class TreeChangedError(SnapshotterError):
    """Processes came and went faster than they could be frozen; trying again may do."""

    code = "tree_changed"


class FrozenTree:
    """Freezes a whole process tree for as long as the context lasts.

    Args:
        root_pid: the root of the job.
        timeout_s: how long the job may take to stop.
        max_tasks: more tasks than this are refused (a fork bomb, mostly).
    """

    def __init__(self, root_pid: int, *, timeout_s: float = 10.0, max_tasks: int = 32768) -> None:
        self.root_pid = root_pid
        self.timeout_s = timeout_s
        self.max_tasks = max_tasks
        self.processes: dict[int, FrozenProcess] = {}
        self.thawed_at_ns = 0
        self.seized = Seizure()
        self._lost = False
        """The context is left because a task did not come back from a remote call."""
        self.cut_short: list[str] = []
        """Calls that end with a short count because of the freeze: there was no way to have the rest done."""
        self._tasks: dict[int, FrozenTask] = {}
        self._leave: tuple[signal.Signals, Finisher] | None = None

    # -- the context -------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        try:
            self.freeze()
        except BaseException:
            self.thaw()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lost = isinstance(error, LostTaskError)
        self.thaw()

    @property
    def frozen_us(self) -> int:
        """How long the job stood still; so far, when it still does."""
        begin, end = self.seized.interrupted_at_ns, self.thawed_at_ns or time.monotonic_ns()
        return (end - begin) // 1000 if begin else 0

    # -- freezing ----------------------------------------------------------------------------------------------

    def freeze(self) -> None:
        """Stop every task of the tree and read what it was doing."""
        watchdog.note(f"stopping the tasks of the job below {self.root_pid}")
        ksys.allow_descriptors()
        deadline = time.monotonic() + self.timeout_s
        for _ in range(_MAX_PASSES):
            tree = self._look()
            fresh = without_workers(
                (pid, tid)
                for pid, tids in tree.items()
                for tid in tids
                if tid not in self.seized and not self.seized.is_known_dead(tid)
            )
            if not fresh:
                break
            if len(self.seized) + len(fresh) > self.max_tasks:
                raise UnsupportedError(
                    f"the job has more than {self.max_tasks} tasks and is still growing",
                    where=f"task {self.root_pid}",
                    hint="a fork bomb? raise max_tasks in the configuration if it is not",
                )
            self.seized.stop([tid for pid, tid in fresh if self.seized.seize(pid, tid)], deadline)
        else:
            raise TreeChangedError(
                f"new tasks kept appearing in {_MAX_PASSES} passes",
                where=f"task {self.root_pid}",
                hint="try again",
            )
        self._describe(tree)

    def _look(self) -> dict[int, list[int]]:
        """The tree as it is now, parents first: pid -> its tids."""
        tree = tree_of(self.root_pid)
        if not tree:
            raise TargetGoneError("no such process", where=f"task {self.root_pid}")
        return tree

    def _describe(self, tree: dict[int, list[int]]) -> None:
        """Fill `processes` from the final tree; detach what has left it."""
        inside = {tid for tids in tree.values() for tid in tids}
        for tid in [tid for tid in self.seized.tasks if tid not in inside]:
            self.seized.detach(tid)
            self.seized.forget(tid)
        self.processes = {pid: self._process(pid, tids) for pid, tids in tree.items()}

    def _process(self, pid: int, tids: list[int]) -> FrozenProcess:
        mem, facts = self._read(pid, tids)
        if mem is None:
            stat, status = proc.read_stat(pid), proc.read_status(pid)
            return FrozenProcess(pid, None, [], stat, status, None, "zombie", 0, stat.start_time_ticks)
        if pid not in self.seized:
            raise UnsupportedError(
                "the main thread has ended and other threads go on",
                where=f"task {pid}",
                hint="such a process cannot be made again exactly",
            )
        places = [(int(one.raw.regs[16]), int(one.raw.regs[19])) for one in facts]  # rip, rsp
        tasks = [self._task(one, places, mem) for one in sorted(facts, key=lambda one: one.tid != pid)]
        leader = tasks[0]
        stat = leader.facts.stat
        state: ProcessState = "stopped" if leader.group_stopped else "running"
        return FrozenProcess(
            pid, leader, tasks, stat, leader.facts.status, mem, state, leader.stop_signal, stat.start_time_ticks
        )  # fmt: skip

    def _read(self, pid: int, tids: list[int]) -> tuple[ProcMem | None, list[ThreadFacts]]:
        """The stopped threads of a process as they stand, none of them in what a snap that was killed left behind."""
        mem: ProcMem | None = None
        while True:
            stopped = [tid for tid in tids if tid in self.seized]
            if not stopped:
                return None, []
            mem = mem or ProcMem(pid)
            facts = threads.read(
                pid, stopped, mem.fileno(), code_magic=blob()[:MAGIC_SIZE], frame_magic=frames.MAGIC,
                second=frames.SECOND,
            )  # fmt: skip
            if not [one for one in facts if one.suspect and self._lead_out(one, mem)]:
                return mem, facts

    def _lead_out(self, one: ThreadFacts, mem: ProcMem) -> bool:
        """Whether the task stood in what a snap that was killed left behind; it does not any more."""
        if not stranded.is_inside(one.regs, mem):
            return False
        try:
            stranded.lead_out(one.tid, mem)
        except TargetGoneError:
            self.seized.forget(one.tid)
        return True

    def _task(self, facts: ThreadFacts, places: list[tuple[int, int]], mem: ProcMem) -> FrozenTask:
        stop_signal = self.seized.tasks[facts.tid].stop_signal
        regs = facts.regs
        wait_left_ms = 0
        if not stop_signal and interrupted.restart_instead(regs):
            wait_left_ms = timeouts.keep_deadline(regs, facts.tid, mem)
            ptrace.setregs(facts.tid, regs)
        task = FrozenTask(
            tid=facts.tid,
            pid=facts.pid,
            regs=regs,
            sigmask=facts.sigmask,
            start_time_ticks=facts.start_time_ticks,
            facts=facts,
            places=places,
            group_stopped=bool(stop_signal),
            stop_signal=stop_signal,
            wait_left_ms=wait_left_ms,
        )
        if cut_short.may_be_cut(regs) and not stop_signal and not _ends_calls(facts):
            task.rest = cut_short.rest_of(regs, facts.tid, mem)
        if not stop_signal and (told := cut_short.clear_error(regs, facts.tid)):
            self.cut_short.append(told)
        self._tasks[facts.tid] = task
        return task

    def tasks(self) -> Iterator[FrozenTask]:
        """Every stopped task, in the order of seizing."""
        return (self._tasks[tid] for tid in self.seized.tasks if tid in self._tasks)

    # -- letting go --------------------------------------------------------------------------------------------

    def leave(self, after: Literal["stop", "kill"], finisher: Finisher) -> None:
        """Say what the thaw shall do instead of letting the job run: leave it stopped by SIGSTOP, or kill it."""
        self._leave = (signal.SIGSTOP if after == "stop" else signal.SIGKILL, finisher)

    def cure(self) -> None:
        """Take the parasite out of every task that has one, last infected first; the job stays frozen.

        One that fails does not keep the others in: the first error is raised after all were tried.
        """
        problem: BaseException | None = None
        for task in reversed(list(self.tasks())):
            if task.remote is None:
                continue
            remote, task.remote = task.remote, None
            try:
                cure(remote)
            except TargetGoneError:
                continue
            except BaseException as error:
                problem = problem or error
        if problem is not None:
            raise problem

    def _send_to_wait(self, waiting: list[attending.Waiting]) -> None:
        """Park the tasks whose calls have something left, for their attendants to find; adds them to `waiting`."""
        for process in self.processes.values():
            for task in process.threads:
                if task.rest is None or process.mem is None:
                    continue
                taken = [one.place for one in waiting if one.pid == task.pid]
                stacks = [rsp for _, rsp in task.places]
                try:
                    waiting.append(
                        attending.send_to_wait(task, task.rest, process.mem, stacks=stacks, taken=taken)
                    )
                except TargetGoneError:
                    continue
                except (OSError, SnapshotterError) as error:
                    self.cut_short.append(
                        f"task {task.tid}: its {task.rest} returns {task.rest.done:,}: {error}"
                    )

    def thaw(self) -> None:
        """Let every task go. Does nothing the second time. The first error is raised after all were let go."""
        if not len(self.seized):
            return
        watchdog.letting_go()
        faults.point("thaw.begin")
        problem: BaseException | None = None
        try:
            self.cure()
        except BaseException as error:  # the rest must be let go whatever happened
            problem = error
        killed = False
        waiting: list[attending.Waiting] = []
        # A lost task needs its frames, and nobody knows here where they are.
        if self._leave is None and not self._lost and not isinstance(problem, LostTaskError):
            try:
                self._send_to_wait(waiting)
            except BaseException as error:
                problem = problem or error
        if self._leave is not None:
            signo, finisher = self._leave
            try:
                signal_all(finisher, list(self.processes), signo)
                killed = signo == signal.SIGKILL
            except BaseException as error:
                problem = problem or error
        late = self.seized.let_go(killed=killed)
        self.thawed_at_ns = time.monotonic_ns()
        attending.start(waiting)
        self._tasks.clear()
        for process in self.processes.values():
            if process.mem is not None:
                process.mem.close()
        problem = problem or late
        if problem is not None:
            raise problem


def _ends_calls(facts: ThreadFacts) -> bool:
    """Whether a signal waits for this thread that ends a call whoever freezes it: not blocked, not ignored."""
    pending = (facts.word(b"SigPnd", 16) | facts.word(b"ShdPnd", 16)) & ~facts.sigmask
    return bool(pending & ~facts.word(b"SigIgn", 16) & ~(_IGNORED_BY_DEFAULT & ~facts.word(b"SigCgt", 16)))


@contextlib.contextmanager
def settled_tree(
    root_pid: int, *, timeout_s: float, max_tasks: int, unsettled: Callable[[FrozenTree], bool]
) -> Iterator[FrozenTree]:
    """The frozen tree, at the highest priority and without garbage collection. One that does not stop, or is `unsettled`, is let
    go and tried again.

    `unsettled` says whether the tree, as it stands, would be better in a moment; it is not asked in the last try.
    """
    told: list[str] = []
    for number in range(1, _TRIES + 1):
        tree = FrozenTree(root_pid, timeout_s=min(timeout_s, _FIRST_TRY_S * number), max_tasks=max_tasks)
        tree.cut_short = told  # one list: what an earlier try has cut short must be said, too
        with hurried(), watchdog.held():
            try:
                tree.__enter__()
            except (CannotStopError, TreeChangedError):
                if number == _TRIES or tree.seized.stuck:
                    raise
            else:
                with contextlib.ExitStack() as stack:
                    stack.push(tree.__exit__)
                    if number == _TRIES or not unsettled(tree):
                        yield tree
                        return
        time.sleep(_SETTLE_S * number)


@contextlib.contextmanager
def stopped_process(pid: int, *, timeout_s: float = 5.0) -> Iterator[FrozenProcess]:
    """All threads of one process stand still for the time of the context; its children go on.

    Raises:
        TargetGoneError: it has ended, or is a zombie.
    """
    with hurried(), stops_wait(), watchdog.held(), _OneProcess(pid, timeout_s=timeout_s) as tree:
        process = tree.processes[pid]
        if process.is_zombie:
            raise TargetGoneError("has ended", where=f"task {pid}")
        yield process


def lead_out(pids: Iterable[int]) -> None:
    """Let these processes leave what a snap that was killed has left in them, with all that it had opened there.

    One that runs does so by itself, one that is stopped (SIGSTOP) does not. Processes without such a thing are not touched.
    """
    for pid in pids:
        with contextlib.suppress(OSError, SnapshotterError):
            with ProcMem(pid) as mem:
                there = any(stranded.code_pages(proc.read_maps(pid), mem))
            if there:
                with stopped_process(pid):
                    pass  # entering it has led them out


def let_go_whole(pid: int, tasks: Iterable[Seized], timeout_s: float) -> list[str]:
    """Let threads go whose calls our stop has cut short, as a thaw does: attendants have the rest of the calls done.

    A place for a thread's frames can be chosen only where all threads of its process stand: the others are stopped, too.

    Args:
        pid: their process.
        tasks: they, stopped by the calling thread, and let go in any case. No other thread of the process is seized.
        timeout_s: how long the other threads may take to stop.

    Returns:
        calls for which there was no way to have the rest done, for the user.
    """
    told: list[str] = []
    tree = _OneProcess(pid, timeout_s=timeout_s)
    tree.seized.tasks.update((task.tid, task) for task in tasks)
    with watchdog.held():
        try:
            tree.freeze()
        except TargetGoneError:
            pass
        except SnapshotterError as error:
            told.append(f"task {pid}: a call returns less than it was to transfer: {error}")
        finally:
            tree.thaw()
    return told + tree.cut_short


class _OneProcess(FrozenTree):
    """A frozen tree without branches."""

    def _look(self) -> dict[int, list[int]]:
        tids = task_ids(self.root_pid)
        if not tids:
            raise TargetGoneError("no such process", where=f"task {self.root_pid}")
        return {self.root_pid: tids}
