"""The fail-safe frames: what a task returns through when its tracer dies.

Owns where they lie and what they say. Two signal frames one after the other:

    [magic][frame 1: munmap(area) through `syscall; ret`][frame 2: the interrupted context, vector state included][magic]

A task whose rsp points at a frame's start and that executes `ret` (or at start + 8 and executes rt_sigreturn) takes
that frame. Frame 1 returns into munmap, whose `ret` takes frame 2, which returns to the job.

Where they lie, the first that there is:

1. near the low end of the main thread's stack mapping, on pages that were never touched (all zero), 64 KiB from where
   any thread of the process stands;
2. for the task that stands lowest in that mapping, right below its red zone, where a signal's frame would go too;
3. for any other, below that mapping, which the kernel extends when it is written to;
4. below the red zone of the task's own stack, if 64 KiB of the mapping lie below.

Own stacks come last because memory below a task's rsp is not free in every program: a goroutine's stack has no room
for a signal frame and ends in other objects.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from parasite_c._native import ffi, lib

from checkpoint.kernel import syscalls
from snapshotter.base.errors import UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from checkpoint.kernel.mem import ProcMem
    from checkpoint.kernel.proc import MapsEntry
    from checkpoint.kernel.ptrace import Regs
    from checkpoint.parasite.gadgets import Gadgets
    from checkpoint.parasite.remote import Area

MAGIC = b"snap-frames\0\0\0\0\1"
ALIGN = 64
_FIRST = ALIGN
SECOND: int = _FIRST + (-(-lib.snap_frame_size(0) // ALIGN)) * ALIGN
_RED_ZONE = 128
_PAGE = 4096
_CALL_AT = len(MAGIC)
"""Where the number of a call is noted that was cut short, plus 1; 0: none."""
_HANDLER_ROOM = 8 * _PAGE
"""Below frames at the low end: should snap die in the instants where a task's registers are those of the way out and
its signals not blocked, the handler of one that is pending runs there.
"""
_STACK_RESERVE = 16 * _PAGE
"""Never nearer than this to the used part of a stack that other tasks may go on to use while a task leaves."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where the frames of one task are (or will be)."""

    address: int
    saved: bytes
    """What was there."""

    @property
    def unmap_first(self) -> int:
        return self.address + _FIRST

    @property
    def context_only(self) -> int:
        return self.address + SECOND


def size(xstate_used: int) -> int:
    """Bytes that the frames take with so much vector state."""
    return SECOND + int(lib.snap_frame_size(xstate_used))


def noted_call(frame: int, mem: ProcMem) -> int | None:
    """The number of the call that the context of this second frame was in when its result was cut short; None: of none."""
    with contextlib.suppress(OSError):
        head = mem.read(frame - SECOND, _CALL_AT + 8)
        noted = int.from_bytes(head[_CALL_AT:], "little")
        if head.startswith(MAGIC) and noted:
            return noted - 1
    return None


def is_ours(frame: int, mem: ProcMem) -> bool:
    """Whether a frame that build() made starts at this address, by the magic before both."""
    for back in (_FIRST, SECOND):
        with contextlib.suppress(OSError):
            if mem.read(frame - back, len(MAGIC)) == MAGIC:
                return True
    return False


def used_xstate(xstate: bytes | memoryview) -> int:
    """Bytes of the blob that are in use (others are initial). UnsupportedError when it makes no sense."""
    used = int(lib.snap_xstate_used(ffi.from_buffer(xstate), len(xstate)))
    if not used:
        raise UnsupportedError("its vector state has a format that is not known")
    return used


def build(
    place: Place,
    regs: Regs,
    sigmask: int,
    xstate: bytes,
    used: int,
    gadgets: Gadgets,
    area: Area | None,
    *,
    call: int | None = None,
) -> bytes:
    """The bytes of magic and both frames for a place, all of it. `regs` are those to return to. area None: frame 1 only
    leads to frame 2 (munmap of nothing is not asked for). `call` is noted for noted_call().
    """
    address, room = place.address, len(place.saved)
    out = ffi.new("char[]", room)
    ffi.buffer(out)[: len(MAGIC)] = MAGIC
    if call is not None:
        ffi.buffer(out)[_CALL_AT : _CALL_AT + 8] = (call + 1).to_bytes(8, "little")
    if room - size(used) >= len(MAGIC):
        ffi.buffer(out)[room - len(MAGIC) :] = MAGIC
    first = regs.copy()
    first.rsp = address + SECOND
    first.rip = gadgets.syscall_ret
    if area is not None:
        first.rax, first.rdi, first.rsi = syscalls.number("munmap"), area.start, area.size
    else:
        # straight into the restorer, as if the call had returned
        first.rip, first.rsp = gadgets.sigreturn, address + SECOND + 8
    _put(out, address, _FIRST, first, 2**64 - 1, gadgets.sigreturn, b"", 0)
    _put(out, address, SECOND, regs, sigmask, gadgets.sigreturn, xstate, used)
    return bytes(ffi.buffer(out))


def _put(
    out: object, address: int, offset: int, regs: Regs, mask: int, restorer: int, xstate: bytes, used: int
) -> None:
    raw = ffi.from_buffer("char[]", bytes(regs))
    lib.snap_put_frame(
        ffi.cast("char *", out) + offset, address + offset, ffi.cast("struct snap_regs *", raw), mask, restorer,
        xstate, used,
    )  # fmt: skip


def choose(
    maps: Sequence[MapsEntry],
    mem: ProcMem,
    rsp: int,
    need: int,
    stacks: Collection[int],
    taken: Collection[int] = (),
    *,
    where: str,
) -> Place:
    """A place for `need` bytes, or a little more, that nothing else uses.

    Args:
        maps: the mappings of the process.
        mem: its memory.
        rsp: where the task stands.
        need: bytes.
        stacks: where every thread of the process stands, this one included.
        taken: other live frames.
        where: for the error.

    Raises:
        UnsupportedError: there is no such place.
    """
    for entry in maps:
        if entry.path != "[stack]" or not entry.writable or entry.shared:
            continue
        inside = [at for at in (rsp, *stacks) if entry.start <= at < entry.end]
        place = _low_end(entry, mem, need, inside, taken)
        if place is None and rsp in inside and rsp == min(inside):
            place = _extended(mem, (rsp - _RED_ZONE - need) & -ALIGN, need, entry.start)
        elif place is None:
            # Where no thread stands in it, the main one may still return to its low end.
            lowest = min(inside, default=entry.start)
            at = (min(entry.start, lowest - _STACK_RESERVE) - _room(need)) & -_PAGE
            while _is_taken(mem, at, _room(need), taken):
                at -= _room(need)
            place = _extended(mem, at, _room(need), entry.start, below=_HANDLER_ROOM)
        if place is not None:
            return place
    at = (rsp - _RED_ZONE - need) & -ALIGN
    for entry in maps:
        if entry.start <= at - _STACK_RESERVE and rsp <= entry.end and entry.writable and not entry.shared:
            return Place(at, mem.read(at, need))
    raise UnsupportedError(
        "there is no memory of its own where its registers could be kept safe", where=where,
        hint="its main stack is full (ulimit -s), and 64 KiB of room are not below its stack pointer",
    )  # fmt: skip


def _room(need: int) -> int:
    """Whole pages, with the second magic: that of the start may go under in what a signal's handler leaves behind."""
    return -(-(need + len(MAGIC)) // _PAGE) * _PAGE


def _low_end(
    stack: MapsEntry, mem: ProcMem, need: int, inside: Collection[int], taken: Collection[int]
) -> Place | None:
    """Pages near the low end of the mapping, if nothing is there: what lies beyond used ones may be anybody's."""
    room = _room(need)
    limit = min([stack.end, *inside]) - _STACK_RESERVE
    first = stack.start
    if inside:
        # Where it is not known what the main thread uses, as low as can be.
        first += max(0, min(_HANDLER_ROOM, limit - room - stack.start)) & -_PAGE
    for at in range(first, limit - room + 1, _PAGE):
        try:
            if _is_taken(mem, at, room, taken):
                continue
            content = mem.read(at, room)
        except OSError:
            return None
        if content.startswith(MAGIC) or content.endswith(MAGIC):  # of a snap that was killed: ours again
            return Place(at, bytes(room))
        return None if any(content) else Place(at, content)
    return None


def _is_taken(mem: ProcMem, at: int, room: int, taken: Collection[int]) -> bool:
    """Whether live frames are in the way. Those of another process need not be there: only some share their memory."""
    return any(at - room < other < at + room and mem.read(other, len(MAGIC)) == MAGIC for other in taken)


def _extended(mem: ProcMem, at: int, need: int, start: int, *, below: int = 0) -> Place | None:
    """A place whose part below the mapping that begins at `start` is made by writing there, and `below` bytes more. None
    where the kernel does not let it grow (its limit, or another mapping).
    """
    if at >= start:
        return Place(at, mem.read(at, need))
    try:
        mem.write(at - below, bytes(min(need, start - at)))
        return Place(at, mem.read(at, need))
    except OSError:
        return None
