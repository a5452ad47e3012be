"""Text that comes from a job, made safe to print.

File names, command names and process titles are chosen by the job. Printed as they are, an escape sequence rewrites
root's terminal and a line break forges a line of a log. So every character that is not plainly visible is shown as a
backslash and its number, wherever it came from. Backslashes stay as they are: what is shown is for eyes, `--json` is
for programs.
"""

from __future__ import annotations

from collections.abc import Sequence


def visible(text: str) -> str:
    r"""The text as one line of visible characters.

    Escaped are control characters (C0, DEL, C1), line and paragraph separators, what changes the direction of the
    writing or is invisible (Unicode's "format" characters), unassigned and private characters, and bytes that are no
    UTF-8 (which Python keeps as lone surrogates): `\n`, `\x1b`, `\u202e`, `\U000e0001`, `\xff`.
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else _escaped(char) for char in text)


def whole(text: str) -> str:
    r"""The text without lone surrogates, which many readers of JSON refuse: a byte that is no UTF-8 becomes `\xff`."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return "".join(_escaped(char) if "\ud800" <= char <= "\udfff" else char for char in text)
    return text


MOST_WARNINGS = 50
"""Of one point, check or rollback. A job with thousands of files would fill the store and the terminal."""


def bounded(warnings: Sequence[str]) -> list[str]:
    """The first of many warnings, and how many more there are."""
    left_out = len(warnings) - MOST_WARNINGS
    if left_out <= 0:
        return list(warnings)
    return [*warnings[:MOST_WARNINGS], f"{left_out} more warnings like these are left out"]


def _escaped(char: str) -> str:
    number = ord(char)
    if 0xDC80 <= number <= 0xDCFF:  # os.fsdecode: a byte that is no UTF-8
        return f"\\x{number - 0xDC00:02x}"
    return char.encode("unicode_escape").decode()
