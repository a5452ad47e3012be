"""Opening something with fewer capabilities than snap has: what is opened remembers those of who opened it.

The kernel asks a file's opener, not its reader, whether to show addresses of its own (/proc/kallsyms) or numbers of page frames
(/proc/PID/pagemap): file_ns_capable() and kallsyms_show_value(). Capabilities are a thread's own (capset(2), by the bare system call).
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable
from typing import TypeVar

from checkpoint.kernel import proc
from checkpoint.kernel.sys import syscall

CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, CAP_SYS_PTRACE = 1 << 1, 1 << 2, 1 << 19
_HEADER = struct.pack("<Ii", 0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, the calling thread
_SETS = struct.Struct("<IIIIII")
_Result = TypeVar("_Result")


def with_at_most(capabilities: int, work: Callable[[], _Result]) -> _Result:
    """Do something in a thread whose effective capabilities are those of snap that are in this set. Raises what `work` raises."""
    status = proc.read_status(threading.get_native_id())
    if not status.cap_effective & ~capabilities:
        return work()
    results: list[_Result] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            effective = status.cap_effective & capabilities
            low, high = effective & 0xFFFFFFFF, effective >> 32
            syscall("capset", _HEADER, _SETS.pack(low, low, 0, high, high, 0))
            results.append(work())
        except BaseException as error:  # handed to the caller's thread
            errors.append(error)

    thread = threading.Thread(target=run, name="snap-opening")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]
