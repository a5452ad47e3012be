"""Login uids: the user that had logged in, for the audit log (/proc/PID/loginuid; pam_loginuid(8)).

Each thread has one and hands it on to those that it makes; mostly nobody sets it but the login. Only a thread itself may set its own.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from checkpoint.kernel import threads
from images import task_pb2

if TYPE_CHECKING:
    from checkpoint.parasite import StubTask
    from checkpoint.restore_context import RestoreContext


def read(pid: int) -> bytes:
    """That of a process's first thread; empty where the kernel has no audit."""
    try:
        with open(f"/proc/{pid}/loginuid", "rb", buffering=0) as file:
            return file.readall()
    except FileNotFoundError:
        return b""


def answer(message: task_pb2.Process) -> None:
    """Add those of threads that have another one than their process. After the thaw: hardly anybody changes it, and then once."""
    if len(message.threads) < 2 or not message.loginuid:
        return
    paths = [f"/proc/{message.pid}/task/{thread.tid}/loginuid" for thread in message.threads]
    for thread, data in zip(message.threads, threads.read_files(paths), strict=True):
        if data and data != message.loginuid:
            thread.loginuid = data


def restore(ctx: RestoreContext, stub: StubTask, process: task_pb2.Process) -> None:
    """Of the process, before it has threads, which inherit it."""
    if process.loginuid and process.loginuid != read(process.pid):
        _write(ctx, stub, process.pid, process.pid, process.loginuid)


def restore_threads(ctx: RestoreContext, process: task_pb2.Process) -> None:
    """Of the threads that had another one."""
    for thread in process.threads:
        if thread.loginuid:
            _write(ctx, ctx.threads[thread.tid], process.pid, thread.tid, thread.loginuid)


def _write(ctx: RestoreContext, stub: StubTask, pid: int, tid: int, wanted: bytes) -> None:
    try:
        fd = os.open(f"/proc/{pid}/task/{tid}/loginuid", os.O_WRONLY | os.O_CLOEXEC)
    except OSError as failed:
        error = failed.errno or errno.EIO
    else:
        try:
            batch = stub.batch()
            remote = ctx.give(batch, fd)
            written = batch.call("write", remote, wanted, len(wanted), check=False)
            batch.call("close", remote)
            error = -min(stub.run(batch)[written], 0)
        finally:
            os.close(fd)
    if error:
        ctx.warn(
            f"task {tid}: its login uid {wanted.decode('ascii', 'replace')} is not set "
            f"({os.strerror(error)}); it has that of snap"
        )
