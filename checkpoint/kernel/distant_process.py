"""The process that asks file servers for snap (distant.py), and may have to wait for them for ever.

Started as a program of its own, with the standard library alone. It gets questions on standard input, a socket, each a length of
32 bits and a marshalled (what, path, arguments), and answers (True, answer) or (False, errno) in the same way.
"""

from __future__ import annotations

import array
import ctypes
import errno
import marshal
import os
import socket
import struct
from collections.abc import Callable
from typing import Any

_LENGTH = struct.Struct("=I")
_PIECE = 1 << 20
_O_PATH = 0o10000000


def _stat(path: bytes) -> Any:
    return os.stat(path).__reduce__()[1]


def _lstat(path: bytes) -> Any:
    return os.lstat(path).__reduce__()[1]


def _read(path: bytes, flags: int, offset: int, size: int) -> bytes:
    fd = os.open(path, flags | os.O_CLOEXEC)
    try:
        return os.pread(fd, size, offset)
    finally:
        os.close(fd)


def _copy(path: bytes) -> int:
    """A memfd with the content of a file, holes kept. The file stays open: closing it may wait, too (FUSE_FLUSH)."""
    source = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    copy = os.memfd_create("snap-copy", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    size = os.fstat(source).st_size
    os.ftruncate(copy, size)
    at = 0
    while at < size:
        try:
            at = os.lseek(source, at, os.SEEK_DATA)
            end = os.lseek(source, at, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:
                break
            raise
        while at < end:
            data = os.pread(source, min(_PIECE, end - at), at)
            if not data:
                return copy
            os.pwrite(copy, data, at)
            at += len(data)
    return copy


def path_of_handle(mount: bytes, handle_type: int, handle: bytes) -> bytes:
    """Where the kernel thinks a file is that has this handle (open_by_handle_at(2)) on the file system of a mount."""
    libc = ctypes.CDLL(None, use_errno=True)
    packed = struct.pack("=Ii", len(handle), handle_type) + handle
    place = os.open(mount, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fd = libc.open_by_handle_at(place, packed, _O_PATH | os.O_CLOEXEC)
    finally:
        os.close(place)
    if fd < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), mount)
    try:
        return os.readlink(b"/proc/self/fd/%d" % fd)
    finally:
        os.close(fd)


_QUESTIONS: dict[str, Callable[..., Any]] = {
    "stat": _stat,
    "lstat": _lstat,
    "read": _read,
    "realpath": os.path.realpath,
    "copy": _copy,
    "path_of_handle": path_of_handle,
}


def _exactly(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = connection.recv(size - len(data))
        if not part:
            os._exit(0)
        data += part
    return data


def main() -> None:
    """Answer until nobody asks."""
    connection = socket.socket(fileno=0)
    while True:
        (size,) = _LENGTH.unpack(_exactly(connection, _LENGTH.size))
        what, path, args = marshal.loads(_exactly(connection, size))  # noqa: S302 - of snap's
        fds = array.array("i")
        try:
            answer = True, _QUESTIONS[what](path, *args)
        except OSError as error:
            answer = False, error.errno or errno.EIO
        if what == "copy" and answer[0]:
            fds.append(answer[1])
        data = marshal.dumps(answer)
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)] if fds else []
        sent = connection.sendmsg([_LENGTH.pack(len(data)) + data], ancillary)
        connection.sendall((_LENGTH.pack(len(data)) + data)[sent:])
        for fd in fds:
            os.close(fd)


if __name__ == "__main__":
    main()
