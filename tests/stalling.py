"""A file server that stalls: a FUSE file system, spoken to by hand, which does not answer while somebody stands still.

    python -m tests.stalling MOUNTPOINT CONTROL

In the file system are `data` (three pages of "x"), `gone` (the same), `program` (an ELF file, /bin/sleep) and the directory `dir`; nothing is cached by the kernel, so that
each call asks. CONTROL is a file "PID OPERATION": requests of that kind (an index of OPERATIONS, or "all") get no answer while the
process is in a tracing stop, nor afterwards, until CONTROL is gone. What was not answered is written to CONTROL.log.

Layouts: <linux/fuse.h>, version 7.31.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import pathlib
import select
import stat
import struct
import sys

LOOKUP, FORGET, GETATTR, SETATTR, OPEN, READ, STATFS, RELEASE = 1, 2, 3, 4, 14, 15, 17, 18
UNLINK, FLUSH, INIT, OPENDIR, READDIR, RELEASEDIR, ACCESS = 10, 25, 26, 27, 28, 29, 34
INTERRUPT, DESTROY, BATCH_FORGET = 36, 38, 42
OPERATIONS = {
    "LOOKUP": LOOKUP,
    "GETATTR": GETATTR,
    "OPEN": OPEN,
    "READ": READ,
    "STATFS": STATFS,
    "FLUSH": FLUSH,
    "OPENDIR": OPENDIR,
    "ACCESS": ACCESS,
}
ROOT, DATA, DIR, GONE, PROGRAM = 1, 2, 3, 4, 5
CONTENT = b"x" * 3 * 4096
_NAMES = {b"data": DATA, b"dir": DIR, b"gone": GONE, b"program": PROGRAM}
_SILENT = {FORGET, BATCH_FORGET, INTERRUPT, DESTROY}


class Server:
    """One mounted file system."""

    def __init__(self, mountpoint: str, control: str) -> None:
        self.control = pathlib.Path(control)
        self.fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        self.unlinked: set[int] = set()
        self.program = pathlib.Path("/bin/sleep").read_bytes()
        self.kept: list[bytes] = []
        options = f"fd={self.fd},rootmode=40000,user_id=0,group_id=0,allow_other".encode()
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mount(b"stalling", mountpoint.encode(), b"fuse.stalling", 0, options) != 0:
            raise OSError(ctypes.get_errno(), "mount")

    def run(self) -> None:
        """Answer until the file system is unmounted."""
        while True:
            ready = select.select([self.fd], [], [], 0.01)[0]
            if self.kept and not self.control.exists():
                kept, self.kept = self.kept, []
                for request in kept:
                    self.answer(request)
            if not ready:
                continue
            try:
                request = os.read(self.fd, 1 << 18)
            except OSError as error:
                if error.errno == errno.ENODEV:
                    return
                if error.errno in {errno.EINTR, errno.ENOENT, errno.EAGAIN}:
                    continue
                raise
            if self.stalls(request):
                self.kept.append(request)
            else:
                self.answer(request)

    def stalls(self, request: bytes) -> bool:
        """Whether this one is not answered now."""
        operation = struct.unpack_from("=I", request, 4)[0]
        try:
            pid, wanted = self.control.read_text().split()
            state = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (OSError, ValueError):
            return False
        if operation in _SILENT | {INIT} or (wanted != "all" and OPERATIONS[wanted] != operation):
            return False
        if state != "t" and not self.kept:
            return False
        with open(f"{self.control}.log", "a", encoding="ascii") as log:
            log.write(f"{operation}\n")
        return True

    def attributes(self, node: int) -> bytes:
        """A struct fuse_attr."""
        mode = stat.S_IFDIR | 0o777 if node in {ROOT, DIR} else stat.S_IFREG | 0o777
        size = 4096 if node in {ROOT, DIR} else len(self.program) if node == PROGRAM else len(CONTENT)
        links = 0 if node in self.unlinked else 1
        return struct.pack("=6Q10I", node, size, 8, 0, 0, 0, 0, 0, 0, mode, links, 0, 0, 0, 4096, 0)

    def answer(self, request: bytes) -> None:
        """Answer one request."""
        length, operation, unique, node = struct.unpack_from("=IIQQ", request)
        body = request[40:length]
        code, data = 0, b""
        if operation in _SILENT:
            return
        if operation == INIT:
            data = struct.pack("=IIIIHHIIHHI28x", 7, 31, 0, 0, 12, 9, 65536, 1, 16, 0, 0)
        elif operation == LOOKUP:
            found = _NAMES.get(body.rstrip(b"\0"), 0) if node == ROOT else 0
            if not found or found in self.unlinked:
                code = -errno.ENOENT
            else:
                data = struct.pack("=QQQQII", found, 0, 0, 0, 0, 0) + self.attributes(found)
        elif operation in {GETATTR, SETATTR}:
            data = struct.pack("=QII", 0, 0, 0) + self.attributes(node)
        elif operation in {OPEN, OPENDIR}:
            data = struct.pack("=QII", node, 0, 0)
        elif operation == READ:
            offset, size = struct.unpack_from("=QI", body, 8)
            data = (self.program if node == PROGRAM else CONTENT)[offset : offset + size]
        elif operation == STATFS:
            data = struct.pack("=5Q4I24x", 100, 100, 100, 10, 10, 4096, 255, 4096, 0)
        elif operation == UNLINK:
            self.unlinked.add(_NAMES[body.rstrip(b"\0")])
        elif operation not in {RELEASE, RELEASEDIR, FLUSH, ACCESS, READDIR}:
            code = -errno.ENOSYS
        with contextlib.suppress(FileNotFoundError):  # whoever asked is gone
            os.write(self.fd, struct.pack("=IiQ", 16 + len(data), code, unique) + data)


if __name__ == "__main__":
    Server(sys.argv[1], sys.argv[2]).run()
