"""Temporary files whose loss would make a point useless: ghc's in a directory of its own in /tmp, rsync's `.name.Xy12Zw` that it renames.

A point keeps the content of a small file directly in /tmp or its like (memory/named.py). Of another temporary file it has only the path; once
that is removed or renamed, as is its fate, the rollback is a conflict. So the point says it, and `snap check` does. Only what the job itself
has made and is writing counts, not a log that it appends to, nor its standard streams: a warning at every take would not be read.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Collection
from typing import TYPE_CHECKING

from checkpoint.kernel import proc
from checkpoint.resources import paths, proof
from checkpoint.resources.files import kind
from checkpoint.resources.files.kind import Seen
from checkpoint.resources.memory import named
from snapshotter.base.errors import SnapshotterError

if TYPE_CHECKING:
    from checkpoint.context import DumpContext

_LAST_STREAM = 2
_NAME = re.compile(
    rb"\..+\.[A-Za-z0-9]{6}"  # rsync, and others with mkstemp
    rb"|tmp[A-Za-z0-9_]{6,8}"  # Python's tempfile
    rb"|.+(\.tmp|\.temp|\.part|\.partial|\.crdownload|\.swp|~)(\.[0-9]+)?"
    rb"|\.#.+|#.+#"
)


def has_temporary_name(path: bytes) -> bool:
    """Whether programs give such a name to what they rename or remove when they are done."""
    return _NAME.fullmatch(os.path.basename(path)) is not None


def _below_a_temporary_directory(path: bytes) -> bool:
    folder = os.path.dirname(path)
    while True:
        try:
            mode = os.stat(folder).st_mode
        except OSError:
            return False
        if mode & stat.S_ISVTX and mode & stat.S_IWOTH:
            return True
        if folder in {b"/", b""}:
            return False
        folder = os.path.dirname(folder)


def warning(seen: Seen, path: bytes, birth_ns: int, began_ns: int) -> str:
    """What is to be said of a regular file with a name, whose content the point does not have; "" mostly.

    Args:
        seen: a descriptor of it.
        path: leads to it.
        birth_ns: when it was made (statx); 0: the file system does not know, and nothing is said.
        began_ns: when the job was started.
    """
    if (
        seen.fd <= _LAST_STREAM
        or seen.info.flags & os.O_ACCMODE == os.O_RDONLY
        or seen.info.flags & os.O_APPEND
    ):
        return ""
    if not birth_ns or birth_ns < began_ns:
        return ""
    if not has_temporary_name(path) and not _below_a_temporary_directory(path):
        return ""
    return (
        f"task {seen.pid}, descriptor {seen.fd}: {paths.shown(path)} is a temporary file whose content is not part of the point: "
        "once it is removed or renamed, the point cannot be brought back"
    )


def warn(ctx: DumpContext, seen: Seen, path: bytes, birth_ns: int, began_ns: int) -> None:
    """Add that warning, if there is one, to those of a point."""
    if text := warning(seen, path, birth_ns, began_ns):
        ctx.warn(text)


def of_job(pids: Collection[int], root_pid: int) -> list[str]:
    """The same for running processes, before a take."""
    found: dict[str, None] = {}
    try:
        began_ns = kind.started_ns(proc.read_stat(root_pid).start_time_ticks)
    except (OSError, SnapshotterError):
        return []
    for pid in pids:
        try:
            for fd in kind.descriptors(pid):
                seen = kind.see(pid, fd)
                if (
                    seen is None
                    or not stat.S_ISREG(seen.stat.st_mode)
                    or not seen.stat.st_nlink
                    or seen.path_only
                ):
                    continue
                if named.is_temporary(seen.link, seen.stat) or not paths.leads_to(
                    seen.link, seen.stat.st_dev, seen.stat.st_ino
                ):
                    continue
                birth_ns = proof.traits(f"/proc/{pid}/fd/{fd}", seen.stat).birth_ns
                if text := warning(seen, seen.link, birth_ns, began_ns):
                    found[text] = None
        except (OSError, SnapshotterError):
            continue  # it ended meanwhile
    return list(found)
