"""membarrier(2): what a process has registered for, without which its barriers fail with EPERM.

Linux 6.3 can say it (MEMBARRIER_CMD_GET_REGISTRATIONS). Before, each private barrier is tried, which says EPERM to who has not registered; and
every process is registered for the global one, which nobody can ask about and which costs nothing but an interrupt of those who
would have got it.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from checkpoint.kernel import sys as ksys

if TYPE_CHECKING:
    from checkpoint.parasite import Batch, Ref, Results

_REGISTER_GLOBAL = 1 << 2
_PRIVATE = (1 << 3, 1 << 5, 1 << 7)
"""PRIVATE_EXPEDITED, _SYNC_CORE, _RSEQ; the command that registers for each is the next bit."""
_GET_REGISTRATIONS = 1 << 9


@functools.cache
def _commands() -> int:
    """What this kernel knows; 0: it has no membarrier(2)."""
    try:
        return ksys.syscall("membarrier", 0, 0, 0)
    except OSError:
        return 0


@functools.cache
def _can_say() -> bool:
    try:
        ksys.syscall("membarrier", _GET_REGISTRATIONS, 0, 0)
    except OSError:
        return False
    return True


@dataclass(frozen=True, slots=True)
class Asked:
    """What the leader's batch asks for its process."""

    registrations: Ref | None
    tried: list[tuple[int, Ref]]


def ask(batch: Batch) -> Asked:
    """Add the question to the batch."""
    if _can_say():
        return Asked(batch.call("membarrier", _GET_REGISTRATIONS, 0, 0, check=False), [])
    known = [command for command in _PRIVATE if _commands() & command]
    return Asked(None, [(one, batch.call("membarrier", one, 0, 0, check=False)) for one in known])


def answer(results: Results, asked: Asked) -> int:
    """The commands that register for what the process has registered for."""
    if asked.registrations is not None:
        return max(results[asked.registrations], 0)
    private = sum(command << 1 for command, ref in asked.tried if results[ref] == 0)
    return private | (_commands() & _REGISTER_GLOBAL)


def restore(batch: Batch, registrations: int) -> None:
    """By the leader, all threads being there."""
    for bit in range(32):
        if registrations >> bit & 1:
            batch.call("membarrier", 1 << bit, 0, 0)
