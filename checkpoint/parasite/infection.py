"""Infect and cure tasks of a job: the parasite's way in and out, fail-safe at every instant.

Owns, per process, the mapped area (one for all of its threads) and who is inside. Only one task of a process is
inside at a time: on its way out after snap's death it unmaps the area, which no other may then be executing.

A task's way, each step a fault point (parasite.*):
  own registers -> frames written -> registers at the restorer (would leave through the frames) -> signals blocked
  -> [first task: mmap code, mmap data, blob written] -> batches -> restorer again -> [last task: munmap]
  -> own signal mask -> own registers.
Killed anywhere, the task goes on where it was, the area is unmapped (or, in the instant where nobody is inside,
left to be found and removed by the next infection).
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import struct
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from checkpoint.kernel import interrupted, proc, ptrace
from checkpoint.kernel.mem import ProcMem
from checkpoint.parasite import frames, gadgets, stranded
from checkpoint.parasite.batch import Ending
from checkpoint.parasite.remote import ALL_SIGNALS, CODE_SIZE, Area, RemoteTask, blob, lost
from snapshotter.base import faults
from snapshotter.base.errors import Finding, SnapshotterError, TargetGoneError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Callable

    from checkpoint.kernel.ptrace import Regs
    from checkpoint.kernel.threads import ThreadFacts

DATA_SIZE = 1 << 20
"""Mapped without reservation: only what batches touch costs memory."""
AREA_SIZE = CODE_SIZE + DATA_SIZE

_PROT_READ, _PROT_WRITE, _PROT_EXEC = 1, 2, 4
_MAP = 0x02 | 0x20 | 0x4000 | 0x100000
"""MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE."""
_LOWEST, _HIGHEST = 1 << 20, (1 << 47) - 4096
_SECCOMP_STRICT, _SECCOMP_FILTER = 1, 2
_NR_PLACES = 1024
_STOP_TIMEOUT_S = 5.0
_LIMIT_S = 20.0
_EXEC_S, _EXEC_PAUSE_S = 1.0, 0.0005
_IGNORED_BY_DEFAULT = (int(signal.SIGURG), int(signal.SIGWINCH))


class Target(Protocol):
    """What infect() needs to know: checkpoint.context.FrozenTask has it."""

    tid: int
    pid: int
    regs: Regs
    sigmask: int
    places: list[tuple[int, int]]
    """(rip, rsp) of every thread of its process; empty: they are yet to be read."""

    @property
    def facts(self) -> ThreadFacts | None:
        """What was read of it at its stop; None: it is yet to be read."""


class _Space:
    """The parasite's area in one process and its users."""

    def __init__(self, pid: int, places: list[tuple[int, int]], start_time_ticks: int) -> None:
        self.pid = pid
        self.start_time_ticks = start_time_ticks
        self.mem = ProcMem(pid)
        self.maps = proc.read_maps(pid)
        self.gadgets = gadgets.find(code_ranges(self.maps), self.mem.read, where=f"task {pid}")
        self.area = Area(_hole(self.maps, AREA_SIZE, pid), AREA_SIZE)
        places = places or _places(pid)
        self.stacks = [rsp for _, rsp in places]
        """Where the threads stand that nobody is inside of yet; they are stopped, so it stays true."""
        self.leftovers = _leftovers(self.maps, self.mem, places)
        self.mapped = False
        self.users: set[InfectedTask] = set()
        self.inside: InfectedTask | None = None
        self.lost_tid = 0
        """The thread that is inside and did not come back: the area is its own now. It takes it away as it leaves."""


_spaces: dict[int, _Space] = {}


def _space(target: Target) -> _Space:
    pid = target.pid
    known = _spaces.get(pid)
    if target.facts is not None and target.tid == pid:
        start = target.facts.start_time_ticks
    else:
        start = proc.read_stat(pid).start_time_ticks
    if known is not None:
        if known.users and start == known.start_time_ticks:
            return known
        known.mem.close()
    _spaces[pid] = _Space(pid, target.places, start)
    return _spaces[pid]


def code_ranges(maps: list[proc.MapsEntry]) -> list[gadgets.CodeRange]:
    """Executable mappings, the likely ones first."""
    found = []
    for entry in maps:
        if not entry.executable or entry.path == "[vsyscall]":
            continue
        key = None
        if entry.inode:
            key = (os.makedev(entry.major, entry.minor), entry.inode, entry.offset)
        name = entry.path.rpartition("/")[2]
        likely = 0 if name.startswith(("libc.", "libc-", "ld-musl")) else 1 if entry.inode else 2
        found.append((likely, gadgets.CodeRange(entry.start, entry.end, key)))
    return [code for _, code in sorted(found, key=lambda item: item[0])]


def _hole(maps: list[proc.MapsEntry], size: int, pid: int) -> int:
    """An address in the middle of the largest hole: nothing borders on it, so nothing merges with it."""
    best_size, best = 0, 0
    at = _LOWEST
    for entry in sorted(maps, key=lambda item: item.start):
        if entry.start >= _HIGHEST:
            break
        if entry.start - at > best_size:
            best_size, best = entry.start - at, at
        at = max(at, entry.end)
    if _HIGHEST - at > best_size:
        best_size, best = _HIGHEST - at, at
    if best_size < size + 2 * (1 << 20):
        raise UnsupportedError("its address space is full", where=f"task {pid}")
    # Processes that share an address space choose before either has mapped: not the same place for two of them
    spread = (pid % _NR_PLACES) * 2 * size if best_size > 4 * _NR_PLACES * size else 0
    return (best + (best_size - size) // 2 + spread) & ~((1 << 16) - 1)


def _places(pid: int) -> list[tuple[int, int]]:
    """(rip, rsp) of every thread of a process."""
    found = []
    for tid in proc.threads(pid):
        try:
            regs = ptrace.getregs(tid)
            found.append((int(regs.rip), int(regs.rsp)))
        except SnapshotterError:  # not one that we have stopped
            with contextlib.suppress(SnapshotterError):
                words = proc.read_task_file(pid, "syscall", tid).split()
                if len(words) > 2:
                    found.append((int(words[-1], 16), int(words[-2], 16)))
    return found


def _leftovers(maps: list[proc.MapsEntry], mem: ProcMem, places: list[tuple[int, int]]) -> list[Area]:
    """Areas of a snap that was killed in the one instant in which nobody was inside; never one that a thread is in."""
    found = []
    # Another process of the job may share this address space (CLONE_VM): what is in use is nobody's leftover
    for start in stranded.code_pages(maps, mem):
        area = Area(start, AREA_SIZE)
        in_use = any(space.area.start == start for space in _spaces.values())
        if not in_use and not any(area.start <= at < area.end for place in places for at in place):
            found.append(area)
    return found


class InfectedTask(RemoteTask):
    """A task of a job with the parasite at hand. Made by infect(); ended by cure()."""

    limit_s = _LIMIT_S

    def __init__(self, target: Target, space: _Space) -> None:
        super().__init__(target.tid, target.pid, space.mem, space.area)
        self._space = space
        self._target = target
        self._own_regs = target.regs.copy()
        self._own_mask = target.sigmask
        self._template = self._own_regs
        self._place: frames.Place | None = None
        self._xstate = b""
        self._seccomp = 0

    @property
    def frames_at(self) -> int:
        """Address of its fail-safe frames while it is inside; 0 otherwise."""
        return self._place.address if self._place is not None else 0

    # -- in ----------------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Refuse by name what cannot be infected."""
        if not self._own_regs.is_64bit:
            raise UnsupportedError("it runs 32-bit code", where=self.where)
        facts = self._target.facts
        status = proc.read_status(self.pid, self.tid) if facts is None else facts.status
        if status.shadow_stack:
            raise UnsupportedError("it uses user shadow stacks (CET)", where=self.where)
        self._seccomp = status.seccomp
        if status.seccomp == _SECCOMP_STRICT:
            raise UnsupportedError("it is in seccomp strict mode", where=self.where)
        if status.seccomp == _SECCOMP_FILTER:
            try:
                ptrace.setoptions(self.tid, ptrace.O_TRACESYSGOOD | ptrace.O_SUSPEND_SECCOMP)
            except SnapshotterError as error:
                raise UnsupportedError(
                    "it has a seccomp filter, and that cannot be suspended",
                    where=self.where,
                    hint="run as root",
                ) from error
            # What is left when snap dies must be as little as possible: one call at a time, out by rt_sigreturn
            self._ending = Ending(leave_only=True)
            self._one_at_a_time = True
        else:
            blocked = status.sig_blocked | self._own_mask
            sig = quiet_signal(status.sig_ignored, status.sig_caught, blocked)
            if not sig:
                sig = blocked_signal(status.sig_caught, pending_of(status.fields.get))
            self._ending = Ending(
                sig=sig,
                blocked=bool(sig and blocked >> (sig - 1) & 1),
                pid=_inner_id(status, "NStgid", self.pid),
                tid=_inner_id(status, "NSpid", self.tid),
            )

    def _abort_rseq(self) -> None:
        """Inside a restartable sequence the kernel would send it to the abort handler at its next preemption; having
        run something else in between, that is where it must go on.
        """
        facts = self._target.facts
        if facts is not None and not facts.raw.rseq_section:
            return
        pointer, size, _, _ = ptrace.get_rseq(self.tid)
        if not pointer or size < 16:
            return
        with contextlib.suppress(OSError):
            section = int.from_bytes(self.mem.read(pointer + 8, 8), "little")
            if not section:
                return
            _, _, *words = _rseq_section(self.mem.read(section, 32))
            start, length, abort = words
            if start <= self._own_regs.rip < start + length:
                # The target's too: it is what an image of the task says.
                self._own_regs.rip = self._target.regs.rip = abort

    def prepare(self) -> None:
        """Everything that only reads."""
        self.check()
        self._abort_rseq()
        facts = self._target.facts
        self._xstate = ptrace.get_xstate(self.tid) if facts is None else bytes(facts.xstate)

    @property
    def space(self) -> _Space:
        return self._space

    def enter(self) -> None:
        """Be inside, with the area mapped; as before every batch."""
        self._enter()

    def _enter(self) -> None:
        space = self._space
        if space.inside is self:
            return
        if self not in space.users:
            raise SnapshotterError("it is cured", where=self.where)
        self._note_lost()
        if space.lost_tid:
            raise lost(self.pid, space.lost_tid)
        if space.inside is not None:
            space.inside.park()
        used = frames.used_xstate(self._xstate)
        need = frames.size(used)
        place = frames.choose(
            space.maps, self.mem, self._own_regs.rsp, need, space.stacks, live_frames(), where=self.where
        )
        unmap = None if self._seccomp else space.area
        self.mem.write(
            place.address,
            frames.build(
                place,
                interrupted.resumable(self._own_regs, self.mem),
                self._own_mask,
                self._xstate,
                used,
                space.gadgets,
                unmap,
            ),
        )
        self._place = place
        self._ending = replace(self._ending, leave_sp=place.unmap_first)
        faults.point("parasite.frames")
        # Inside sigsuspend and its like another mask is in force. It must end before the registers change: a signal
        # that it lets through would run its handler and yet not end the call, which waits for just that signal.
        ptrace.set_sigmask(self.tid, self._own_mask)
        self._aim(place.unmap_first)
        space.inside = self
        faults.point("parasite.redirected")
        ptrace.set_sigmask(self.tid, self._inside_mask)
        faults.point("parasite.blocked")
        if not space.mapped:
            try:
                self._map()
            except BaseException:
                self.park()
                raise

    @property
    def _inside_mask(self) -> int:
        """Everything blocked but the signal that announces a batch's end, if the task itself does not block that."""
        ending = self._ending
        return ALL_SIGNALS & ~(1 << (ending.sig - 1)) if ending.sig and not ending.blocked else ALL_SIGNALS

    def _aim(self, frame: int) -> None:
        """Registers that leave through a frame as soon as the task runs."""
        regs = self._own_regs.copy()
        regs.rip = self._space.gadgets.sigreturn
        regs.rsp = frame + 8  # as after the `ret` that took the restorer's address from there
        regs.orig_rax = ptrace.NOT_IN_SYSCALL
        ptrace.setregs(self.tid, regs)

    def _gadget(self, frame: int, name: str, *args: int) -> int:
        return self.gadget_call(self._space.gadgets.syscall_ret, frame, name, *args)

    def _map(self) -> None:
        space, area = self._space, self._space.area
        assert self._place is not None
        frame = self._place.unmap_first
        try:
            self._gadget(frame, "mmap", area.start, CODE_SIZE, _PROT_READ | _PROT_EXEC, _MAP, -1, 0)
            faults.point("parasite.mapped_code")
            size = area.size - CODE_SIZE
            self._gadget(frame, "mmap", area.data, size, _PROT_READ | _PROT_WRITE, _MAP, -1, 0)
            faults.point("parasite.mapped")
            self.mem.write(area.start, blob())
            faults.point("parasite.loaded")
        except BaseException as error:
            with contextlib.suppress(OSError, SnapshotterError):
                self._gadget(self._place.context_only, "munmap", area.start, area.size)
            if isinstance(error, OSError):
                full = error.errno == errno.ENOMEM
                raise SnapshotterError(
                    f"cannot map memory in it: {error}",
                    where=self.where,
                    hint="its address space is at its limit (ulimit -v; prlimit --pid PID --as=), or there is no memory"
                    if full
                    else "",
                ) from error
            raise
        space.mapped = True
        for old in space.leftovers:
            with contextlib.suppress(OSError):
                self._gadget(frame, "munmap", old.start, old.size)
        space.leftovers = []

    # -- out ---------------------------------------------------------------------------------------------------------

    def park(self) -> None:
        """Give the task its own registers and signal mask back; the area stays."""
        self._note_lost()
        if self._space.inside is not self or self._space.lost_tid:
            return
        assert self._place is not None
        self._aim(self._place.unmap_first)
        faults.point("parasite.leaving")
        self._resume_own(self._place)

    def _resume_own(self, place: frames.Place) -> None:
        ptrace.set_sigmask(self.tid, self._own_mask)
        faults.point("parasite.unblocked")
        ptrace.setregs(self.tid, self._own_regs)
        faults.point("parasite.parked")
        self._space.inside = None
        self._place = None
        self._ending = replace(self._ending, leave_sp=0)
        self.mem.write(place.address, place.saved)

    def cure(self) -> None:
        """Leave; the last task of the process takes the area away."""
        space = self._space
        if self not in space.users:
            return
        self._note_lost()
        try:
            if space.lost_tid:
                return  # whoever is lost leaves through its frames; all others are outside, with registers of their own
            if len(space.users) > 1 or not space.mapped:
                self.park()
            else:
                self._enter()
                place = self._place
                assert place is not None
                self._aim(place.unmap_first)
                faults.point("parasite.leaving")
                self._gadget(place.context_only, "munmap", space.area.start, space.area.size)
                space.mapped = False
                self._aim(place.context_only)
                faults.point("parasite.unmapped")
                self._resume_own(place)
            if self._seccomp:
                ptrace.setoptions(self.tid, ptrace.O_TRACESYSGOOD)
        finally:
            space.users.discard(self)
            if space.inside is self:
                space.inside = None
            if not space.users:
                _spaces.pop(self.pid, None)
                space.mem.close()

    def _note_lost(self) -> None:
        inside = self._space.inside
        if inside is not None and inside.is_lost:
            self._space.lost_tid = inside.tid

    def _faulted(self, sig: int) -> None:
        self.park()
        super()._faulted(sig)


def quiet_signal(ignored: int, caught: int, blocked: int) -> int:
    """A signal that a task with these sets would ignore whenever it came, and that cannot be pending for anybody who
    waits for it: neither caught nor blocked, ignored by default or by choice. 0 when there is none.
    """
    for sig in _IGNORED_BY_DEFAULT:
        if not (caught | blocked) >> (sig - 1) & 1:
            return sig
    for sig in (*range(1, 32), int(signal.SIGCHLD)):
        by_choice = ignored >> (sig - 1) & 1 or sig == signal.SIGCHLD
        if by_choice and not (caught | blocked) >> (sig - 1) & 1:
            return int(sig)
    return 0


def blocked_signal(caught: int, pending: int) -> int:
    """The same of a task that blocks them all, as the workers of servers do: one that it would ignore if it did not block it, and that
    is not pending. One that comes meanwhile is put back (drive.c), for somebody may wait for it. 0 when there is none.
    """
    for sig in _IGNORED_BY_DEFAULT:
        if not (caught | pending) >> (sig - 1) & 1:
            return sig
    return 0


def pending_of(line: Callable[[str, str], str]) -> int:
    """What is pending for a thread or its process, by the lines of its status."""
    return int(line("SigPnd", "0"), 16) | int(line("ShdPnd", "0"), 16)


def live_frames() -> set[int]:
    """Where the frames of tasks are that are inside."""
    return {space.inside.frames_at for space in _spaces.values() if space.inside is not None}


def _inner_id(status: proc.Status, field: str, outer: int) -> int:
    """A pid or tid as the task's own pid namespace calls it."""
    return int(status.fields.get(field, str(outer)).split()[-1])


def _rseq_section(data: bytes) -> tuple[int, ...]:
    """Struct rseq_cs: version, flags, start_ip, post_commit_offset, abort_ip."""
    return struct.unpack("<IIQQQ", data)


def look_at_code(pid: int, report: list[Finding]) -> None:
    """Adds why nothing could be run in a process that may be running: what its code lacks, or that its address space is full.

    Only reads. What it has found out is kept, so that the frozen window need not wait for it.
    """
    blob()
    deadline = time.monotonic() + _EXEC_S
    while maps := proc.read_maps(pid):
        problem = _problem_of_code(pid, maps)
        if problem is None:
            return
        if time.monotonic() > deadline or not _is_in_exec(pid, maps):
            report.append(Finding(pid, "task", problem.what, problem.hint))
            return
        time.sleep(_EXEC_PAUSE_S)


def _problem_of_code(pid: int, maps: list[proc.MapsEntry]) -> UnsupportedError | None:
    try:
        with ProcMem(pid) as mem:
            gadgets.find(code_ranges(maps), mem.read, where=f"task {pid}")
        _hole(maps, AREA_SIZE, pid)
    except UnsupportedError as error:
        return error
    except OSError as error:
        raise TargetGoneError(f"its memory cannot be read: {error.strerror}", where=f"task {pid}") from error
    return None


def _is_in_exec(pid: int, maps: list[proc.MapsEntry]) -> bool:
    """Whether a process is in the midst of an execve(2): its new mappings come one by one, and where its code begins is noted
    last (load_elf_binary in fs/binfmt_elf.c).
    """
    return proc.read_maps(pid) != maps or not proc.read_stat(pid).start_code


def infect(task: Target) -> RemoteTask:
    """Make a seized and stopped task (all threads of its process are stopped) able to run batches.

    Nothing happens to it before its first batch. Raises UnsupportedError, by name, for what cannot be infected.
    """
    space = _space(task)
    infected = InfectedTask(task, space)
    infected.prepare()
    space.users.add(infected)
    return infected


def cure(task: RemoteTask) -> None:
    """Undo infect(): registers, signal mask and memory are as they were; the task stays stopped."""
    if isinstance(task, InfectedTask):
        task.cure()
