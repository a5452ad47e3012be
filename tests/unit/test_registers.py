"""Interrupted system calls: what a restored thread starts with."""

from __future__ import annotations

import struct

import pytest

from checkpoint.kernel.ptrace import Regs
from checkpoint.resources import registers, signals
from images import task_pb2
from snapshotter.base.errors import RestoreConflictError

M = (1 << 64) - 1
RIP = 0x401007


class Memory:
    def __init__(self, code=b"\xb8\xe6\x00\x00\x00\x0f\x05"):
        self.code = code.rjust(16, b"\x90")

    def read(self, addr, n):
        assert (addr, n) == (RIP - 16, 16)
        return self.code


def thread(call, result, **values):
    regs = Regs()
    regs.rip, regs.orig_rax, regs.rax = RIP, call & M, result & M
    for name, value in values.items():
        setattr(regs, name, value)
    return task_pb2.Thread(tid=7, regs=bytes(regs))


def final(thread_message, process=None, memory=None):
    return registers.final_regs(process or task_pb2.Process(pid=7), thread_message, memory or Memory())


def test_not_in_a_call():
    regs = final(thread(-1, -512))
    assert (regs.rip, regs.rax, regs.orig_rax) == (RIP, -512 & M, M)


def test_finished_call_keeps_its_result():
    assert final(thread(0, 5)).rip == RIP


@pytest.mark.parametrize("code", [512, 513, 514, 516])
def test_reissued(code):
    regs = final(thread(7, -code, rdi=0x7000000, rsi=3))
    assert (regs.rip, regs.rax, regs.orig_rax) == (RIP - 2, 7, M)


def test_remainder_of_sleeps():
    assert final(thread(35, -516, rdi=0x7000000, rsi=0x7000100)).rdi == 0x7000100
    assert final(thread(35, -516, rdi=0x7000000)).rdi == 0x7000000
    assert final(thread(230, -516, rdi=1, rdx=0x7000000, r10=0x7000100)).rdx == 0x7000100
    assert final(thread(230, -514, rdi=1, rsi=1, rdx=0x7000000, r10=0x7000100)).rdx == 0x7000000


def test_restart_syscall_by_the_code():
    regs = final(thread(219, -516, rdi=1, rdx=0x7000000, r10=0x7000100))
    assert (regs.rax, regs.rdx) == (230, 0x7000100)


@pytest.mark.parametrize(
    ("values", "call"),
    [
        ({"rdi": 0, "rsi": 0, "rdx": 500}, 7),
        ({"rdi": 0x7000000, "rsi": 2, "rdx": 500}, 7),
        ({"rdi": 1, "rdx": 0x7000000}, 230),
        ({"rdi": 0x7000000, "rsi": 0x7000100}, 35),
        ({"rdi": 0x7000000, "rsi": 128, "rdx": 1, "r10": 0x7000100}, 202),
        ({"rdi": 0x7000000, "rsi": 393, "rdx": 1, "r10": 0x7000100}, 202),
    ],
)
def test_restart_syscall_by_the_arguments(values, call):
    assert final(thread(219, -516, **values), memory=Memory(b"\x0f\x05")).rax == call


def pending(signo, flags, *, blocked=False):
    message = thread(45, -512)
    message.pending.add(siginfo=struct.pack("<i", signo).ljust(128, b"\0"))
    message.sigmask = 1 << (signo - 1) if blocked else 0
    process = task_pb2.Process(pid=7)
    process.actions.add(signo=signo, handler=0x400000, flags=flags)
    return message, process


def test_a_waiting_handler_interrupts():
    assert final(*pending(10, 0)).rax == -4 & M
    assert final(*pending(10, signals.SA_RESTART)).rip == RIP - 2
    assert final(*pending(10, 0, blocked=True)).rip == RIP - 2


def test_xstate_of_another_size():
    assert registers.fit_xstate(b"ab", 4, "") == b"ab\0\0"
    assert registers.fit_xstate(b"ab\0\0", 2, "") == b"ab"
    with pytest.raises(RestoreConflictError):
        registers.fit_xstate(b"abc", 2, "task 7")
