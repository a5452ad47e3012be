"""A slow file server: a FUSE file system, spoken to by hand, with one file that is read past the page cache (FOPEN_DIRECT_IO).

    python -m tests.slow_files MOUNTPOINT SECONDS

The file is `varied`, 16 MiB, no two answers alike; each read is answered after so many seconds. The kernel copies an answer into the
reader's pages, which it has looked up when the read began. statfs(2) fails with ENOSYS, as with servers that do not have it. Layouts: <linux/fuse.h>, version 7.31.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import pathlib
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Iterator

from tests.jobs import ROOT, wait_until

SIZE = 16 << 20
_LOOKUP, _FORGET, _GETATTR, _OPEN, _READ, _INIT, _BATCH_FORGET = 1, 2, 3, 14, 15, 26, 42
_RELEASE, _FLUSH, _INTERRUPT, _DESTROY = 18, 25, 36, 38
_SILENT = {_FORGET, _BATCH_FORGET, _INTERRUPT, _DESTROY}
_FILE = 2
_DIRECT_IO = 1


def _attributes(node: int) -> bytes:
    """A struct fuse_attr."""
    mode = stat.S_IFREG | 0o444 if node == _FILE else stat.S_IFDIR | 0o755
    size = SIZE if node == _FILE else 4096
    return struct.pack("=6Q10I", node, size, 8, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)


def _answer(operation: int, node: int, body: bytes, pause_s: float) -> tuple[int, bytes]:
    """(error, data)."""
    if operation == _INIT:
        return 0, struct.pack("=IIIIHHIIHHI28x", 7, 31, 0, 0, 12, 9, 65536, 1, 16, 0, 0)
    if operation == _LOOKUP:
        if node != 1 or body != b"varied\0":
            return -errno.ENOENT, b""
        return 0, struct.pack("=QQQQII", _FILE, 0, 9, 9, 0, 0) + _attributes(_FILE)
    if operation == _GETATTR:
        return 0, struct.pack("=QII", 9, 0, 0) + _attributes(node)
    if operation == _OPEN:
        return 0, struct.pack("=QII", 0, _DIRECT_IO, 0)
    if operation == _READ:
        (size,) = struct.unpack_from("=I", body, 16)
        time.sleep(pause_s)
        return 0, os.urandom(size)
    return (0 if operation in {_RELEASE, _FLUSH} else -errno.ENOSYS), b""


def serve(mountpoint: str, pause_s: float) -> None:
    """Until it is unmounted."""
    fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    libc = ctypes.CDLL(None, use_errno=True)
    options = f"fd={fd},rootmode=40000,user_id=0,group_id=0,allow_other".encode()
    if libc.mount(b"slow", mountpoint.encode(), b"fuse.slow", 0, options) != 0:
        raise OSError(ctypes.get_errno(), "mount")
    while True:
        try:
            request = os.read(fd, 1 << 18)
        except OSError as error:
            if error.errno == errno.ENODEV:
                return
            if error.errno in {errno.EINTR, errno.ENOENT, errno.EAGAIN}:
                continue
            raise
        length, operation, unique, node = struct.unpack_from("=IIQQ", request)
        if operation not in _SILENT:
            code, data = _answer(operation, node, request[40:length], pause_s)
            with contextlib.suppress(FileNotFoundError):  # whoever asked is gone
                os.write(fd, struct.pack("=IiQ", 16 + len(data), code, unique) + data)


@contextlib.contextmanager
def mounted(mountpoint: pathlib.Path, pause_s: float) -> Iterator[pathlib.Path]:
    """The file, for the time of the context. Whoever reads it must have ended by then."""
    mountpoint.mkdir()
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.slow_files", mountpoint, str(pause_s)],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
    )
    try:
        wait_until(mountpoint.is_mount, "the file system mounted")
        yield mountpoint / "varied"
    finally:
        ctypes.CDLL(None).umount2(os.fsencode(mountpoint), 2)
        server.wait(10)


if __name__ == "__main__":
    serve(sys.argv[1], float(sys.argv[2]))
