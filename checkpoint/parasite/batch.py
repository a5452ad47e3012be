"""Batches of system calls and how they become bytes: what the blob runs, before and after.

Owns the encoding (layouts come from parasite_c/protocol.h through the compiler), argument kinds and the result
object. No I/O: a batch is encoded for an address and a capacity, into one or more pieces; results of earlier
pieces become plain values in later ones.

    entries:  [struct snap_batch][struct snap_entry] ...        of one piece
    data:     [buffer or bytes] ...                             of the whole batch
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from parasite_c._native import ffi, lib

from checkpoint.kernel import syscalls

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

HEADER_SIZE = ffi.sizeof("struct snap_batch")
ENTRY_SIZE = ffi.sizeof("struct snap_entry")
NOT_RUN = -(2**63)
_M64 = 2**64 - 1
_MAX_ERRNO = 4095


class RemoteCallError(OSError):
    """A system call in a target failed. `errno` and `name` say which and why; `tid` where."""

    def __init__(self, name: str, code: int, tid: int = 0) -> None:
        super().__init__(
            code, f"{name} in task {tid}: {os.strerror(code)} ({errno.errorcode.get(code, '?')})"
        )
        self.name = name
        self.tid = tid


@dataclass(frozen=True, slots=True, eq=False)
class Ref:
    """The result of an entry, usable as argument of later entries of the same batch and as key of Results."""

    index: int


@dataclass(frozen=True, slots=True, eq=False)
class Buffer:
    """Bytes in the data area: zeroed or initialised, readable afterwards. As an argument: its address."""

    index: int
    size: int

    def at(self, offset: int) -> Place:
        """The address of a part of it."""
        return Place(self, offset)

    def i32(self, offset: int = 0) -> Load:
        """The int32 that stands there when the call is made (pipe2's descriptors)."""
        return Load(self, offset)


@dataclass(frozen=True, slots=True)
class Place:
    buffer: Buffer
    offset: int


@dataclass(frozen=True, slots=True)
class Load:
    buffer: Buffer
    offset: int


Arg = int | bytes | Ref | Buffer | Place | Load


@dataclass(slots=True)
class _Entry:
    name: str
    args: tuple[int | Ref | Place | Load, ...]
    flags: int
    ok: tuple[int, ...]
    branch: int = 0
    child: _Branch | None = None


@dataclass(slots=True)
class _Branch:
    entries: list[int] = field(default_factory=list)


class Batch:
    """An array of system calls, run by one task at a time, any number of times."""

    def __init__(self) -> None:
        self.entries: list[_Entry] = []
        self.order: list[int] = []
        self.buffers: list[tuple[Buffer, bytes]] = []
        self.size_bytes = 0
        """Of buffers and bytes, aligned."""
        self.offsets: list[int] = []
        self._branches: list[_Branch] = [_Branch()]
        self._current = self._branches[0]
        self._interned: dict[bytes, Buffer] = {}

    def __len__(self) -> int:
        return len(self.entries)

    # -- data ----------------------------------------------------------------------------------------------------

    def buffer(self, size: int, *, align: int = 16) -> Buffer:
        """`size` zeroed bytes."""
        return self._place(size, b"", align)

    def data(self, content: bytes) -> Buffer:
        """A buffer that holds `content`."""
        return self._place(len(content), bytes(content), 16)

    def _place(self, size: int, content: bytes, align: int) -> Buffer:
        if size < 0 or align & (align - 1):
            raise ValueError("a buffer has a size and an alignment that is a power of two")
        offset = -(-self.size_bytes // align) * align
        buffer = Buffer(len(self.buffers), size)
        self.buffers.append((buffer, content))
        self.offsets.append(offset)
        self.size_bytes = offset + max(size, 1)
        return buffer

    # -- calls ---------------------------------------------------------------------------------------------------

    def call(self, name: str, *args: Arg, ok: Collection[int] = (), check: bool = True) -> Ref:
        """Add a system call. bytes arguments are copied to the data area and passed by address.

        check=True: the batch stops when it fails with an errno that is not in `ok` (at most 4), and run() raises.
        """
        flags = lib.SNAP_E_STOP if check else 0
        return self._add(name, args, flags, tuple(ok))

    def undo(self, name: str, *args: Arg) -> None:
        """A call for the case that snap dies before the next batch of this task: closes what this one opened.
        Left out when one of its references failed or did not run.
        """
        self._add(name, args, lib.SNAP_E_UNDO, ())

    def clone(self, clone3_args: bytes | Buffer, child: Callable[[Batch], object] | None = None, *,
              ok: Collection[int] = (), check: bool = True) -> Ref:  # fmt: skip
        """clone3 whose child stays in the blob: it runs the calls that `child(batch)` adds, then exits (thread-wise,
        status 0). With CLONE_VM give it a stack of its own. child=None: it exits at once, or, when it is traced
        from birth, waits to be driven.
        """
        if isinstance(clone3_args, bytes):
            clone3_args = self.data(clone3_args)
        size = clone3_args.size
        branch = _Branch()
        flags = lib.SNAP_E_CLONE | (lib.SNAP_E_STOP if check else 0)
        ref = self._add("clone3", (clone3_args, size), flags, tuple(ok))
        self.entries[ref.index].child = branch
        if child is not None:
            self._branches.append(branch)
            before, self._current = self._current, branch
            try:
                child(self)
            finally:
                self._current = before
        return ref

    def _add(self, name: str, args: Sequence[Arg], flags: int, ok: tuple[int, ...]) -> Ref:
        if len(args) > 6:
            raise ValueError(f"{name}: a system call has at most 6 arguments")
        if len(ok) > lib.SNAP_MAX_OK:
            raise ValueError(f"{name}: at most {lib.SNAP_MAX_OK} tolerated errnos")
        syscalls.number(name)
        plain: list[int | Ref | Place | Load] = []
        for arg in args:
            if isinstance(arg, (bytes, bytearray, memoryview)):
                content = bytes(arg)
                known = self._interned.get(content)
                if known is None:
                    known = self._interned[content] = self.data(content)
                plain.append(Place(known, 0))
            elif isinstance(arg, Buffer):
                plain.append(Place(arg, 0))
            elif isinstance(arg, (Ref, Place, Load)):
                plain.append(arg)
            else:
                plain.append(int(arg))
        self._current.entries.append(len(self.entries))
        self.entries.append(_Entry(name, tuple(plain), flags, ok))
        return Ref(len(self.entries) - 1)

    def branches(self) -> Sequence[_Branch]:
        """The main branch first, then those of children."""
        return self._branches

    @property
    def has_children(self) -> bool:
        return len(self._branches) > 1


@dataclass(slots=True)
class Piece:
    """Entries that run in one go: positions in the blob's array -> indices in the batch."""

    indices: list[int]
    ends: set[int]
    """Positions at which a branch ends."""


def split(batch: Batch, capacity: int, *, single: bool = False) -> Iterator[Piece]:
    """The pieces of a batch for `capacity` bytes of entries. ValueError when it cannot be cut to fit."""
    room = capacity - HEADER_SIZE
    most = 1 if single else room // ENTRY_SIZE
    branches = batch.branches()
    if batch.has_children:
        indices: list[int] = []
        ends: set[int] = set()
        for branch in branches:
            indices += branch.entries
            if branch.entries:
                ends.add(len(indices) - 1)
        if len(indices) > room // ENTRY_SIZE:
            raise ValueError("a batch with children cannot be cut into pieces and is too large")
        yield Piece(indices, ends)
        return
    main = branches[0].entries
    for start in range(0, max(len(main), 1), most):
        part = main[start : start + most]
        yield Piece(part, {len(part) - 1} if part else set())


@dataclass(frozen=True, slots=True)
class Ending:
    """How a batch announces its end, and where it leaves when nobody listens."""

    leave_sp: int = 0
    """Address of the fail-safe frame; 0: exit."""
    leave_only: bool = False
    """Announce by rt_sigreturn itself."""
    sig: int = 0
    """Announce by this signal to itself; 0: by the sentinel call."""
    blocked: bool = False
    """The task blocks that signal: one from somebody else must stay pending."""
    pid: int = 0
    tid: int = 0
    """As the target's own pid namespace calls it."""

    @property
    def flags(self) -> int:
        return (lib.SNAP_B_LEAVE if self.leave_only else 0) | (lib.SNAP_B_SIGNAL if self.sig else 0)


STOPPED_AT = ffi.offsetof("struct snap_batch", "stopped_at")


def encode(batch: Batch, piece: Piece, data: int, ending: Ending, results: Sequence[int]) -> bytearray:
    """The bytes of [header][entries] for one piece, whose data is at address `data`.

    `results` hold those of earlier pieces.
    """
    position = {index: at for at, index in enumerate(piece.indices)}
    out = bytearray(HEADER_SIZE + ENTRY_SIZE * len(piece.indices))
    header = ffi.cast("struct snap_batch *", ffi.from_buffer(out))
    header.leave_sp = ending.leave_sp
    header.flags = ending.flags
    header.nr_entries = len(piece.indices)
    header.stopped_at = lib.SNAP_NOT_ENDED
    header.sig, header.pid, header.tid = ending.sig, ending.pid, ending.tid
    entries = ffi.cast("struct snap_entry *", header + 1)
    offsets = batch.offsets
    for at, index in enumerate(piece.indices):
        source = batch.entries[index]
        entry = entries[at]
        entry.nr = syscalls.NUMBERS[source.name]
        bits = source.flags
        for k, arg in enumerate(source.args):
            if isinstance(arg, int):
                value = arg & _M64
            elif isinstance(arg, Place):
                value = data + offsets[arg.buffer.index] + arg.offset
            elif isinstance(arg, Load):
                value = data + offsets[arg.buffer.index] + arg.offset
                bits |= lib.SNAP_E_LOAD << k
            elif arg.index in position:
                value = position[arg.index]
                bits |= lib.SNAP_E_REF << k
            else:
                value = results[arg.index] & _M64
            entry.args[k] = value
        if at in piece.ends:
            bits |= lib.SNAP_E_END
        if source.child is not None:
            first = source.child.entries
            entry.child = position[first[0]] if first else lib.SNAP_NO_CHILD
        entry.flags = bits
        entry.result = NOT_RUN
        for k, code in enumerate(source.ok):
            entry.ok[k] = code
    return out


def encode_data(batch: Batch) -> bytearray:
    """The initial content of all buffers."""
    out = bytearray(batch.size_bytes)
    for (_, content), offset in zip(batch.buffers, batch.offsets, strict=True):
        out[offset : offset + len(content)] = content
    return out


def decode(raw: bytes | bytearray, piece: Piece, results: list[int]) -> int:
    """Take the results of a piece that ran; returns the position at which it stopped (len = it ended)."""
    header = ffi.cast("struct snap_batch *", ffi.from_buffer(raw))
    entries = ffi.cast("struct snap_entry *", header + 1)
    for at, index in enumerate(piece.indices):
        results[index] = entries[at].result
    return int(header.stopped_at)


def failure(batch: Batch, index: int, result: int, tid: int) -> RemoteCallError:
    return RemoteCallError(batch.entries[index].name, -result, tid)


def is_error(result: int) -> bool:
    return -_MAX_ERRNO <= result < 0


class Results:
    """What a batch gave: results[ref] as signed 64-bit values (negative errno on failure), bytes(buffer) as they
    were when the batch ended.
    """

    def __init__(self, batch: Batch, values: list[int], data: bytes) -> None:
        self._batch = batch
        self._values = values
        self._data = data

    def __getitem__(self, ref: Ref) -> int:
        value = self._values[ref.index]
        if value == NOT_RUN:
            raise KeyError(f"{self._batch.entries[ref.index].name} did not run")
        return value

    def ran(self, ref: Ref) -> bool:
        return self._values[ref.index] != NOT_RUN

    def error(self, ref: Ref) -> int:
        """The errno of a call that was allowed to fail; 0 when it did not."""
        value = self[ref]
        return -value if is_error(value) else 0

    def bytes(self, buffer: Buffer) -> bytes:
        offset = self._batch.offsets[buffer.index]
        return self._data[offset : offset + buffer.size]
