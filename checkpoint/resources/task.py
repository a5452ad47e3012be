"""A process and its threads: puts the task resources together, one batch per task. What is refused at the look: task_look.py.

Owns the Process and Thread messages. `dump_process` runs in the frozen window: every /proc file is read once and
each task runs one batch of system calls; what they say is put into messages after the thaw (ctx.later). `restore_thread` and `restore_process` add the counterpart calls to the
batches of a stub; their order is restore.py's, the reasons are in each resource.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from checkpoint.kernel import proc
from checkpoint.kernel.tasks import children
from checkpoint.model.vma import IO_URING_HINT
from checkpoint.parasite import Batch, visit
from checkpoint.resources import (
    async_io,
    cgroups,
    credentials,
    directories,
    keyrings,
    landlock,
    limits,
    loginuids,
    membarrier,
    policies,
    prctl,
    registers,
    scheduling,
    signals,
    timers,
)
from images import task_pb2
from snapshotter.base.errors import (
    Finding,
    UnsupportedError,
    wrap_os_error,
)

if TYPE_CHECKING:
    from checkpoint.context import DumpContext, FrozenProcess, FrozenTask
    from checkpoint.kernel.proc import Status
    from checkpoint.parasite import Buffer, Ref, Results, StubTask
    from checkpoint.restore_context import RestoreContext

_ASKED, _STOPPED = "task.asked", "task.stopped"
_PERSONALITY_QUERY = 0xFFFFFFFF
_STATES = {
    "running": task_pb2.Process.RUNNING,
    "stopped": task_pb2.Process.STOPPED,
    "zombie": task_pb2.Process.ZOMBIE,
}
_P_PID, _WSTOPPED = 1, 2
_SIGINFO_SIZE = 128
_SI_PID = slice(16, 20)  # in the siginfo of a child: after three ints, and 4 bytes that align the union
_ARCH_GET_XCOMP_PERM, _ARCH_REQ_XCOMP_PERM = 0x1022, 0x1023
_XFEATURE_XTILEDATA = 18


# -- dump -------------------------------------------------------------------------------------------------------


def dump_process(ctx: DumpContext, process: FrozenProcess) -> task_pb2.Process:
    """All task state of one frozen process, `mm` and `files` names left to their owners."""
    stat, pid = process.stat, process.pid
    message = task_pb2.Process(
        pid=pid,
        ppid=stat.ppid,
        pgid=stat.pgrp,
        sid=stat.session,
        start_time_ticks=process.start_time_ticks,
        state=_STATES[process.state],
        stop_signal=process.stop_signal,
        exit_signal=stat.exit_signal & 0xFF,
    )
    if process.is_zombie or process.leader is None:
        message.exit_code = stat.exit_code & 0xFFFF
        message.threads.add(tid=pid, start_time_ticks=process.start_time_ticks, comm=_comm_bytes(pid))
        return message
    mem, leader = process.mem, process.leader
    assert mem is not None
    for task in process.threads:
        # Before any infection: see registers.leave_critical_section.
        registers.leave_critical_section(task, mem)
        if task.facts.raw.dispatch:
            raise UnsupportedError(
                "has its system calls dispatched to itself (PR_SET_SYSCALL_USER_DISPATCH)",
                where=f"task {task.tid}",
                hint="wine and its like cannot be dumped",
            )
        if task.facts.raw.special:
            what = (
                "segments (set_thread_area)" if task.facts.raw.special & 1 else "access to I/O ports (ioperm)"
            )
            raise UnsupportedError(
                f"has {what} of its own", where=f"task {task.tid}", hint="such programs cannot be dumped"
            )
        if task.facts.word(b"Seccomp"):
            raise UnsupportedError(
                "has got a seccomp filter just now",
                where=f"task {task.tid}",
                hint="start the job without its sandbox",
            )
        pending = signals.dump_pending(task.tid, shared=False) if task.facts.word(b"SigPnd", 16) else []
        message.threads.add(tid=task.tid, pending=pending)
    batch, own, asked = _questions(ctx, process)
    answers = leader.infect().run(batch)
    process.brk = answers[asked.brk]
    if answers[asked.ldt] > 0:
        raise UnsupportedError(
            "has segments of its own (modify_ldt)",
            where=f"task {pid}",
            hint="wine and its like cannot be dumped",
        )
    session = None
    if keyrings.has_own_session(answers, own.keyrings):
        session = keyrings.read_session(leader.infect())
    others: list[Results] = []
    if len(process.threads) > 1:
        each = leader.infect().batch()
        asked_each = _ask_thread(ctx, each, process.status)
        others = visit(leader.infect(), process.threads[1:], each)
    given = [(answers, own), *((results, asked_each) for results in others)]
    landlock.judge(
        ctx,
        process,
        [
            (task, results, questions.confined)
            for task, (results, questions) in zip(process.threads, given, strict=True)
        ],
    )
    process.used_io_uring = any(
        async_io.was_used(results[questions.io_uring]) for results, questions in given
    )
    for task, (results, questions) in zip(process.threads, given, strict=True):
        if async_io.has_registered_ring(results[questions.io_uring]):
            raise UnsupportedError(
                "has an io_uring instance registered with the thread",
                where=f"task {task.tid}",
                hint=IO_URING_HINT,
            )
    if leader.facts.word(b"ShdPnd", 16):
        message.shared_pending.extend(signals.dump_pending(pid, shared=True))
    message.umask = process.status.umask
    directories.dump(pid, message)
    cgroups.dump(pid, message)
    message.oom_score_adj = int(_read(f"/proc/{pid}/oom_score_adj"))
    message.coredump_filter = int(_read(f"/proc/{pid}/coredump_filter") or b"0", 16)
    message.loginuid = loginuids.read(pid)
    message.unreported_stops.extend(_unreported_stops(ctx, process))

    def answer() -> None:
        _answer_process(answers, asked, message)
        if pid in {message.sid, ctx.root_pid}:
            message.autogroup_nice = scheduling.autogroup_nice(pid)
        loginuids.answer(message)
        policies.warn(message, ctx.warn_unconfined)
        for task, thread, (results, questions) in zip(process.threads, message.threads, given, strict=True):
            _answer_thread(task, thread, results, questions)
            policies.answer_flags(results, questions.policies, task.facts, message, thread)
        _warn_of_parent(ctx, message)
        message.threads[0].links_user_keyring = session is not None and session.has_user_keyring
        keyrings.warn(
            pid,
            [
                (task.tid, results, questions.keyrings)
                for task, (results, questions) in zip(process.threads, given, strict=True)
            ],
            session,
            ctx.warn,
        )

    ctx.later.append(answer)
    return message


def _warn_of_parent(ctx: DumpContext, message: task_pb2.Process) -> None:
    """A signal at the end of the parent (PR_SET_PDEATHSIG) is one at the end of the *thread* that forked: after a rollback that is
    always the first thread of the parent.
    """
    parent = ctx.processes.get(message.ppid)
    if parent is None or len(parent.threads) < 2 or not any(one.pdeath_signal for one in message.threads):
        return
    maker = next((one.tid for one in parent.threads if message.pid in children(parent.pid, [one.tid])), 0)
    if maker not in {0, parent.pid}:
        ctx.warn(
            f"task {message.pid}: asked for a signal when thread {maker} of its parent ends (PR_SET_PDEATHSIG); "
            f"after a rollback that is thread {parent.pid}"
        )


def _unreported_stops(ctx: DumpContext, process: FrozenProcess) -> list[int]:
    """Stopped children whose stop the process could still wait for; asked in its place, taking nothing (WNOWAIT)."""
    stopped = _stopped_children(ctx).get(process.pid)
    if not stopped or process.leader is None:
        return []
    remote = process.leader.infect()
    batch = remote.batch()
    asked = []
    for pid in stopped:
        info = batch.buffer(_SIGINFO_SIZE)
        batch.call("waitid", _P_PID, pid, info, _WSTOPPED | os.WNOHANG | os.WNOWAIT, 0, check=False)
        asked.append((pid, info))
    results = remote.run(batch)
    return [pid for pid, info in asked if int.from_bytes(results.bytes(info)[_SI_PID], "little") == pid]


def _stopped_children(ctx: DumpContext) -> dict[int, list[int]]:
    """Parent -> its stopped children, looked for once for the whole job."""
    found: dict[int, list[int]] | None = ctx.resources.get(_STOPPED)
    if found is None:
        found = ctx.resources[_STOPPED] = {}
        for pid, child in ctx.processes.items():
            if child.state == "stopped":
                found.setdefault(child.stat.ppid, []).append(pid)
    return found


@dataclass(frozen=True, slots=True)
class _AskedThread:
    """What each thread is asked, for which there is neither a file in /proc nor a ptrace request."""

    altstack: Buffer
    tid_address: Buffer
    death_signal: Buffer
    tsc_mode: Buffer
    policies: policies.Asked
    keyrings: keyrings.Asked
    confined: Ref | None
    securebits: Ref
    slack: Ref
    personality: Ref
    io_uring: Ref


def _questions(ctx: DumpContext, process: FrozenProcess) -> tuple[Batch, _AskedThread, _Asked]:
    """The leader's batch. Processes that were forked from one another are asked the same, but for their POSIX timers: the ids
    are a process's own, and a fork's child has none (timer_create(2)).
    """
    status, entries = process.status, proc.read_timers(process.pid)
    findings: list[Finding] = []
    timers.look(process.pid, entries, {task.tid for task in process.threads}, findings)
    if findings:
        raise UnsupportedError.of(findings, ctx.root_pid)
    if entries:
        return _new_questions(ctx, status, timers.describe(entries))
    key = (status.uids[0], status.gids[0], status.sig_caught, status.sig_ignored)
    known: dict[tuple[int, int, int, int], tuple[Batch, _AskedThread, _Asked]] = ctx.resources.setdefault(
        _ASKED, {}
    )
    if key not in known:
        known[key] = _new_questions(ctx, status, ())
    return known[key]


def _new_questions(
    ctx: DumpContext, status: Status, found: Sequence[task_pb2.PosixTimer]
) -> tuple[Batch, _AskedThread, _Asked]:
    batch = Batch()
    return batch, _ask_thread(ctx, batch, status), _ask_process(batch, found, status)


def _ask_thread(ctx: DumpContext, batch: Batch, status: Status) -> _AskedThread:
    """The questions for a thread of a process with that status."""
    altstack, tid_address = signals.ask_altstack(batch), batch.buffer(8)
    batch.call("prctl", prctl.GET_TID_ADDRESS, tid_address, 0, 0, 0)
    death_signal, tsc_mode = batch.buffer(4), batch.buffer(4)
    batch.call("prctl", prctl.GET_PDEATHSIG, death_signal, 0, 0, 0)
    batch.call("prctl", prctl.GET_TSC, tsc_mode, 0, 0, 0, check=False)
    return _AskedThread(
        altstack,
        tid_address,
        death_signal,
        tsc_mode,
        policies.ask(batch),
        keyrings.ask(batch, status.uids[0]),
        landlock.ask(batch, ctx.bystanders.of((status.uids[0], status.gids[0]))),
        batch.call("prctl", prctl.GET_SECUREBITS, 0, 0, 0, 0),
        batch.call("prctl", prctl.GET_TIMERSLACK, 0, 0, 0, 0),
        batch.call("personality", _PERSONALITY_QUERY),
        async_io.ask(batch),
    )


def _answer_thread(task: FrozenTask, thread: task_pb2.Thread, results: Results, asked: _AskedThread) -> None:
    """Put the message of a thread together; it may run again by now."""
    facts = task.facts
    thread.start_time_ticks, thread.sigmask, thread.comm = task.start_time_ticks, task.sigmask, facts.comm
    raw = facts.raw
    thread.rseq_pointer, thread.rseq_size = raw.rseq_pointer, raw.rseq_size if raw.rseq_pointer else 0
    thread.rseq_signature, thread.rseq_flags = raw.rseq_signature, raw.rseq_flags
    thread.robust_list_head, thread.robust_list_len = raw.robust_list, raw.robust_length
    registers.dump(task, thread)
    signals.answer_altstack(results, asked.altstack, thread)
    thread.clear_child_tid = _u64(results.bytes(asked.tid_address))
    thread.pdeath_signal = _u32(results.bytes(asked.death_signal))
    thread.tsc_mode = _u32(results.bytes(asked.tsc_mode))
    thread.personality = results[asked.personality] & 0xFFFFFFFF
    thread.credentials.CopyFrom(credentials.dump(facts.status, results[asked.securebits]))
    thread.scheduling.CopyFrom(scheduling.dump(facts))
    thread.scheduling.timer_slack_ns = max(results[asked.slack], 0)
    thread.seccomp_mode = facts.status.seccomp
    policies.answer(results, asked.policies, facts, thread)
    keyrings.answer(results, asked.keyrings, thread)


@dataclass(frozen=True, slots=True)
class _Asked:
    """What the leader's batch asks for the whole process."""

    actions: list[tuple[int, Buffer]]
    timers: timers.Asked
    limits: list[Buffer]
    subreaper: Buffer
    dumpable: Ref
    thp: Ref
    membarrier: membarrier.Asked
    mdwe: Ref
    memory_merge: Ref
    ldt: Ref
    xcomp: Buffer
    brk: Ref


def _ask_process(batch: Batch, found: Sequence[task_pb2.PosixTimer], status: Status) -> _Asked:
    subreaper, xcomp = batch.buffer(4), batch.buffer(8)
    batch.call("arch_prctl", _ARCH_GET_XCOMP_PERM, xcomp, check=False)
    batch.call("prctl", prctl.GET_CHILD_SUBREAPER, subreaper, 0, 0, 0)
    return _Asked(
        signals.ask_actions(batch, status.sig_caught, status.sig_ignored),
        timers.ask(batch, found),
        limits.ask(batch),
        subreaper,
        batch.call("prctl", prctl.GET_DUMPABLE, 0, 0, 0, 0),
        batch.call("prctl", prctl.GET_THP_DISABLE, 0, 0, 0, 0, check=False),
        membarrier.ask(batch),
        batch.call("prctl", prctl.GET_MDWE, 0, 0, 0, 0, check=False),
        batch.call("prctl", prctl.GET_MEMORY_MERGE, 0, 0, 0, 0, check=False),
        batch.call("modify_ldt", 0, batch.buffer(8), 8, check=False),
        xcomp,
        batch.call("brk", 0),
    )


def _answer_process(results: Results, asked: _Asked, message: task_pb2.Process) -> None:
    message.actions.extend(signals.answer_actions(results, asked.actions))
    timers.answer(results, asked.timers, message)
    message.rlimits.extend(limits.answer(results, asked.limits))
    message.child_subreaper = bool(_u32(results.bytes(asked.subreaper)))
    message.dumpable = results[asked.dumpable]
    message.thp_disabled = results[asked.thp] > 0
    message.thp_flags = max(results[asked.thp], 0) & ~1
    message.membarrier = membarrier.answer(results, asked.membarrier)
    message.mdwe = max(results[asked.mdwe], 0)
    message.memory_merge = results[asked.memory_merge] > 0
    message.xcomp_permitted = _u64(results.bytes(asked.xcomp))


# -- restore ----------------------------------------------------------------------------------------------------


def check(ctx: RestoreContext, process: task_pb2.Process) -> None:
    """Whether timers and directories can come back. Touches nothing; directories stay open until their release."""
    if process.state != task_pb2.Process.ZOMBIE:
        timers.check(process)
        directories.check(ctx, process)


def restore_permissions(batch: Batch, process: task_pb2.Process) -> None:
    """What the process has asked the CPU for: AMX, before alternate stacks, which must be large enough; broken memory. Before
    threads, which inherit both.
    """
    if process.xcomp_permitted >> _XFEATURE_XTILEDATA & 1:
        batch.call("arch_prctl", _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA)
    if process.mce_kill:
        batch.call("prctl", prctl.MCE_KILL, prctl.MCE_KILL_SET, process.mce_kill - 1, 0, 0)


def restore_thread_early(batch: Batch, thread: task_pb2.Thread) -> None:
    """Before the credentials: what root may do and memory must be there for."""
    if thread.mce_kill:
        batch.call("prctl", prctl.MCE_KILL, prctl.MCE_KILL_SET, thread.mce_kill - 1, 0, 0)
    if thread.io_flusher:
        batch.call("prctl", prctl.SET_IO_FLUSHER, 1, 0, 0, 0)
    batch.call("prctl", prctl.SET_NAME, thread.comm.ljust(16, b"\0")[:15] + b"\0", 0, 0, 0)
    scheduling.restore(batch, thread.scheduling)
    batch.call("personality", thread.personality)
    if thread.tsc_mode > 1:
        batch.call("prctl", prctl.SET_TSC, thread.tsc_mode, 0, 0, 0)
    signals.restore_altstack(batch, thread)
    registers.restore_user_pointers(batch, thread)


def restore_process_early(batch: Batch, process: task_pb2.Process) -> None:
    """Once per process, by its leader, all threads and children being there."""
    batch.call("prctl", prctl.SET_CHILD_SUBREAPER, int(process.child_subreaper), 0, 0, 0)
    batch.call(
        "prctl", prctl.SET_THP_DISABLE, int(process.thp_disabled), process.thp_flags, 0, 0, check=False
    )
    membarrier.restore(batch, process.membarrier)
    if process.io_flusher:
        batch.call("prctl", prctl.SET_IO_FLUSHER, 1, 0, 0, 0)
    if process.memory_merge:
        batch.call("prctl", prctl.SET_MEMORY_MERGE, 1, 0, 0, 0)
    signals.restore_actions(batch, process.actions)


def restore_thread_late(
    ctx: RestoreContext, batch: Batch, process: task_pb2.Process, thread: task_pb2.Thread
) -> None:
    """Credentials and what setting them would reset, then pending signals."""
    for text in credentials.restore(batch, thread.credentials, credentials.own()):
        ctx.warn(f"task {thread.tid}: {text}")
    keyrings.restore(batch, thread)
    if thread.pdeath_signal:
        batch.call("prctl", prctl.SET_PDEATHSIG, thread.pdeath_signal, 0, 0, 0)
    signals.restore_pending(batch, process.pid, thread.tid, thread.pending, shared=False)


def restore_process_late(batch: Batch, process: task_pb2.Process, stopped_children: Iterable[int]) -> None:
    """By the leader, last of all: dumpable, shared pending signals, and the timers start.

    The stops of its children happened anew just now: those that it had waited for before are waited for again.
    """
    batch.call("prctl", prctl.SET_DUMPABLE, int(process.dumpable == 1), 0, 0, 0)
    if process.mdwe:
        batch.call("prctl", prctl.SET_MDWE, process.mdwe, 0, 0, 0)
    for child in stopped_children:
        batch.call("waitid", _P_PID, child, 0, _WSTOPPED | os.WNOHANG, 0, check=False)
    signals.forget_children(batch, process.actions)
    signals.restore_pending(batch, process.pid, process.pid, process.shared_pending, shared=True)
    timers.restore_arm(batch, process)


def restore_outside(ctx: RestoreContext, process: task_pb2.Process) -> None:
    """What snap sets through /proc and system calls on the stub."""
    pid = process.pid
    for name, value in (
        ("oom_score_adj", str(process.oom_score_adj)),
        ("coredump_filter", hex(process.coredump_filter)),
    ):
        path = Path(f"/proc/{pid}/{name}")
        try:
            path.write_text(value)
        except OSError as error:
            if error.errno not in {errno.EACCES, errno.EPERM, errno.ENOENT}:
                raise wrap_os_error(error, f"cannot set {name}", where=f"task {pid}") from error
            if error.errno != errno.ENOENT:
                ctx.warn(f"task {pid}: {name} {value} not set: it needs CAP_SYS_RESOURCE")
    for thread in process.threads:
        text = scheduling.restore_affinity(thread.tid, thread.scheduling)
        if text:
            ctx.warn(text)
    # Not of a session that is not the job's: snap's own, or a shell's.
    if os.getsid(pid) == pid and (text := scheduling.restore_autogroup(pid, process.autogroup_nice)):
        ctx.warn(text)
    for text in limits.restore(pid, process.rlimits):
        ctx.warn(text)


def create_timers(stub: StubTask, process: task_pb2.Process) -> None:
    """POSIX timers, disarmed."""
    timers.restore_create(stub, process.posix_timers)


# -- small readers ----------------------------------------------------------------------------------------------


def _read(path: str) -> bytes:
    with open(path, "rb", buffering=0) as file:
        return file.readall()


def _comm_bytes(pid: int, tid: int | None = None) -> bytes:
    return _read(f"/proc/{pid}/task/{tid or pid}/comm").removesuffix(b"\n")


def _u32(data: bytes) -> int:
    return int(struct.unpack_from("<I", data)[0])


def _u64(data: bytes) -> int:
    return int(struct.unpack_from("<Q", data)[0])
