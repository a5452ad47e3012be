"""Signals: actions, pending ones (private and shared, with their siginfo), alternate stacks.

Dump: actions are asked for from inside, but only those that /proc/PID/status does not already say are plain
SIG_DFL, and SIGCHLD, whose flags matter even with SIG_DFL (SA_NOCLDWAIT). Pending signals are peeked, not taken.

Restore: first every pending signal of the stub's own history (SIGCHLD of helpers and zombies) is flushed, then
the actions are set, then the pending signals are queued with everything still blocked: the mask itself is set by
ptrace at the very end (see registers.py). A task may queue any siginfo to itself, so each stub does its own.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from checkpoint.kernel import ptrace
from images import common_pb2, task_pb2

if TYPE_CHECKING:
    from checkpoint.parasite import Batch, Buffer, Results

SIGKILL, SIGCHLD, SIGSTOP = 9, 17, 19
SIG_DFL, SIG_IGN = 0, 1
SA_RESTART = 0x10000000
NR_SIGNALS = 64
ALL_BLOCKED = (1 << 64) - 1

_ACTION = struct.Struct("<QQQQ")  # kernel struct sigaction: handler, flags, restorer, mask
_STACK = struct.Struct("<QiiQ")  # stack_t: ss_sp, ss_flags, padding, ss_size
_SS_ONSTACK, _SS_DISABLE = 1, 2
_SIGINFO_BYTES = 128


def ask_actions(batch: Batch, caught: int, ignored: int) -> list[tuple[int, Buffer]]:
    """Add the rt_sigaction calls that are needed to know every action."""
    asked = []
    wanted = caught | ignored | 1 << (SIGCHLD - 1)
    for signo in range(1, NR_SIGNALS + 1):
        if wanted >> (signo - 1) & 1 and signo not in {SIGKILL, SIGSTOP}:
            buffer = batch.buffer(_ACTION.size)
            batch.call("rt_sigaction", signo, 0, buffer, 8)
            asked.append((signo, buffer))
    return asked


def answer_actions(results: Results, asked: Iterable[tuple[int, Buffer]]) -> list[task_pb2.SignalAction]:
    """Those actions that are not SIG_DFL without flags."""
    actions = []
    for signo, buffer in asked:
        handler, flags, restorer, mask = _ACTION.unpack(results.bytes(buffer)[: _ACTION.size])
        if handler or flags or mask:
            actions.append(
                task_pb2.SignalAction(signo=signo, handler=handler, flags=flags, restorer=restorer, mask=mask)
            )
    return actions


def dump_pending(tid: int, *, shared: bool) -> list[common_pb2.PendingSignal]:
    """Pending signals of a stopped task in queue order; they stay pending."""
    return [common_pb2.PendingSignal(siginfo=info) for info in ptrace.peek_siginfo(tid, shared)]


def ask_altstack(batch: Batch) -> Buffer:
    """Add the sigaltstack call."""
    buffer = batch.buffer(_STACK.size)
    batch.call("sigaltstack", 0, buffer)
    return buffer


def answer_altstack(results: Results, buffer: Buffer, thread: task_pb2.Thread) -> None:
    """Fill the altstack fields; a thread without one keeps SS_DISABLE."""
    thread.altstack_sp, flags, _, thread.altstack_size = _STACK.unpack(results.bytes(buffer)[: _STACK.size])
    thread.altstack_flags = flags & 0xFFFFFFFF


def restore_altstack(batch: Batch, thread: task_pb2.Thread) -> None:
    """Set the alternate stack. The task is not "on" it for the kernel yet: that follows from its rsp."""
    if thread.altstack_flags & _SS_DISABLE or not thread.altstack_size:
        return
    flags = (
        thread.altstack_flags & 0x80000000
    )  # SS_AUTODISARM; SS_ONSTACK is the kernel's answer, not settable
    signed = flags - (1 << 32) if flags & 0x80000000 else flags
    batch.call("sigaltstack", _STACK.pack(thread.altstack_sp, signed, 0, thread.altstack_size), 0)


def restore_actions(batch: Batch, actions: Sequence[task_pb2.SignalAction]) -> None:
    """Set every action. The stub starts with all of them SIG_DFL (its exec made that so)."""
    # Setting SIG_DFL for a signal that is ignored by default discards what is pending: the SIGCHLD of helpers.
    batch.call("rt_sigaction", SIGCHLD, _ACTION.pack(SIG_DFL, 0, 0, 0), 0, 8)
    for action in actions:
        packed = _ACTION.pack(action.handler, action.flags, action.restorer, action.mask)
        batch.call("rt_sigaction", action.signo, packed, 0, 8)


def forget_children(batch: Batch, actions: Sequence[task_pb2.SignalAction]) -> None:
    """Discard the SIGCHLD that the restore itself has caused; the action stays."""
    wanted = next(
        (action for action in actions if action.signo == SIGCHLD), task_pb2.SignalAction(signo=SIGCHLD)
    )
    restore_actions(batch, [wanted])


def restore_pending(
    batch: Batch, pid: int, tid: int, pending: Sequence[common_pb2.PendingSignal], *, shared: bool
) -> None:
    """Queue signals to the calling stub; `shared` only from the leader (tid == pid)."""
    for item in pending:
        info = item.siginfo.ljust(_SIGINFO_BYTES, b"\0")[:_SIGINFO_BYTES]
        signo = struct.unpack_from("<i", info)[0]
        if signo in {SIGKILL, SIGSTOP} or not 1 <= signo <= NR_SIGNALS:
            continue
        if shared:
            batch.call("rt_sigqueueinfo", pid, signo, info)
        else:
            batch.call("rt_tgsigqueueinfo", pid, tid, signo, info)


def interrupting_handler(process: task_pb2.Process, thread: task_pb2.Thread) -> task_pb2.SignalAction | None:
    """The action of a pending, unblocked, caught signal of this thread: it interrupts a restarted call."""
    actions = {action.signo: action for action in process.actions}
    for item in (*thread.pending, *process.shared_pending):
        signo = struct.unpack_from("<i", item.siginfo.ljust(4, b"\0"))[0]
        action = actions.get(signo)
        blocked = thread.sigmask >> (signo - 1) & 1 if signo else 1
        if action is not None and not blocked and action.handler not in {SIG_DFL, SIG_IGN}:
            return action
    return None
