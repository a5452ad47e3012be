"""A stopped task that runs batches: what infected tasks and restore stubs have in common.

Owns the area in the target (one code page, then data) and the way a batch goes through it. Half of the room for
entries and for data is in use at a time: while snap writes the next batch, the last one stays whole, because the
blob reads its undo entries if snap dies in that moment.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, ClassVar

from parasite_c._native import ffi, lib

from checkpoint.kernel import proc, ptrace, syscalls
from checkpoint.kernel import sys as ksys
from checkpoint.kernel.ptrace import Regs
from checkpoint.parasite import batch as encoding
from checkpoint.parasite.batch import Arg, Batch, Ending, RemoteCallError, Results
from snapshotter.base import faults
from snapshotter.base.errors import SnapshotterError, TargetGoneError

if TYPE_CHECKING:
    from checkpoint.kernel.mem import ProcMem

CODE_SIZE: int = lib.SNAP_CODE_SIZE
MAGIC_SIZE: int = lib.SNAP_MAGIC_SIZE
STACK_SIZE = 16384
MIN_DATA_SIZE = 65536

ALL_SIGNALS = 2**64 - 1
_EFLAGS = 0x202
"""Interrupts on, direction and trap flags clear."""


@cache
def blob() -> bytes:
    """The parasite's code, as built."""
    return files("parasite_c").joinpath("blob.bin").read_bytes()


@dataclass(frozen=True, slots=True)
class Area:
    """Where the parasite is in a target: [start, start + CODE_SIZE) code, data up to end."""

    start: int
    size: int

    @property
    def end(self) -> int:
        return self.start + self.size

    @property
    def data(self) -> int:
        return self.start + CODE_SIZE

    @property
    def stack_top(self) -> int:
        return self.end

    @property
    def half(self) -> int:
        """Bytes of each of the four rooms: entries A and B, data A and B."""
        return ((self.size - CODE_SIZE - STACK_SIZE) // 4) & ~4095


class LostTaskError(SnapshotterError):
    """A remote call did not come back: the task is inside the kernel, and out of reach until it does."""

    code = "lost_task"


def lost(pid: int, tid: int) -> LostTaskError:
    """The error of a task that did not come back, saying where it is."""
    try:
        place = proc.wchan(pid, tid) or "?"
    except (OSError, SnapshotterError):
        place = "?"
    return LostTaskError(
        f"a system call made in it does not come back (it waits in the kernel at {place})",
        where=f"task {tid}",
        hint="it goes on, unharmed, when that call returns and this snap has ended; a file server that is away?",
    )


class RemoteTask:
    """A ptrace-stopped task that can run system calls: one with call(), many with batch() and run().

    Only the thread that seized the task may use it. Values are raw 64 bit; results are signed. A signal that comes while a call
    runs (Ctrl-C) is heeded when it has come back, or after a second.
    """

    limit_s: ClassVar[float] = 0
    """How long a batch may take, in seconds; 0: as long as it takes."""

    def __init__(self, tid: int, pid: int, mem: ProcMem, area: Area | None = None) -> None:
        self.tid = tid
        self.pid = pid
        self.mem = mem
        self._area = area
        self._turn = 0
        self._template: Regs | None = None
        self._entries_turn = 0
        self._ending = Ending()
        self._one_at_a_time = False
        self._state = ffi.new("struct snap_drive *")
        self.new_tid = 0
        """The task that the last batch made, where PTRACE_O_TRACECLONE and its like tell."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}(tid={self.tid}, pid={self.pid})"

    @property
    def where(self) -> str:
        return f"task {self.tid}"

    @property
    def is_lost(self) -> bool:
        """It did not come back from what it was sent to do."""
        return bool(self._state.outcome == lib.SNAP_DRIVE_RUNNING)

    @property
    def area(self) -> Area:
        if self._area is None:
            raise SnapshotterError("nothing is mapped in it to run batches from", where=self.where)
        return self._area

    def batch(self) -> Batch:
        """An empty batch."""
        return Batch()

    def call(self, name: str, *args: Arg) -> int:
        """One system call; RemoteCallError (an OSError) when it fails."""
        single = Batch()
        ref = single.call(name, *args)
        return self.run(single)[ref]

    def make_descriptor(self, name: str, *args: Arg, fault: str = "") -> int:
        """One system call that makes a descriptor, which is fetched and closed in the task; ours to close.

        `fault` names the fault point between the two. Raises OSError: the call's, or pidfd_getfd's.
        """
        batch = self.batch()
        made = batch.call(name, *args)
        # By itself, if snap dies before the next batch: a job with such a descriptor would be refused from then on.
        batch.undo("close", made)
        number = self.run(batch)[made]
        if fault:
            faults.point(fault)
        try:
            pidfd = os.pidfd_open(self.pid)
            try:
                return ksys.pidfd_getfd(pidfd, number)
            finally:
                os.close(pidfd)
        finally:
            with contextlib.suppress(TargetGoneError):
                self.call("close", number)

    def run(self, batch: Batch) -> Results:
        """Run a batch to its end or to its first failure, which is raised as RemoteCallError.

        Raises ValueError when its data does not fit into the area, TargetGoneError when the task died, LostTaskError when it
        does not come back.
        """
        self._enter()
        half = self.area.half
        if batch.size_bytes > half:
            raise ValueError(f"a batch has {batch.size_bytes} bytes of data, there is room for {half}")
        turn = self._turn = self._turn ^ 1
        data = self.area.data + (2 + turn) * half
        results = [encoding.NOT_RUN] * len(batch)
        if batch.size_bytes:
            self.mem.write(data, encoding.encode_data(batch))
        self.new_tid = 0
        for piece in encoding.split(batch, half, single=self._one_at_a_time):
            slot = self.area.data + self._slot() * half
            raw = encoding.encode(batch, piece, data, self._ending, results)
            self.mem.write(slot, raw)
            faults.point("parasite.written")
            self._go(slot)
            faults.point("parasite.ran")
            stopped = encoding.decode(bytearray(self.mem.read(slot, len(raw))), piece, results)
            if stopped < len(piece.indices):
                index = piece.indices[stopped]
                raise encoding.failure(batch, index, results[index], self.tid)
        return Results(batch, results, self.mem.read(data, batch.size_bytes) if batch.size_bytes else b"")

    def _slot(self) -> int:
        """The room for entries that the last piece did not use."""
        self._entries_turn ^= 1
        return self._entries_turn

    def _enter(self) -> None:
        """Make the task ready to be sent into the blob."""

    def _registers(self) -> Regs:
        """Registers to start from: segment bases must stay the task's own."""
        if self._template is None:
            self._template = ptrace.getregs(self.tid)
        return self._template.copy()

    def _go(self, slot: int) -> None:
        regs = self._registers()
        regs.rip = self.area.start
        regs.rdi = slot
        regs.rsp = self.area.stack_top
        regs.rax = 0
        regs.orig_rax = ptrace.NOT_IN_SYSCALL
        regs.eflags = _EFLAGS
        ptrace.setregs(self.tid, regs)
        faults.point("parasite.started")
        if self._ending.sig:
            self._drive_signal(slot + encoding.STOPPED_AT)
        else:
            self._drive(lib.SNAP_SENTINEL)

    def gadget_call(self, gadget: int, rsp: int, name: str, *args: int) -> int:
        """One system call through a `syscall` instruction of the target's own; leaves it at the call's exit."""
        regs = self._registers()
        regs.rip = gadget
        regs.rsp = rsp
        regs.rax = syscalls.number(name)
        regs.orig_rax = ptrace.NOT_IN_SYSCALL
        regs.eflags = _EFLAGS
        for register, value in zip(
            ("rdi", "rsi", "rdx", "r10", "r8", "r9"), (*args, *[0] * (6 - len(args))), strict=True
        ):
            setattr(regs, register, value & ALL_SIGNALS)
        ptrace.setregs(self.tid, regs)
        self._drive(syscalls.number(name))
        result = ptrace.getregs(self.tid).rax
        value = int(result) - 2**64 if result >= 2**63 else int(result)
        if encoding.is_error(value):
            raise RemoteCallError(name, -value, self.tid)
        return value

    def _drive(self, until: int) -> None:
        self._outcome(lib.snap_drive_until(self.tid, until, self._limit_ms, self._state))

    def _drive_signal(self, ended: int) -> None:
        ending = self._ending
        self._outcome(
            lib.snap_drive_signal(self.tid, ending.sig, ending.blocked, ended, self._limit_ms, self._state)
        )

    @property
    def _limit_ms(self) -> int:
        return int(self.limit_s * 1000)

    def _outcome(self, error: int) -> None:
        state = self._state
        if self.is_lost:
            raise lost(self.pid, self.tid)
        if error:
            raise SnapshotterError(f"cannot drive it: errno {-error}", where=self.where)
        if state.new_tid:
            self.new_tid = state.new_tid
        if state.outcome == lib.SNAP_DRIVE_DONE:
            return
        if state.outcome == lib.SNAP_DRIVE_GONE:
            raise TargetGoneError("it ended while it was worked with", where=self.where)
        self._faulted(ptrace.WaitStatus(self.tid, state.status).stop_signal)

    def _faulted(self, sig: int) -> None:
        raise SnapshotterError(f"signal {sig} while running a batch", where=self.where)
