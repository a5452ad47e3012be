"""A child with descriptors, its dump, and the same descriptions opened in this process."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Callable, Iterator
from types import SimpleNamespace

from checkpoint.context import DumpContext, DumpOptions
from checkpoint.kernel import proc, rights
from checkpoint.kernel.fdinfo import parse_fdinfo
from checkpoint.model import holders
from checkpoint.model.holders import Holders
from checkpoint.resources import credentials, files
from checkpoint.resources.files.opening import Opening
from images import files_pb2, task_pb2


@contextlib.contextmanager
def child(prepare: Callable[[], object]) -> Iterator[int]:
    """A child that has done `prepare` with a nearly empty descriptor table."""
    ready, started = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            null = os.open("/dev/null", os.O_RDWR)
            for fd in (0, 1, 2):
                os.dup2(null, fd)
            os.dup2(started, 900)
            os.closerange(3, 900)
            kept = prepare()
            os.write(900, b"r" if kept is not Ellipsis else b"e")
            os.close(900)
            signal.pause()
        finally:
            os._exit(1)
    os.close(started)
    try:
        assert os.read(ready, 1) == b"r"
        assert os.read(ready, 1) == b""
        yield pid
    finally:
        os.close(ready)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


@contextlib.contextmanager
def child_keeping(fd: int) -> Iterator[int]:
    """A child with `fd` as descriptor 3."""
    ready, started = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.dup2(started, 900)
        os.dup2(fd, 3) if fd != 3 else None
        null = os.open("/dev/null", os.O_RDWR)
        for number in (0, 1, 2):
            os.dup2(null, number)
        os.closerange(4, 900)
        os.close(900)
        signal.pause()
        os._exit(1)
    os.close(started)
    os.read(ready, 1)
    os.close(ready)
    try:
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def files_findings(pid):
    found = []
    files.look(pid, found)
    return found


def dump(*pids: int) -> DumpContext:
    ctx = DumpContext(root_pid=pids[0], sink=None, parent=None, options=DumpOptions())
    for pid in pids:
        ctx.processes[pid] = SimpleNamespace(
            pid=pid, is_zombie=False, start_time_ticks=1 << 40, threads=[], stat=proc.read_stat(pid)
        )
        thread = task_pb2.Thread(tid=pid, credentials=credentials.dump(proc.read_status(pid), 0))
        ctx.images[f"process/{pid}"] = task_pb2.Process(pid=pid, threads=[thread])
    files.dump_files(ctx)
    return ctx


class Restored:
    """The descriptions of a dump, open here; `[n]` is the child's descriptor n."""

    def __init__(self, ctx: DumpContext, pid: int, terminal: str = "auto") -> None:
        self.warnings: list[str] = []
        fake = SimpleNamespace(
            state={},
            options=SimpleNamespace(terminal=terminal, dry_run=False),
            accepted=(),
            old=frozenset(),
            tables=lambda: (),
            warn=self.warnings.append,
            processes={},
            stubs={},
            names=("files",),
            holders=Holders(
                frozenset(
                    holders.rights_of(thread.credentials)
                    for image in ctx.images.values()
                    if isinstance(image, task_pb2.Process)
                    for thread in image.threads
                )
            ),
            acting=rights.Acting(),
            image=lambda name, _kind: ctx.images[name],
        )
        image = files_pb2.Files.FromString(ctx.images["files"].SerializeToString())
        self.opening = Opening(fake, image)
        with fake.acting:
            self.opening.check()
            self.opening.open_all()
        self.table = {e.fd: e for e in ctx.images[f"fdtable/{pid}"].entries}

    def __getitem__(self, fd: int) -> int:
        return self.opening.fds[self.table[fd].description]

    def info(self, fd: int):
        with open(f"/proc/self/fdinfo/{self[fd]}", "rb") as file:
            return parse_fdinfo(file.read())

    def socket(self, fd: int) -> socket.socket:
        return socket.socket(fileno=os.dup(self[fd]))
