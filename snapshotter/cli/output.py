"""How results and errors look: tables for people, one JSON object with --json, ids only with --quiet.

Results go to stdout; warnings and errors go to stderr, except errors with --json, which are the object on
stdout. Every command describes its result once, as (data, text).

This is the only door to the terminal, and names that a job chose go through it. So `write` and `write_error` print
exactly one line, with every character that is not visible escaped (base/text.py); whoever has several lines passes
them one by one. JSON escapes by its own rules.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from types import TracebackType
from typing import TYPE_CHECKING, Any

from snapshotter.base.errors import RestoreConflictError, SnapshotterError, UnsupportedError
from snapshotter.base.text import visible, whole

if TYPE_CHECKING:
    from store import Point


class ReaderGoneError(SnapshotterError):
    """Whoever read our standard output (head, less) has left: nobody is to be told, and what was to be done is done."""

    exit_status = 141  # 128 + SIGPIPE, as shells have it


class UnprintableError(SnapshotterError):
    """Standard output cannot be written: the error goes to standard error, with --json too."""


@contextlib.contextmanager
def _printing() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError as error:
        # Python must not fail again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise ReaderGoneError("the reader of standard output has left") from error
    except OSError as error:
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # what is still buffered must not fail again
        raise UnprintableError(
            f"the result cannot be printed: {error.strerror}",
            where="standard output",
            hint="what was to be done is done: `snap list` shows the points",
        ) from error


def write(line: str) -> None:
    """One line to stdout; whatever a job put into it stays on it."""
    with _printing():
        sys.stdout.write(_encodable(visible(line), sys.stdout.encoding) + "\n")


def _encodable(text: str, encoding: str | None) -> str:
    """The text with escapes for what the locale's encoding does not have."""
    encoding = encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def flush() -> None:
    """What was written is out."""
    with _printing():
        sys.stdout.flush()


def write_error(line: str) -> None:
    """One line to stderr, like `write`; a closed stderr is no reason to fail."""
    try:
        sys.stderr.write(_encodable(visible(line), sys.stderr.encoding) + "\n")
        sys.stderr.flush()
    except (OSError, ValueError):
        pass


def write_traceback(
    kind: type[BaseException], error: BaseException | None, trace: TracebackType | None
) -> None:
    """A traceback to stderr. Each line is marked, so that no message inside can pass for a line of ours."""
    import traceback  # not on the way of a command that succeeds

    for part in traceback.format_exception(kind, error, trace):
        for line in part.rstrip("\n").split("\n"):
            write_error(f"| {line}")


def guard_tracebacks() -> None:
    """Python prints what escapes from threads and destructors itself; that goes through our door, too."""
    import threading

    sys.excepthook = write_traceback
    sys.unraisablehook = lambda found: write_traceback(found.exc_type, found.exc_value, found.exc_traceback)
    threading.excepthook = lambda found: write_traceback(found.exc_type, found.exc_value, found.exc_traceback)


@dataclass(frozen=True, slots=True)
class Output:
    """Prints in the form that was asked for."""

    as_json: bool = False
    quiet: bool = False

    def result(
        self, data: Mapping[str, Any], text: str | Iterable[str], brief: str | Iterable[str] = ()
    ) -> None:
        """Print `data` as JSON, or else `text` (a line, or lines); with --quiet only `brief`."""
        if self.as_json:
            _write_json(data)
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
        if isinstance(error, RestoreConflictError) and error.obstacles:
            body["obstacles"] = [one.as_dict() for one in error.obstacles]
        _write_json({"error": body})
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
    """Indented on a terminal, else one line. ASCII without control characters, but for the line breaks between members."""
    indent = 2 if sys.stdout.isatty() else None
    # json.dumps escapes everything but DEL, which it may leave as it is.
    return json.dumps(_whole(data), indent=indent).replace("\x7f", "\\u007f")


def _write_json(data: Mapping[str, Any]) -> None:
    for line in to_json(data).split("\n"):
        write(line)


def _whole(value: Any) -> Any:
    """The same data, without lone surrogates in its texts."""
    if isinstance(value, str):
        return whole(value)
    if isinstance(value, Mapping):
        return {whole(str(key)): _whole(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_whole(item) for item in value]
    if value is None or isinstance(value, (bool, int, float)):
        return value
    return whole(_plain(value))


def _plain(value: Any) -> str:
    if isinstance(value, datetime):
        return iso(value)
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
    rows = [[visible(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in [heads, *rows]) for i in range(len(heads))]
    lines = []
    for row in [heads, *rows]:
        cells = [cell.rjust(widths[i]) if i in ends else cell.ljust(widths[i]) for i, cell in enumerate(row)]
        lines.append("  ".join(cells).rstrip())
    return lines
