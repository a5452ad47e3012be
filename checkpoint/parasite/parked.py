"""Parking: a stopped task is left without a tracer, so that another process can take it over before it runs any code of its own.

A task cannot be handed from one tracer to another. So it sleeps in poll(2), made through a `syscall; ret` of its own code, with all
signals blocked and its fail-safe frame right behind: nobody comes, and it goes on in its own registers after
`PATIENCE_MS`. Whoever comes in time gives them to it himself. A task that is stopped (SIGSTOP) meanwhile sleeps longer.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from parasite_c._native import lib

from checkpoint.kernel import proc, ptrace, syscalls
from checkpoint.parasite import frames, gadgets
from checkpoint.parasite.infection import code_ranges
from checkpoint.parasite.remote import ALL_SIGNALS
from snapshotter.base import faults
from snapshotter.base.errors import UnsupportedError

if TYPE_CHECKING:
    from checkpoint.kernel.mem import ProcMem
    from checkpoint.kernel.ptrace import Regs

PATIENCE_MS = 10_000
"""A machine with fifty runnable tasks for each CPU needs more than two seconds to start the process that comes."""


class Context(Protocol):
    """What a stopped task is to go on with."""

    @property
    def tid(self) -> int: ...
    @property
    def pid(self) -> int: ...
    @property
    def regs(self) -> Regs: ...
    @property
    def sigmask(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Parked:
    """Where a parked task is."""

    place: frames.Place
    content: bytes
    """The frames."""
    result_at: int
    """Where in them the result of its call is."""
    regs: Regs
    """What it sleeps with."""
    gadgets: gadgets.Gadgets


def park(
    task: Context, mem: ProcMem, *, call: int, stacks: Collection[int], taken: Collection[frames.Place] = ()
) -> Parked:
    """Send a stopped task to sleep; it is still stopped then, and sleeps as soon as it is let go.

    Args:
        task: it, with the registers and the mask to go on with.
        mem: its memory.
        call: the number of the call that its registers show the result of.
        stacks: where every thread of its process stands.
        taken: places of others that are parked in the same process.

    Raises:
        UnsupportedError: it cannot be parked; nothing was changed.
    """
    where = f"task {task.tid}"
    if not task.regs.is_64bit:
        raise UnsupportedError("it runs 32-bit code", where=where)
    maps = proc.read_maps(task.pid)
    found = gadgets.find(code_ranges(maps), mem.read, where=where)
    xstate = ptrace.get_xstate(task.tid)
    used = frames.used_xstate(xstate)
    need = frames.size(used)
    others = [other.address for other in taken]
    place = frames.choose(maps, mem, int(task.regs.rsp), need, stacks, others, where=where)
    end = place.address + len(place.saved)
    if any(place.address < other.address + len(other.saved) and other.address < end for other in taken):
        raise UnsupportedError("there is no room for another parked thread", where=where)
    own = task.regs.copy()
    own.orig_rax = ptrace.NOT_IN_SYSCALL
    content = frames.build(place, own, task.sigmask, xstate, used, found, None, call=call)
    asleep = task.regs.copy()
    asleep.rip, asleep.rsp = found.syscall_ret, place.context_only
    asleep.rax, asleep.orig_rax = syscalls.number("poll"), ptrace.NOT_IN_SYSCALL
    asleep.rdi = asleep.rsi = 0
    asleep.rdx = PATIENCE_MS
    mem.write(place.address, content)
    faults.point("parked.frames")
    ptrace.set_sigmask(task.tid, task.sigmask)  # ends sigsuspend's and its like
    ptrace.setregs(task.tid, asleep)
    faults.point("parked.redirected")
    ptrace.set_sigmask(task.tid, ALL_SIGNALS)
    faults.point("parked.blocked")
    return Parked(place, content, frames.SECOND + int(lib.snap_frame_result_at()), asleep, found)
