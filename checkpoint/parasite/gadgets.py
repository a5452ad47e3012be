"""Finds instructions that every process already has: `syscall; ret` and a sigreturn restorer.

Remote calls use what lies in libc, the vdso or the program itself, so that no byte of a target's code is changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from snapshotter.base.errors import UnsupportedError

SYSCALL_RET = b"\x0f\x05\xc3"
SIGRETURN = (b"\x48\xc7\xc0\x0f\x00\x00\x00\x0f\x05", b"\xb8\x0f\x00\x00\x00\x0f\x05")
"""mov $15,%rax; syscall (glibc, Go) and mov $15,%eax; syscall (musl)."""
MAX_SIGRETURN = max(map(len, SIGRETURN))

_PIECE = 1 << 22
_OVERLAP = 16


@dataclass(frozen=True, slots=True)
class Gadgets:
    """Addresses in one target."""

    syscall_ret: int
    sigreturn: int


@dataclass(frozen=True, slots=True)
class CodeRange:
    """An executable mapping; `key` names the same bytes in other processes (None: private to this one)."""

    start: int
    end: int
    key: tuple[int, int, int] | None


Read = Callable[[int, int], bytes]

_known: dict[tuple[tuple[int, int, int], int], tuple[int | None, int | None]] = {}


def search(data: bytes) -> tuple[int | None, int | None]:
    """Offsets of (syscall; ret) and (restorer) in `data`."""
    call = data.find(SYSCALL_RET)
    back = [at for at in (data.find(code) for code in SIGRETURN) if at >= 0]
    return (call if call >= 0 else None), (min(back) if back else None)


def _scan(code: CodeRange, read: Read) -> tuple[int | None, int | None]:
    call: int | None = None
    back: int | None = None
    for at in range(code.start, code.end, _PIECE):
        end = min(at + _PIECE + _OVERLAP, code.end)
        try:
            data = read(at, end - at)
        except OSError:
            continue
        new_call, new_back = search(data)
        if call is None and new_call is not None:
            call = at - code.start + new_call
        if back is None and new_back is not None:
            back = at - code.start + new_back
        if call is not None and back is not None:
            break
    return call, back


def _offsets(code: CodeRange, read: Read) -> tuple[int | None, int | None]:
    if code.key is None:
        return _scan(code, read)
    key = (code.key, code.end - code.start)
    if key in _known:
        call, back = _known[key]
        # The file may have been written since: believe the bytes only
        fits = call is None or read(code.start + call, len(SYSCALL_RET)) == SYSCALL_RET
        if fits and (back is None or read(code.start + back, 9).startswith(SIGRETURN)):
            return call, back
    found = _scan(code, read)
    _known[key] = found
    return found


def find(ranges: Iterator[CodeRange] | list[CodeRange], read: Read, *, where: str) -> Gadgets:
    """Both gadgets, anywhere in the executable mappings. UnsupportedError when one is missing."""
    call: int | None = None
    back: int | None = None
    for code in ranges:
        new_call, new_back = _offsets(code, read)
        if call is None and new_call is not None:
            call = code.start + new_call
        if back is None and new_back is not None:
            back = code.start + new_back
        if call is not None and back is not None:
            return Gadgets(call, back)
    missing = "system call instruction followed by a return" if call is None else "sigreturn restorer"
    raise UnsupportedError(
        f"its code has no {missing}: nothing can be run in it safely",
        where=where,
        hint="a statically linked program without signal handlers; link it dynamically",
    )
