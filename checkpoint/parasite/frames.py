"""The fail-safe frames: what a task returns through when its tracer dies.

Owns where they lie and what they say. Two signal frames one after the other:

    [magic][frame 1: munmap(area) through `syscall; ret`][frame 2: the interrupted context, vector state included]

A task whose rsp points at a frame's start and that executes `ret` (or at start + 8 and executes rt_sigreturn) takes
that frame. Frame 1 returns into munmap, whose `ret` takes frame 2, which returns to the job.

They lie at the low end of the main thread's stack mapping, on pages that were never touched (all zero), because
memory below a task's own rsp is not free in every program: a goroutine's stack has no room for a signal frame and
ends in other objects. Where there is no such mapping they go below the red zone of the task's own stack.
"""

from __future__ import annotations

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
_ALIGN = 64
_FIRST = _ALIGN
_SECOND: int = _FIRST + (-(-lib.snap_frame_size(0) // _ALIGN)) * _ALIGN
_RED_ZONE = 128
_PAGE = 4096
_STACK_RESERVE = 16 * _PAGE
"""Never nearer than this to the used part of the main stack."""


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
        return self.address + _SECOND


def size(xstate_used: int) -> int:
    """Bytes that the frames take with so much vector state."""
    return _SECOND + int(lib.snap_frame_size(xstate_used))


def used_xstate(xstate: bytes) -> int:
    """Bytes of the blob that are in use (others are initial). UnsupportedError when it makes no sense."""
    used = int(lib.snap_xstate_used(xstate, len(xstate)))
    if not used:
        raise UnsupportedError("its vector state has a format that is not known")
    return used


def build(
    address: int, regs: Regs, sigmask: int, xstate: bytes, used: int, gadgets: Gadgets, area: Area | None
) -> bytes:
    """The bytes of magic and both frames for `address`. `regs` are those to return to. area None: frame 1 only
    leads to frame 2 (munmap of nothing is not asked for).
    """
    out = ffi.new("char[]", size(used))
    ffi.buffer(out)[: len(MAGIC)] = MAGIC
    first = regs.copy()
    first.rsp = address + _SECOND
    first.rip = gadgets.syscall_ret
    if area is not None:
        first.rax, first.rdi, first.rsi = syscalls.number("munmap"), area.start, area.size
    else:
        # straight into the restorer, as if the call had returned
        first.rip, first.rsp = gadgets.sigreturn, address + _SECOND + 8
    _put(out, address, _FIRST, first, 2**64 - 1, gadgets.sigreturn, b"", 0)
    _put(out, address, _SECOND, regs, sigmask, gadgets.sigreturn, xstate, used)
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
    maps: Sequence[MapsEntry], mem: ProcMem, rsp: int, need: int, taken: Collection[int] = (), *, where: str
) -> Place:
    """A place for `need` bytes that nothing else uses; `taken` are other live frames. UnsupportedError when there is none."""
    for entry in maps:
        if entry.path != "[stack]" or not entry.writable or entry.shared:
            continue
        limit = entry.end - _STACK_RESERVE
        if entry.start <= rsp < entry.end:
            limit = min(limit, rsp - _STACK_RESERVE)
        room = -(-need // _PAGE) * _PAGE
        for at in range(entry.start, limit - room + 1, _PAGE):
            if any(at < other + room and other < at + room for other in taken):
                continue
            try:
                content = mem.read(at, need)
            except OSError:
                continue
            if content.startswith(MAGIC):  # of a snap that was killed: ours again
                return Place(at, bytes(need))
            if not any(content):
                return Place(at, content)
    at = (rsp - _RED_ZONE - need) & ~(_ALIGN - 1)
    for entry in maps:
        if entry.start <= at - _STACK_RESERVE and rsp <= entry.end and entry.writable and not entry.shared:
            return Place(at, mem.read(at, need))
    raise UnsupportedError(
        "there is no memory of its own where its registers could be kept safe", where=where,
        hint="it has neither a main stack mapping nor 64 KiB of room below its stack pointer",
    )  # fmt: skip
