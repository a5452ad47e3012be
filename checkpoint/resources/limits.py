"""Resource limits: read by the task itself, set from outside by prlimit(2) before the credentials.

Raising a hard limit needs CAP_SYS_RESOURCE. Where snap lacks it, the stub has snap's own hard limit: the smaller of
both is set and a warning says so.
"""

from __future__ import annotations

import resource
import struct
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from images import task_pb2

if TYPE_CHECKING:
    from checkpoint.parasite import Batch, Buffer, Results

_LIMIT = struct.Struct("<QQ")  # struct rlimit64

_INFINITY = (1 << 64) - 1
_NAMES = {getattr(resource, name): name for name in dir(resource) if name.startswith("RLIMIT_")}
NR_LIMITS = 16


def ask(batch: Batch) -> list[Buffer]:
    """Add the sixteen calls; asked from inside, since another user's limits need CAP_SYS_RESOURCE."""
    buffers = []
    for number in range(NR_LIMITS):
        buffer = batch.buffer(_LIMIT.size)
        batch.call("prlimit64", 0, number, 0, buffer)
        buffers.append(buffer)
    return buffers


def answer(results: Results, buffers: Sequence[Buffer]) -> list[task_pb2.Rlimit]:
    """All sixteen."""
    limits = []
    for number, buffer in enumerate(buffers):
        soft, hard = _LIMIT.unpack(results.bytes(buffer)[: _LIMIT.size])
        limits.append(task_pb2.Rlimit(resource=number, soft=soft, hard=hard))
    return limits


def restore(pid: int, limits: Iterable[task_pb2.Rlimit]) -> list[str]:
    """Set them on a stub that is still root; returns warnings."""
    warnings = []
    for limit in limits:
        wanted = (_signed(limit.soft), _signed(limit.hard))
        current = resource.prlimit(pid, limit.resource)
        if wanted == current:
            continue
        try:
            resource.prlimit(pid, limit.resource, wanted)
        except (PermissionError, ValueError):
            hard = min(limit.hard, current[1] & _INFINITY)
            resource.prlimit(pid, limit.resource, (_signed(min(limit.soft, hard)), _signed(hard)))
            name = _NAMES.get(limit.resource, str(limit.resource))
            warnings.append(
                f"task {pid}: hard limit {name} is {_text(hard)} instead of {_text(limit.hard)}: "
                "raising it needs CAP_SYS_RESOURCE"
            )
    return warnings


def _signed(value: int) -> int:
    return -1 if value == _INFINITY else value


def _text(value: int) -> str:
    return "unlimited" if value == _INFINITY else str(value)
