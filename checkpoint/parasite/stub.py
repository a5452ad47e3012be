"""Restore stubs: empty processes with the right pids, driven call by call until they are the job again.

Owns their birth (the first one by clone3 from a short-lived helper, so that init or the nearest subreaper becomes
its parent; all others by clone3 inside a stub), the arena they run batches from, and their last step. They are
traced from birth with PTRACE_O_EXITKILL: when snap dies, they die. They have no frames: nothing is to be kept.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterable
from importlib.resources import as_file, files

from parasite_c._native import lib

from checkpoint.kernel import proc, ptrace, sys
from checkpoint.kernel.mem import ProcMem
from checkpoint.kernel.ptrace import Regs
from checkpoint.parasite import gadgets
from checkpoint.parasite.batch import Ending, RemoteCallError
from checkpoint.parasite.remote import ALL_SIGNALS, CODE_SIZE, MIN_DATA_SIZE, Area, RemoteTask, blob
from snapshotter.base import faults
from snapshotter.base.errors import RestoreConflictError, SnapshotterError, TargetGoneError, wrap_os_error

OPTIONS = (
    ptrace.O_EXITKILL | ptrace.O_TRACESYSGOOD | ptrace.O_TRACEFORK | ptrace.O_TRACEVFORK | ptrace.O_TRACECLONE
)
_PROT_READ, _PROT_WRITE, _PROT_EXEC = 1, 2, 4
_MAP = 0x02 | 0x20 | 0x4000 | 0x100000
"""MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE."""
_END_OF_USER = 1 << 47
_XRSTOR = bytes.fromhex("89c1 b8ffffffff baffffffff 480fae2f 89c8 0f05")
"""mov ecx,eax; mov eax,-1; mov edx,-1; xrstor64 [rdi]; mov eax,ecx; syscall."""
_XRSTOR_OFFSET = CODE_SIZE - 64

CLONE_VM, CLONE_FS, CLONE_FILES, CLONE_SIGHAND, CLONE_PARENT = 0x100, 0x200, 0x400, 0x800, 0x8000
CLONE_THREAD, CLONE_SYSVSEM = 0x10000, 0x40000
THREAD_FLAGS = CLONE_VM | CLONE_FS | CLONE_FILES | CLONE_SIGHAND | CLONE_THREAD | CLONE_SYSVSEM


class StubTask(RemoteTask):
    """A task of a restore in the making. All signals are blocked in it until its own mask is set."""

    def __init__(self, tid: int, pid: int, mem: ProcMem, area: Area | None, gadget: int = 0) -> None:
        super().__init__(tid, pid, mem, area)
        # It cannot be blocked or caught, so it works whatever state was restored already; it is never delivered
        self._ending = Ending(sig=signal.SIGSTOP, pid=pid, tid=tid)
        self._gadget = gadget

    def map_arena(self, addr: int, size: int) -> None:
        """Map [addr, addr + size): the blob's code page, then data. Later children and threads have it too."""
        if self._area is not None:
            raise SnapshotterError("it has an arena", where=self.where)
        if addr % 4096 or size % 4096 or size < CODE_SIZE + MIN_DATA_SIZE:
            raise ValueError(f"an arena is whole pages, at least {CODE_SIZE + MIN_DATA_SIZE} bytes")
        try:
            self.gadget_call(self._gadget, 0, "mmap", addr, CODE_SIZE, _PROT_READ | _PROT_EXEC, _MAP, -1, 0)
            self.gadget_call(
                self._gadget,
                0,
                "mmap",
                addr + CODE_SIZE,
                size - CODE_SIZE,
                _PROT_READ | _PROT_WRITE,
                _MAP,
                -1,
                0,
            )
        except RemoteCallError as error:
            raise SnapshotterError(f"cannot map an arena at {addr:#x}: {error}", where=self.where) from error
        self.mem.write(addr, blob())
        self._area = Area(addr, size)

    def unmap_all_but_arena(self, spared: Iterable[tuple[int, int]] = ()) -> None:
        """Take away everything that the stub was born with: its program, stack, vdso, what its maker had.

        `spared`: further ranges [start, end) that stay, none in two mappings.
        """
        batch = self.batch()
        kept = sorted([(self.area.start, self.area.end), *spared])
        last = 0
        for entry in proc.read_maps(self.pid):
            at = entry.start
            while last < len(kept) and kept[last][1] <= at:
                last += 1
            for start, end in kept[last:]:
                if start >= entry.end:
                    break
                if at < start:
                    batch.call("munmap", at, start - at)
                at = max(at, end)
            if at < entry.end <= _END_OF_USER:
                batch.call("munmap", at, entry.end - at)
        self.run(batch)
        self._gadget = 0

    # -- children ----------------------------------------------------------------------------------------------------

    def fork_child(self, pid: int, exit_signal: int = signal.SIGCHLD, flags: int = 0) -> StubTask:
        """A child process with that pid (0: any) and a copy of everything (or shared, as CLONE_* in `flags` say)."""
        tid = self._clone(pid, exit_signal, flags)
        return StubTask(tid, tid, ProcMem(tid), self._area)

    def clone_thread(self, tid: int, flags: int = THREAD_FLAGS) -> StubTask:
        """A thread of this process with that tid. It runs batches from the same arena, one task at a time."""
        made = self._clone(tid, 0, flags)
        return StubTask(made, self.pid, self.mem, self._area)

    def _clone(self, tid: int, exit_signal: int, flags: int) -> int:
        batch = self.batch()
        wanted = batch.data(tid.to_bytes(4, "little"))
        args = batch.buffer(len(sys.clone_args()))
        # the address of the wanted tid is known only in the target: written there by hand below
        ref = batch.clone(args)
        base = self.area.data + (2 + (self._turn ^ 1)) * self.area.half
        content = sys.clone_args(
            flags=flags,
            exit_signal=exit_signal,
            set_tid=base + batch.offsets[wanted.index] if tid else 0,
            set_tid_size=1 if tid else 0,
        )
        batch.buffers[args.index] = (args, content)
        try:
            made = self.run(batch)[ref]
        except RemoteCallError as error:
            raise _pid_error(tid, error) from error
        status = ptrace.wait(made)
        if not status.stopped or status.event != ptrace.EVENT_STOP:
            raise SnapshotterError(f"unexpected first stop {status.status:#x}", where=f"task {made}")
        return made

    # -- the end -----------------------------------------------------------------------------------------------------

    def unmap_arena(self) -> None:
        """Take the arena away: the last call of the last task of this address space, which then has no code to
        run until finish().
        """
        area = self.area
        regs = self._registers()
        regs.rip = area.start + _syscall_offset()
        regs.rsp = area.stack_top
        self.gadget_call(regs.rip, regs.rsp, "munmap", area.start, area.size)
        self._area = None

    def load_xstate(self, xstate: bytes) -> None:
        """Run `xrstor` of a standard format XSAVE area in the task, as its own first use of what is in it.

        ptrace refuses state (EINVAL) that the task's buffer in the kernel has no room for yet: that of AMX, which is made
        when the task first uses a tile. The task must be permitted to (arch_prctl), or it ends of SIGILL.
        """
        area = self.area
        code = area.start + _XRSTOR_OFFSET
        data = area.end - (len(xstate) + 4095 & -4096)
        self.mem.write(code, _XRSTOR)
        self.mem.write(data, xstate)
        self.gadget_call(code, area.stack_top, "getpid", data)

    def finish(self, regs: Regs, *, unmap_arena: bool = False) -> None:
        """Set the registers to go on with; the task stays stopped until it is detached. `unmap_arena` for the last
        task of an address space: from then on nothing can be run in it.
        """
        if unmap_arena and self._area is not None:
            self.unmap_arena()
        ptrace.setregs(self.tid, regs)

    def detach(self, sig: int = 0) -> None:
        ptrace.detach(self.tid, sig)

    def kill(self) -> None:
        """End its process and reap what we trace of it; nothing happens when it is gone."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        with contextlib.suppress(TargetGoneError):
            while not ptrace.wait(self.tid).gone:
                ptrace.cont(self.tid)

    def _registers(self) -> Regs:
        # A stub's own segment bases may be set by calls of its batches (arch_prctl): read them each time
        return ptrace.getregs(self.tid)


def _syscall_offset() -> int:
    return blob().index(b"\x0f\x05")


def _pid_error(pid: int, error: OSError) -> SnapshotterError:
    if error.errno == 17:  # EEXIST
        return RestoreConflictError(
            f"pid {pid} is taken", where=f"task {pid}", hint="see which process has it: ps"
        )
    return wrap_os_error(error, f"cannot make a task with pid {pid}")


def spawn_root_stub(pid: int = 0) -> StubTask:
    """A new process with that pid (0: any), stopped in the stub program, child of init or the nearest subreaper.

    Raises RestoreConflictError when the pid is taken. The caller's thread is its tracer.
    """
    go_read, go_write = os.pipe2(os.O_CLOEXEC)
    try:
        with as_file(files("parasite_c").joinpath("stub")) as path:
            exe = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            made = int(lib.snap_spawn_stub(exe, pid, go_read, go_write))
        finally:
            os.close(exe)
        if made < 0:
            raise _pid_error(pid, OSError(-made, os.strerror(-made)))
        ptrace.seize(made, OPTIONS | ptrace.O_TRACEEXEC)
        faults.point("stub.spawned")
        os.write(go_write, b"!")
        status = ptrace.wait(made)
        if not status.stopped or status.event != ptrace.EVENT_EXEC:
            raise SnapshotterError(
                "the restore stub does not start", where=f"task {made}", hint="is it installed?"
            )
    finally:
        os.close(go_read)
        os.close(go_write)
    # Registers set now would be overwritten by execve's own return: go to its exit
    ptrace.syscall(made)
    if not ptrace.wait(made).syscall_stop:
        raise SnapshotterError("the restore stub does not start", where=f"task {made}")
    ptrace.setoptions(made, OPTIONS)
    ptrace.set_sigmask(made, ALL_SIGNALS)
    mem = ProcMem(made)
    for entry in proc.read_maps(made):
        if entry.executable and entry.path != "[vsyscall]":
            offset, _ = gadgets.search(mem.read(entry.start, entry.size_bytes))
            if offset is not None:
                return StubTask(made, made, mem, None, entry.start + offset)
    raise SnapshotterError("the restore stub has no system call instruction", where=f"task {made}")
