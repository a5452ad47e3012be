"""ptrace(2) for tasks that are seized: registers, vector state, signal masks, pending signals, stops.

Owns every ptrace request except the hot loop of a batch (parasite_c/native.c). Works through python-ptrace's
raw binding and register structure; adds what it lacks (SEIZE, INTERRUPT, LISTEN, PEEKSIGINFO, signal masks,
register sets, rseq). A tracer is a thread, not a process: one thread seizes, drives and detaches a task.
ESRCH is TargetGoneError; other errnos are wrapped as errors.py says.
"""

from __future__ import annotations

import ctypes
import os
import struct
from dataclasses import dataclass
from typing import NoReturn

from ptrace import PtraceError
from ptrace.binding import func
from ptrace.binding.linux_struct import iovec_struct, user_regs_struct

from snapshotter.base.errors import SnapshotterError, TargetGoneError, wrap_os_error

PTRACE_CONT, PTRACE_DETACH, PTRACE_SYSCALL = func.PTRACE_CONT, func.PTRACE_DETACH, func.PTRACE_SYSCALL
PTRACE_GETREGS, PTRACE_SETREGS = func.PTRACE_GETREGS, func.PTRACE_SETREGS
PTRACE_SETOPTIONS, PTRACE_GETEVENTMSG = func.PTRACE_SETOPTIONS, func.PTRACE_GETEVENTMSG
PTRACE_GETREGSET, PTRACE_SETREGSET = func.PTRACE_GETREGSET, func.PTRACE_SETREGSET
PTRACE_SEIZE, PTRACE_INTERRUPT, PTRACE_LISTEN = 0x4206, 0x4207, 0x4208
PTRACE_PEEKSIGINFO, PTRACE_GETSIGMASK, PTRACE_SETSIGMASK = 0x4209, 0x420A, 0x420B
PTRACE_SECCOMP_GET_FILTER, PTRACE_SECCOMP_GET_METADATA = 0x420C, 0x420D
PTRACE_GET_RSEQ_CONFIGURATION = 0x420F
PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG = 0x4211

O_TRACESYSGOOD = func.PTRACE_O_TRACESYSGOOD
O_TRACEFORK = func.PTRACE_O_TRACEFORK
O_TRACEVFORK = func.PTRACE_O_TRACEVFORK
O_TRACECLONE = func.PTRACE_O_TRACECLONE
O_TRACEEXEC = func.PTRACE_O_TRACEEXEC
O_TRACEVFORKDONE = func.PTRACE_O_TRACEVFORKDONE
O_TRACEEXIT = func.PTRACE_O_TRACEEXIT
O_EXITKILL = 1 << 20
O_SUSPEND_SECCOMP = 1 << 21

EVENT_FORK, EVENT_VFORK, EVENT_CLONE = (
    func.PTRACE_EVENT_FORK,
    func.PTRACE_EVENT_VFORK,
    func.PTRACE_EVENT_CLONE,
)
EVENT_EXEC, EVENT_STOP = func.PTRACE_EVENT_EXEC, 128

NT_PRSTATUS, NT_X86_XSTATE = 1, 0x202
_PEEKSIGINFO_SHARED = 1
_SIGINFO_SIZE = 128
_SIGINFO_AT_ONCE = 64
WALL = 0x40000000
NOT_IN_SYSCALL = 2**64 - 1

RESTART_ERRNOS = {512, 513, 514, 516}
"""ERESTARTSYS, ERESTARTNOINTR, ERESTARTNOHAND, ERESTART_RESTARTBLOCK (include/linux/errno.h)."""


class Regs(user_regs_struct):  # type: ignore[misc]  # python-ptrace has no types
    """struct user_regs_struct: mutable, 27 words of 64 bits, r15 .. gs as attributes; bytes(regs) are 216."""

    @classmethod
    def from_bytes(cls, data: bytes) -> Regs:
        if len(data) != ctypes.sizeof(cls):
            raise ValueError(f"registers have {ctypes.sizeof(cls)} bytes, not {len(data)}")
        regs: Regs = cls.from_buffer_copy(data)
        return regs

    def copy(self) -> Regs:
        regs: Regs = type(self).from_buffer_copy(self)
        return regs

    @property
    def in_syscall(self) -> bool:
        """Stopped inside a system call (which the kernel may want to restart)."""
        return int(self.orig_rax) < 2**63

    @property
    def call(self) -> int:
        """The number of the system call. The kernel uses the lower half only; the upper one may have a deadline (timeouts.py)."""
        return int(self.orig_rax) & 0xFFFFFFFF

    @property
    def wants_restart(self) -> bool:
        """The interrupted call shows one of the kernel's restart codes: it is issued again, not failed."""
        return self.in_syscall and 2**64 - int(self.rax) in RESTART_ERRNOS

    @property
    def is_64bit(self) -> bool:
        return bool(self.cs == 0x33)

    def __repr__(self) -> str:
        return (
            "Regs("
            + ", ".join(f"{name}={getattr(self, name):#x}" for name, _ in user_regs_struct._fields_)
            + ")"
        )


@dataclass(frozen=True, slots=True)
class WaitStatus:
    """A status of wait(2), taken apart."""

    tid: int
    status: int

    @property
    def exited(self) -> bool:
        return os.WIFEXITED(self.status)

    @property
    def signaled(self) -> bool:
        return os.WIFSIGNALED(self.status)

    @property
    def gone(self) -> bool:
        return self.exited or self.signaled

    @property
    def exit_code(self) -> int:
        return os.WEXITSTATUS(self.status)

    @property
    def term_signal(self) -> int:
        return os.WTERMSIG(self.status)

    @property
    def stopped(self) -> bool:
        return os.WIFSTOPPED(self.status)

    @property
    def stop_signal(self) -> int:
        """Without the 0x80 that TRACESYSGOOD adds."""
        return os.WSTOPSIG(self.status) & 0x7F

    @property
    def syscall_stop(self) -> bool:
        return self.stopped and os.WSTOPSIG(self.status) == 0x85

    @property
    def event(self) -> int:
        """PTRACE_EVENT_*, or 0."""
        return self.status >> 16 if self.stopped else 0

    @property
    def group_stop(self) -> bool:
        return self.event == EVENT_STOP and self.stop_signal in {19, 20, 21, 22}


def _fail(error: PtraceError, tid: int, what: str) -> NoReturn:
    wrapped = OSError(error.errno or 0, os.strerror(error.errno or 0))
    hint = "run as root, or set kernel.yama.ptrace_scope=0" if what == "cannot seize" else ""
    raise wrap_os_error(wrapped, what, where=f"task {tid}", hint=hint) from error


def _ptrace(request: int, tid: int, addr: int, data: int, what: str) -> int:
    try:
        return int(func.ptrace(request, tid, addr, data))
    except PtraceError as error:
        _fail(error, tid, what)


def seize(tid: int, options: int = O_TRACESYSGOOD) -> None:
    """Become the tracer without stopping the task."""
    _ptrace(PTRACE_SEIZE, tid, 0, options, "cannot seize")


def interrupt(tid: int) -> None:
    """Ask a seized task to stop; wait() for it."""
    _ptrace(PTRACE_INTERRUPT, tid, 0, 0, "cannot interrupt")


def detach(tid: int, sig: int = 0) -> None:
    """Let go of a stopped task. The kernel restarts an interrupted call and puts a group-stop back."""
    _ptrace(PTRACE_DETACH, tid, 0, sig, "cannot detach")


def cont(tid: int, sig: int = 0) -> None:
    _ptrace(PTRACE_CONT, tid, 0, sig, "cannot continue")


def syscall(tid: int, sig: int = 0) -> None:
    """Continue to the next entry or exit of a system call."""
    _ptrace(PTRACE_SYSCALL, tid, 0, sig, "cannot continue")


def listen(tid: int) -> None:
    """Let a group-stopped task stay stopped and be told of changes."""
    _ptrace(PTRACE_LISTEN, tid, 0, 0, "cannot listen to")


def setoptions(tid: int, options: int) -> None:
    _ptrace(PTRACE_SETOPTIONS, tid, 0, options, "cannot set trace options of")


def geteventmsg(tid: int) -> int:
    value = ctypes.c_ulong()
    _ptrace(PTRACE_GETEVENTMSG, tid, 0, ctypes.addressof(value), "cannot read the trace event of")
    return value.value


def getregs(tid: int) -> Regs:
    regs = Regs()
    _ptrace(PTRACE_GETREGS, tid, 0, ctypes.addressof(regs), "cannot read registers")
    return regs


def setregs(tid: int, regs: Regs) -> None:
    _ptrace(PTRACE_SETREGS, tid, 0, ctypes.addressof(regs), "cannot write registers")


def get_xstate(tid: int) -> bytes:
    """NT_X86_XSTATE in the uncompacted format of XSAVE; the kernel says how long it is."""
    size = 16384
    while True:
        buffer = ctypes.create_string_buffer(size)
        iov = iovec_struct(ctypes.addressof(buffer), size)
        _ptrace(PTRACE_GETREGSET, tid, NT_X86_XSTATE, ctypes.addressof(iov), "cannot read vector state")
        length = int(iov.len)
        if length < size:
            return buffer.raw[:length]
        size *= 2


def set_xstate(tid: int, xstate: bytes) -> None:
    buffer = ctypes.create_string_buffer(xstate, len(xstate))
    iov = iovec_struct(ctypes.addressof(buffer), len(xstate))
    _ptrace(PTRACE_SETREGSET, tid, NT_X86_XSTATE, ctypes.addressof(iov), "cannot write vector state")


def get_sigmask(tid: int) -> int:
    """The blocked signals (bit 0 = signal 1); inside sigsuspend and its like, the mask that comes back after it."""
    mask = ctypes.c_uint64()
    _ptrace(PTRACE_GETSIGMASK, tid, 8, ctypes.addressof(mask), "cannot read the signal mask")
    return mask.value


def set_sigmask(tid: int, mask: int) -> None:
    value = ctypes.c_uint64(mask)
    _ptrace(PTRACE_SETSIGMASK, tid, 8, ctypes.addressof(value), "cannot write the signal mask")


def peek_siginfo(tid: int, shared: bool) -> list[bytes]:
    """Pending signals in their order, 128 bytes of siginfo_t each; those of the process when `shared`."""
    found: list[bytes] = []
    buffer = ctypes.create_string_buffer(_SIGINFO_SIZE * _SIGINFO_AT_ONCE)
    while True:
        flags = _PEEKSIGINFO_SHARED if shared else 0
        args = ctypes.create_string_buffer(struct.pack("<QIi", len(found), flags, _SIGINFO_AT_ONCE))
        got = _ptrace(
            PTRACE_PEEKSIGINFO,
            tid,
            ctypes.addressof(args),
            ctypes.addressof(buffer),
            "cannot read pending signals",
        )
        raw = buffer.raw
        found += [raw[i * _SIGINFO_SIZE : (i + 1) * _SIGINFO_SIZE] for i in range(got)]
        if got < _SIGINFO_AT_ONCE:
            return found


class _RseqConfiguration(ctypes.Structure):
    _fields_ = (
        ("pointer", ctypes.c_uint64),
        ("size", ctypes.c_uint32),
        ("signature", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("pad", ctypes.c_uint32),
    )


def get_rseq(tid: int) -> tuple[int, int, int, int]:
    """(pointer, size, signature, flags) of the registered rseq area; pointer 0: none."""
    conf = _RseqConfiguration()
    _ptrace(
        PTRACE_GET_RSEQ_CONFIGURATION,
        tid,
        ctypes.sizeof(conf),
        ctypes.addressof(conf),
        "cannot read rseq registration",
    )
    return conf.pointer, conf.size, conf.signature, conf.flags


def dispatches_syscalls(tid: int) -> bool:
    """Whether a stopped task has its system calls handed to a signal handler of its own (prctl(2), Linux 6.4).

    Source: struct ptrace_sud_config, Documentation/admin-guide/syscall-user-dispatch.rst.
    """
    config = (ctypes.c_uint64 * 4)()
    try:
        _ptrace(
            PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG,
            tid,
            ctypes.sizeof(config),
            ctypes.addressof(config),
            "cannot read its system call dispatch",
        )
    except TargetGoneError:
        raise
    except SnapshotterError:
        return False  # this kernel cannot say
    return bool(config[0])


def wait(tid: int, flags: int = WALL) -> WaitStatus:
    """waitpid(2) for one task; TargetGoneError when it is no child or tracee any more. With WNOHANG and nothing
    to tell, the result's tid is 0.
    """
    try:
        got, status = os.waitpid(tid, flags)
    except ChildProcessError as error:
        raise wrap_os_error(ProcessLookupError(3, "ESRCH"), "cannot wait for", where=f"task {tid}") from error
    return WaitStatus(got, status)
