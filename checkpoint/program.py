"""Which program a process runs, now or in a point: tells a restart of a job from another program under its name.

A program is its executable's path and the user who runs it. An interpreter's executable says little: there the words of the command line
up to the first that is no option (the script, `-m module`, `-c code`) belong to it. What follows are arguments, which may change.
A path, not an inode: a program that was upgraded is the same one.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass

from checkpoint.kernel import proc
from images import codec, mm_pb2, task_pb2
from snapshotter.base.errors import VerificationError, wrap_os_error
from snapshotter.base.pages import PAGE_SIZE, PageSource
from snapshotter.base.runs import PageRuns

_DELETED = b" (deleted)"
_INTERPRETER = re.compile(
    rb"(pypy|python|perl|ruby|node|nodejs|lua|luajit|php|bash|dash|sh|zsh|ksh|mksh|fish|busybox|tclsh|wish"
    rb"|java|Rscript|R|julia|guile|sbcl|octave|erl|beam\.smp|escript|awk|gawk|mawk)[\d.]*m?"
)
_MOST_ARG_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Program:
    """What must be equal for two processes to run the same program."""

    exe: bytes
    ruid: int
    words: tuple[bytes, ...] = ()
    """Of an interpreter: its options and what it interprets."""

    def __str__(self) -> str:
        said = b" ".join([self.exe, *self.words])
        return f"{os.fsdecode(said[:200])} of user {self.ruid}"


def of_command(exe: bytes, ruid: int, command: bytes) -> Program:
    """From the executable's path, the real user id and the arguments as the kernel keeps them (each ends with a zero byte)."""
    exe = exe.removesuffix(_DELETED)
    if not _INTERPRETER.fullmatch(os.path.basename(exe)):
        return Program(exe, ruid)
    words = command.rstrip(b"\0").split(b"\0")
    if os.path.basename(exe).startswith(b"busybox"):  # the first word says which of its programs it is
        words.insert(0, b"")
    for at, word in enumerate(words[1:], 1):
        if not word.startswith(b"-"):
            return Program(exe, ruid, tuple(words[1 : at + 1]))
    return Program(exe, ruid, tuple(words[1:]))


def running(pid: int) -> Program:
    """What a living process runs.

    Raises TargetGoneError, PermissionDeniedError.
    """
    try:
        exe = os.readlink(b"/proc/%d/exe" % pid)
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            command = file.read(_MOST_ARG_BYTES)
    except FileNotFoundError as error:
        gone = ProcessLookupError(3, "ESRCH")
        raise wrap_os_error(gone, "cannot see its executable", where=f"task {pid}") from error
    except OSError as error:
        raise wrap_os_error(error, "cannot see its executable", where=f"task {pid}") from error
    return of_command(exe, proc.read_status(pid).uids[0], command)


def stored(images: Callable[[str], bytes], source: PageSource, pid: int) -> Program:
    """What the root process of a point ran.

    Raises VerificationError: the point is damaged.
    """
    name = f"process/{pid}"
    process = codec.parse_as(name, images(name), task_pb2.Process)
    if not process.threads or not process.mm:
        raise VerificationError("has no address space", where=f"image {name!r}")
    mm = codec.parse_as(process.mm, images(process.mm), mm_pb2.Mm)
    command = b""
    if mm.arg_start < mm.arg_end:
        end = min(mm.arg_end, mm.arg_start + _MOST_ARG_BYTES)
        command = _read(source, process.mm, mm.arg_start, end)
    return of_command(mm.exe.path, process.threads[0].credentials.ruid, command)


def _read(source: PageSource, space: str, start: int, end: int) -> bytes:
    first, last = start // PAGE_SIZE, (end - 1) // PAGE_SIZE
    memory = bytearray((last - first + 1) * PAGE_SIZE)

    def write(runs: PageRuns, data: memoryview) -> None:
        at = 0
        for page, count in runs:
            nr_bytes = int(count) * PAGE_SIZE
            offset = (int(page) - first) * PAGE_SIZE
            memory[offset : offset + nr_bytes] = data[at : at + nr_bytes]
            at += nr_bytes

    source.fill(space, write, [(first, last - first + 1)])
    return bytes(memory[start - first * PAGE_SIZE : end - first * PAGE_SIZE])
