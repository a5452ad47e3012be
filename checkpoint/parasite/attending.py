"""Attendants: processes that stay with one task until a system call has ended that a freeze has cut short.

Owns starting them (parasite_c/attendant.c), knowing one when it traces a task that is wanted, and asking it to give the task back.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from parasite_c._native import ffi

from checkpoint.kernel import proc
from checkpoint.parasite.frames import Place
from checkpoint.parasite.gadgets import MAX_SIGRETURN
from checkpoint.parasite.parked import PATIENCE_MS, Context, Parked, park
from snapshotter.base import faults
from snapshotter.base.errors import SnapshotterError

if TYPE_CHECKING:
    from checkpoint.kernel.cut_short import Rest
    from checkpoint.kernel.mem import ProcMem

BINARY = Path(__file__).resolve().parents[2] / "parasite_c" / "attendant.bin"
_GIVE_BACK_S = 2.0
_START_S = PATIENCE_MS / 1000


@dataclass(frozen=True, slots=True)
class Waiting:
    """A parked task and what an attendant is to do with it."""

    pid: int
    tid: int
    message: bytes
    place: Place
    """Where its frames are."""


def send_to_wait(
    task: Context, rest: Rest, mem: ProcMem, *, stacks: Collection[int], taken: Collection[Place] = ()
) -> Waiting:
    """Park a stopped task whose call has something left. To be let go at once, and given to start() then.

    Raises:
        UnsupportedError: it cannot be parked; it has its own registers, and its call will be seen to be cut short.
    """
    parked = park(task, mem, call=rest.cut, stacks=stacks, taken=taken)
    return Waiting(task.pid, task.tid, _message(task, rest, parked), parked.place)


def _message(task: Context, rest: Rest, parked: Parked) -> bytes:
    told = ffi.new("struct snap_attended *")
    told.tid = task.tid
    told.nr_pieces = len(rest.pieces)
    ffi.buffer(told.regs)[:] = bytes(task.regs)
    told.sigmask = task.sigmask
    ffi.buffer(told.parked)[:] = bytes(parked.regs)
    told.restorer, told.restorer_length = parked.gadgets.sigreturn, MAX_SIGRETURN
    told.frames_at, told.frames_length = parked.place.address, len(parked.content)
    told.result_at = parked.result_at
    told.nr = rest.nr
    for at, value in enumerate(rest.args):
        told.args[at] = value
    told.address_arg, told.length_arg = rest.address_arg, rest.length_arg
    pieces = ffi.new("struct snap_piece[]", [{"address": at, "length": size} for at, size in rest.pieces])
    return bytes(ffi.buffer(told)) + parked.content + parked.place.saved + bytes(ffi.buffer(pieces))


def start(waiting: Collection[Waiting]) -> None:
    """Give each of them its attendant. One that gets none goes on with its short count."""
    for one in waiting:
        faults.point("attend.parked")
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            mem = os.open(f"/proc/{one.pid}/mem", os.O_RDWR | os.O_CLOEXEC)
            try:
                subprocess.run(
                    [str(BINARY)], input=one.message, stdout=mem, stderr=subprocess.DEVNULL, cwd="/", env={},
                    start_new_session=True, timeout=_START_S, check=False,
                )  # fmt: skip
            finally:
                os.close(mem)
        faults.point("attend.started")


def is_attendant(tracer: int) -> bool:
    """Whether this process is an attendant, ours or another snap's."""
    try:
        program = os.readlink(f"/proc/{tracer}/exe").removesuffix(" (deleted)")
        return os.path.basename(program) == BINARY.name and os.stat(f"/proc/{tracer}").st_uid == os.geteuid()
    except OSError:
        return False


def dismiss(pid: int, tid: int) -> bool:
    """Have the attendant of a task, if it has one, give it back; False: it has none, or does not obey.

    The task is then parked, with the result so far, or has ended its call.
    """
    deadline = time.monotonic() + _GIVE_BACK_S
    told = 0
    while True:
        try:
            tracer = proc.read_status(pid, tid).tracer_pid
        except SnapshotterError:
            return False
        if not tracer:
            return bool(told)
        if tracer != told:
            if not is_attendant(tracer):
                return False
            with contextlib.suppress(ProcessLookupError):
                os.kill(tracer, signal.SIGTERM)
            told = tracer
        if time.monotonic() > deadline:
            return False
        time.sleep(0.0001)
