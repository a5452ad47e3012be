"""The store: points of jobs as deduplicated, compressed, verified pages and images.

Use::

    store = Store.open("/var/lib/snap", create=True)
    with store.lock_job("sim"), store.writer("sim", parent) as writer:  # writer is a PageSink
        ...  # put, drain, close_space
        writer.add_images({"manifest": b"..."})
        point = writer.commit(PointMeta(pid=..., boot_id=..., dump_uptime_ns=..., tracker=...))
    reader = store.reader(store.resolve("latest"))  # reader is a PageSource

Importing this package imports neither SQLAlchemy nor numpy nor Alembic: opening a store loads the first,
reading or writing pages the second, and only a new or an old catalog the third. See FORMAT.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from store.types import (
    Damage,
    FileRecord,
    Point,
    PointMeta,
    PruneReport,
    StoreStats,
    VerifyReport,
    WriterStats,
)

if TYPE_CHECKING:
    from store.reader import PointReader
    from store.repository import Store
    from store.writer import PointWriter

__all__ = [
    "Damage",
    "FileRecord",
    "Point",
    "PointMeta",
    "PointReader",
    "PointWriter",
    "PruneReport",
    "Store",
    "StoreStats",
    "VerifyReport",
    "WriterStats",
]

_LAZY = {"Store": "store.repository", "PointWriter": "store.writer", "PointReader": "store.reader"}


def __getattr__(name: str) -> Any:
    module = _LAZY.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(module), name)
