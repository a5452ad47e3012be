"""Batches as bytes: layout from the compiler, references across pieces, gadget search."""

import pytest
from parasite_c._native import ffi, lib

from checkpoint.kernel import syscalls
from checkpoint.parasite import batch as encoding
from checkpoint.parasite import gadgets
from checkpoint.parasite.batch import Batch, Ending
from snapshotter.base.errors import UnsupportedError


def entries_of(raw):
    header = ffi.cast("struct snap_batch *", ffi.from_buffer(raw))
    return header, ffi.cast("struct snap_entry *", header + 1)


def test_arguments_become_values_references_and_loads():
    batch = Batch()
    fds = batch.buffer(8)
    first = batch.call("pipe2", fds, 0, ok=(24, 23))
    batch.call("close", fds.i32(4), check=False)
    batch.call("lseek", first, -1, 0)
    (piece,) = encoding.split(batch, 65536)
    raw = encoding.encode(batch, piece, 0x1000, Ending(leave_sp=0x77), [])
    header, entries = entries_of(raw)
    assert (header.leave_sp, header.nr_entries, header.flags) == (0x77, 3, 0)
    assert header.stopped_at == lib.SNAP_NOT_ENDED
    assert (entries[0].nr, entries[0].args[0], list(entries[0].ok)) == (293, 0x1000, [24, 23, 0, 0])
    assert entries[0].flags == lib.SNAP_E_STOP
    assert (entries[1].args[0], entries[1].flags) == (0x1004, lib.SNAP_E_LOAD)
    assert (entries[2].args[0], entries[2].args[1]) == (0, 2**64 - 1)
    assert entries[2].flags == lib.SNAP_E_STOP | lib.SNAP_E_REF | lib.SNAP_E_END


def test_the_same_bytes_are_placed_once():
    batch = Batch()
    for _ in range(100):
        batch.call("unlink", b"/same\0")
    assert batch.size_bytes == 6


def test_pieces_use_earlier_results_as_values():
    batch = Batch()
    opened = batch.call("open", b"/x\0", 0)
    for _ in range(10):
        batch.call("getpid")
    batch.call("close", opened)
    pieces = list(encoding.split(batch, encoding.HEADER_SIZE + 5 * encoding.ENTRY_SIZE))
    assert [len(piece.indices) for piece in pieces] == [5, 5, 2]
    results = [7] + [0] * 11
    raw = encoding.encode(batch, pieces[-1], 0, Ending(), results)
    _, entries = entries_of(raw)
    assert entries[1].args[0] == 7
    assert entries[1].flags == lib.SNAP_E_STOP | lib.SNAP_E_END


def test_children_lie_behind_the_main_branch():
    batch = Batch()
    made = batch.clone(bytes(88), lambda inner: inner.call("getpid"))
    batch.call("wait4", made, 0, 0, 0)
    (piece,) = encoding.split(batch, 65536)
    assert piece.indices == [0, 2, 1]
    _, entries = entries_of(encoding.encode(batch, piece, 0, Ending(), []))
    assert (entries[0].child, entries[1].flags & lib.SNAP_E_END, entries[2].flags & lib.SNAP_E_END) == (
        2,
        lib.SNAP_E_END,
        lib.SNAP_E_END,
    )
    with pytest.raises(ValueError, match="children"):
        list(encoding.split(batch, encoding.HEADER_SIZE + encoding.ENTRY_SIZE))


def test_bad_calls_are_refused_when_they_are_added():
    batch = Batch()
    with pytest.raises(ValueError, match="no system call"):
        batch.call("nonsense")
    with pytest.raises(ValueError, match="6 arguments"):
        batch.call("mmap", *range(7))
    with pytest.raises(ValueError, match="tolerated"):
        batch.call("close", 1, ok=range(1, 7))


def test_numbers_are_those_of_x86_64_not_x32():
    assert {
        name: syscalls.number(name) for name in ("ioctl", "rt_sigaction", "execve", "clone3", "mseal")
    } == {
        "ioctl": 16,
        "rt_sigaction": 13,
        "execve": 59,
        "clone3": 435,
        "mseal": 462,
    }
    assert syscalls.name(15) == "rt_sigreturn"
    assert syscalls.name(99999) == "syscall 99999"


CALL = b"\x0f\x05\xc3"
BACK = b"\x48\xc7\xc0\x0f\0\0\0\x0f\x05"


def reader(memory):
    return lambda at, size: memory[at : at + size]


def test_gadgets_may_lie_in_different_mappings():
    memory = b"\x90" * 10 + CALL + b"\x90" * 87 + b"\x90" * 50 + BACK + b"\x90" * 41
    ranges = [gadgets.CodeRange(0, 100, None), gadgets.CodeRange(100, 200, None)]
    assert gadgets.find(ranges, reader(memory), where="x") == gadgets.Gadgets(10, 150)


def test_a_missing_gadget_is_named():
    with pytest.raises(UnsupportedError, match="sigreturn"):
        gadgets.find([gadgets.CodeRange(0, 100, None)], reader(CALL + b"\x90" * 97), where="x")


def test_what_is_remembered_of_a_file_is_checked():
    key = (1, 2, 3)
    old, new = CALL + BACK + bytes(88), bytes(5) + CALL + BACK + bytes(83)
    code = [gadgets.CodeRange(0, 100, key)]
    assert gadgets.find(code, reader(old), where="x").syscall_ret == 0
    assert gadgets.find(code, reader(new), where="x").syscall_ret == 5
