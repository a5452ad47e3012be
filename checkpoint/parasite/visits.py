"""One batch run by many threads of a process, each in turn: what only a thread itself can say.

Owns the fast way (parasite_c/threads.c): the steps of infection.py for each thread without a line of Python between
them, and which threads must take the slow one: those with a seccomp filter, those without a signal that they would
ignore, and all of them where frames have no place but on a thread's own stack. The promise is the same: whenever snap
dies, the thread that is inside leaves through its frames and takes the area away.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from parasite_c._native import ffi, lib

from checkpoint.kernel import interrupted, syscalls
from checkpoint.parasite import batch as encoding
from checkpoint.parasite import frames
from checkpoint.parasite.batch import Batch, Ending, Results
from checkpoint.parasite.infection import InfectedTask, blocked_signal, live_frames, quiet_signal
from checkpoint.parasite.remote import lost
from snapshotter.base import faults
from snapshotter.base.errors import SnapshotterError, TargetGoneError, UnsupportedError

if TYPE_CHECKING:
    from checkpoint.kernel.ptrace import Regs
    from checkpoint.kernel.threads import ThreadFacts
    from checkpoint.parasite.remote import RemoteTask

STEPS = {
    lib.SNAP_V_FRAMES: "parasite.frames",
    lib.SNAP_V_REDIRECTED: "parasite.redirected",
    lib.SNAP_V_BLOCKED: "parasite.blocked",
    lib.SNAP_V_WRITTEN: "parasite.written",
    lib.SNAP_V_STARTED: "parasite.started",
    lib.SNAP_V_RAN: "parasite.ran",
    lib.SNAP_V_LEAVING: "parasite.leaving",
    lib.SNAP_V_UNBLOCKED: "parasite.unblocked",
    lib.SNAP_V_PARKED: "parasite.parked",
}
"""The instants at which snap may die in the loop, as fault points."""


class Thread(Protocol):
    """What a visit needs to know; checkpoint.context.FrozenTask has it. All were read together with the leader."""

    tid: int
    regs: Regs
    facts: ThreadFacts

    def infect(self) -> RemoteTask:
        """The slow way."""


def visit(leader: RemoteTask, threads: Sequence[Thread], batch: Batch) -> list[Results]:
    """What the batch gives in each of these threads, none of which is infected.

    Args:
        leader: another thread of their process, infected; it is not inside any more afterwards.
        threads: all stopped, their registers those to go on with (no rseq critical section).
        batch: without children and undo entries.
    """
    if not threads:
        return []
    place = None
    if isinstance(leader, InfectedTask):
        place = _common_place(leader, threads)
    quick: dict[int, tuple[int, bool]] = {}
    if place is not None:
        quick = {at: way for at, thread in enumerate(threads) if (way := _signal(thread))}
    found: dict[int, Results] = {}
    if quick and place is not None:
        assert isinstance(leader, InfectedTask)
        chosen = [threads[at] for at in quick]
        found = dict(zip(quick, _run(leader, place, chosen, list(quick.values()), batch), strict=True))
    return [found[at] if at in found else thread.infect().run(batch) for at, thread in enumerate(threads)]


def _common_place(leader: InfectedTask, threads: Sequence[Thread]) -> frames.Place | None:
    """Where the frames of one after the other can be: not on a stack of theirs. The leader's area gets mapped."""
    leader.enter()
    space = leader.space
    need = max(frames.size(frames.used_xstate(thread.facts.xstate)) for thread in threads)
    leader.park()
    try:
        place = frames.choose(
            space.maps, leader.mem, 0, need, space.stacks, live_frames(), where=leader.where
        )
    except UnsupportedError:
        return None
    return place if len(place.saved) <= lib.SNAP_FRAMES_MOST else None


def _signal(thread: Thread) -> tuple[int, bool] | None:
    """What may announce the end of its batch, and whether the thread blocks it; None: not this way."""
    facts = thread.facts
    if not thread.regs.is_64bit or facts.word(b"Seccomp") or b"shstk" in facts.line(b"x86_Thread_features"):
        return None
    blocked = facts.word(b"SigBlk", 16) | facts.sigmask
    caught = facts.word(b"SigCgt", 16)
    if sig := quiet_signal(facts.word(b"SigIgn", 16), caught, blocked):
        return sig, False
    sig = blocked_signal(caught, facts.word(b"SigPnd", 16) | facts.word(b"ShdPnd", 16))
    return (sig, True) if sig else None


def _run(
    leader: InfectedTask,
    place: frames.Place,
    threads: Sequence[Thread],
    signals: Sequence[tuple[int, bool]],
    batch: Batch,
) -> list[Results]:
    space, area = leader.space, leader.area
    (piece,) = encoding.split(batch, area.half)
    data_at = area.data + 2 * area.half
    raw = bytes(encoding.encode(batch, piece, data_at, Ending(sig=1), [encoding.NOT_RUN] * len(batch)))
    data = bytes(encoding.encode_data(batch))
    plan = ffi.new("struct snap_visits *")
    plan.mem_fd = leader.mem.fileno()
    plan.place, plan.room, plan.second = place.address, len(place.saved), place.context_only - place.address
    plan.area, plan.area_size, plan.entries, plan.data = area.start, area.size, area.data, data_at
    plan.nr_bytes, plan.nr_data = len(raw), len(data)
    plan.syscall_ret, plan.sigreturn = space.gadgets.syscall_ret, space.gadgets.sigreturn
    plan.nr_munmap = syscalls.number("munmap")
    plan.limit_ms = int(leader.limit_s * 1000)
    table = ffi.new("struct snap_visit[]", len(threads))
    for one, thread, sig in zip(table, threads, signals, strict=True):
        facts = thread.facts
        one.tid = thread.tid
        one.sig, one.blocked = sig
        one.inner_pid = int(facts.line(b"NStgid").split()[-1])
        one.inner_tid = int(facts.line(b"NSpid").split()[-1])
        own = ffi.buffer(one.own)
        own[:] = bytes(thread.regs)
        resume = thread.regs
        if resume.in_syscall:
            resume = interrupted.resumable(resume, leader.mem)
        ffi.buffer(one.resume)[:] = bytes(resume)
        one.mask = facts.sigmask
        one.xstate_at, one.xstate_used = facts.xstate_at, frames.used_xstate(facts.xstate)
    each = len(raw) + len(data)
    out = ffi.new("char[]", each * len(threads))
    steps = _Steps()
    error = lib.snap_visit_threads(
        plan, table, len(threads), ffi.from_buffer(threads[0].facts.room), frames.MAGIC, len(frames.MAGIC), raw, data,
        out, steps.callback,
    )  # fmt: skip
    if plan.lost:
        space.lost_tid = threads[plan.at].tid  # its frames stay where they are
    elif not plan.gone:
        leader.mem.write(place.address, place.saved)
    if steps.raised is not None:
        raise steps.raised
    if error:
        _fail(leader, plan, threads[plan.at], error)
    view = ffi.buffer(out)
    return [
        _results(batch, piece, view[at * each : (at + 1) * each], len(raw), thread.tid)
        for at, thread in enumerate(threads)
    ]


def _results(batch: Batch, piece: encoding.Piece, raw: bytes, nr_bytes: int, tid: int) -> Results:
    results = [encoding.NOT_RUN] * len(batch)
    stopped = encoding.decode(raw[:nr_bytes], piece, results)
    if stopped < len(piece.indices):
        index = piece.indices[stopped]
        raise encoding.failure(batch, index, results[index], tid)
    return Results(batch, results, raw[nr_bytes:])


def _fail(leader: RemoteTask, plan: Any, thread: Thread, error: int) -> None:
    where = f"task {thread.tid}"
    if plan.lost:
        raise lost(leader.pid, thread.tid)
    if plan.gone:
        raise TargetGoneError("it ended while it was worked with", where=where)
    if plan.stop_signal:
        raise SnapshotterError(f"signal {plan.stop_signal} while running a batch", where=where)
    raise SnapshotterError(f"cannot run a batch in it: {os.strerror(error)}", where=where)


class _Steps:
    """Fault points of the loop; no call back where none is selected."""

    def __init__(self) -> None:
        self.raised: BaseException | None = None
        self.callback: Any = ffi.NULL
        if faults.selected():
            self.callback = ffi.callback("int(int)", self._passed)

    def _passed(self, step: int) -> int:
        try:
            faults.point(STEPS[step])
        except BaseException as error:  # it must cross C first
            self.raised = error
            return 1
        return 0
