"""How results and errors look: tables for people, one JSON object with --json, ids only with --quiet.

Results go to stdout; warnings and errors go to stderr, except errors with --json, which are the object on
stdout. Every command describes its result once, as (data, text).
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from snapshotter.base.errors import SnapshotterError, UnsupportedError, wrap_os_error

if TYPE_CHECKING:
    from store import Point


class ReaderGoneError(SnapshotterError):
    """Whoever read our standard output (head, less) has left: nobody is to be told, and what was to be done is done."""

    exit_status = 141  # 128 + SIGPIPE, as shells have it


@contextlib.contextmanager
def _printing() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError as error:
        # Python must not fail again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise ReaderGoneError("the reader of standard output has left") from error
    except OSError as error:
        raise wrap_os_error(
            error,
            "the result cannot be printed",
            where="standard output",
            hint="what was to be done is done: `snap list` shows the points",
        ) from error


def write(text: str) -> None:
    """To stdout, whatever bytes a file name holds."""
    with _printing():
        sys.stdout.write(text.encode("utf-8", "backslashreplace").decode("utf-8") + "\n")


def flush() -> None:
    """What was written is out."""
    with _printing():
        sys.stdout.flush()


def write_error(text: str) -> None:
    """To stderr; a closed stderr is no reason to fail."""
    try:
        sys.stderr.write(text.encode("utf-8", "backslashreplace").decode("utf-8") + "\n")
        sys.stderr.flush()
    except (OSError, ValueError):
        pass


@dataclass(frozen=True, slots=True)
class Output:
    """Prints in the form that was asked for."""

    as_json: bool = False
    quiet: bool = False

    def result(
        self, data: Mapping[str, Any], text: str | Iterable[str], brief: str | Iterable[str] = ()
    ) -> None:
        """Print `data` as JSON, or else `text` (lines); with --quiet only `brief`."""
        if self.as_json:
            write(to_json(data))
            return
        chosen = brief if self.quiet else text
        for line in [chosen] if isinstance(chosen, str) else chosen:
            write(line)

    def warnings(self, texts: Iterable[str]) -> None:
        """Warnings of a result: part of the JSON already, else lines on stderr."""
        if not self.as_json:
            for text in texts:
                write_error(f"snap: warning: {text}")

    def note(self, text: str) -> None:
        """Something that must be said even with --quiet, on stderr; the JSON says it itself."""
        if not self.as_json:
            write_error(f"snap: {text}")


def show_error(error: SnapshotterError, *, as_json: bool) -> None:
    """The one way an error is printed."""
    where_what = f"{error.where}: {error.what}" if error.where else error.what
    if as_json:
        body: dict[str, Any] = {"code": error.code, "message": where_what, "hint": error.hint}
        if isinstance(error, UnsupportedError) and error.findings:
            body["findings"] = [finding.as_dict() for finding in error.findings]
        write(to_json({"error": body}))
        return
    if isinstance(error, UnsupportedError) and len(error.findings) > 1:
        write_error(f"snap: {len(error.findings)} things stand in the way of a point:")
        for finding in error.findings:
            write_error(f"  {finding}")  # each with a hint of its own
        return
    write_error(f"snap: {where_what}")
    if error.hint:
        write_error(f"hint: {error.hint}")


def to_json(data: Mapping[str, Any]) -> str:
    """Indented on a terminal, else one line."""
    indent = 2 if sys.stdout.isatty() else None
    return json.dumps(data, indent=indent, default=_plain)


def _plain(value: Any) -> Any:
    if isinstance(value, datetime):
        return iso(value)
    if isinstance(value, (set, frozenset, tuple)):
        return list(value)
    if isinstance(value, bytes):
        return value.hex()
    return str(value)


def iso(moment: datetime) -> str:
    """ISO 8601 with milliseconds and zone."""
    return moment.isoformat(timespec="milliseconds")


def local(moment: datetime) -> str:
    """For people: this machine's clock, without a zone."""
    return f"{moment.astimezone():%Y-%m-%d %H:%M:%S}"


def point_json(point: Point) -> dict[str, Any]:
    """A point as `take`, `list` and `show` give it; sizes in bytes, times in microseconds."""
    return {
        "id": point.id,
        "parent": point.parent,
        "job": point.job,
        "pid": point.pid,
        "taken_at": iso(point.taken_at),
        "dump_uptime": point.dump_uptime_ns / 1e9,
        "boot_id": point.boot_id,
        "tracker": point.tracker,
        "nr_tasks": point.nr_tasks,
        "frozen_us": point.frozen_us,
        "duration_us": point.duration_us,
        "pages_dirty": point.pages_dirty,
        "pages_new": point.pages_new,
        "pages_total": point.pages_total,
        "bytes_logical": point.bytes_logical,
        "bytes_stored": point.bytes_stored,
        "warnings": list(point.warnings),
    }


def short(point_id: str | None) -> str:
    """The first 8 digits of an id; "-" for none."""
    return point_id[:8] if point_id else "-"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], right: Iterable[int] = ()) -> list[str]:
    """Columns as wide as they need to be; those in `right` are aligned right."""
    ends = frozenset(right)
    widths = [max(len(row[i]) for row in [heads, *rows]) for i in range(len(heads))]
    lines = []
    for row in [heads, *rows]:
        cells = [cell.rjust(widths[i]) if i in ends else cell.ljust(widths[i]) for i, cell in enumerate(row)]
        lines.append("  ".join(cells).rstrip())
    return lines
