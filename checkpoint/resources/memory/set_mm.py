"""The kernel's notes about an address space: brk, argument and environment bounds, auxv, the executable.

Owns prctl(PR_SET_MM, PR_SET_MM_MAP), which sets them all at once, without CAP_SYS_RESOURCE. It gives EBUSY
while any mapping of the old executable is left, so it comes after everything of the stub's was unmapped.
"""

from __future__ import annotations

import errno
import os
import struct
from typing import TYPE_CHECKING

from checkpoint.resources.memory import identity, mapped, shmem
from checkpoint.restore_context import RestoreContext
from images import mm_pb2
from snapshotter.base.errors import SnapshotterError, wrap_os_error
from snapshotter.base.pages import PAGE_SIZE

if TYPE_CHECKING:
    from checkpoint.parasite import StubTask

_PR_SET_MM, _PR_SET_MM_MAP = 35, 14
_PROT_READ_WRITE, _PRIVATE_ANONYMOUS = 3, 0x22
_MM_MAP = struct.Struct("<12QIi")
"""struct prctl_mm_map, include/uapi/linux/prctl.h: eleven addresses, auxv pointer, its size, exe_fd."""


def encode(mm: mm_pb2.Mm, auxv_address: int, exe_fd: int) -> bytes:
    """Encode struct prctl_mm_map."""
    return _MM_MAP.pack(
        mm.start_code, mm.end_code, mm.start_data, mm.end_data, mm.start_brk, mm.brk, mm.start_stack,
        mm.arg_start, mm.arg_end, mm.env_start, mm.env_end, auxv_address, len(mm.auxv), exe_fd,
    )  # fmt: skip


def set_mm(ctx: RestoreContext, stub: StubTask, mm: mm_pb2.Mm) -> None:
    """Set all of it in a stub that has its final mappings."""
    if mm.exe_shmem:
        local_fd = shmem.open_read_only(ctx, mm.exe_shmem, drop_writable=True)
    else:
        local_fd = os.dup(mapped.descriptor(ctx, mm.exe))
    try:
        batch = stub.batch()
        remote_fd = ctx.give(batch, local_fd)
        scratch = batch.call("mmap", 0, 2 * PAGE_SIZE, _PROT_READ_WRITE, _PRIVATE_ANONYMOUS, -1, 0)
        results = stub.run(batch)
        fd, address = results[remote_fd], results[scratch]
        stub.mem.write(address, encode(mm, address + PAGE_SIZE, fd))
        stub.mem.write(address + PAGE_SIZE, mm.auxv[:PAGE_SIZE])
        batch = stub.batch()
        batch.call("prctl", _PR_SET_MM, _PR_SET_MM_MAP, address, _MM_MAP.size, 0)
        batch.call("munmap", address, 2 * PAGE_SIZE)
        batch.call("close", fd)
        stub.run(batch)
    except OSError as error:
        raise _explain(error, stub.pid) from error
    finally:
        identity.safe_close(local_fd)


def _explain(error: OSError, pid: int) -> SnapshotterError:
    hint = ""
    if error.errno == errno.EBUSY:
        hint = "a mapping of the stub's own file is left"
    elif error.errno == errno.EPERM:
        hint = "it takes CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN, and CONFIG_CHECKPOINT_RESTORE in the kernel"
    return wrap_os_error(
        error, "cannot set brk, auxv and executable (PR_SET_MM_MAP)", where=f"process {pid}", hint=hint
    )
