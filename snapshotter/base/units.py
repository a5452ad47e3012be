"""Numbers as people read them: IEC sizes, durations, counts. Pure; nothing here prints.

The command line uses these on a terminal; `--json` always carries plain bytes and microseconds.
"""

from __future__ import annotations

_SIZES = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def format_bytes(size_bytes: int) -> str:
    """1536 -> "1.5 KiB"; whole bytes below 1 KiB; three significant digits at most."""
    value = float(size_bytes)
    for unit in _SIZES:
        if abs(value) < 1023.5 or unit == _SIZES[-1]:
            if unit == "B":
                return f"{int(value)} B"
            return f"{value:.1f} {unit}" if abs(value) < 99.95 else f"{value:.0f} {unit}"
        value /= 1024
    raise AssertionError("unreachable")


def format_us(duration_us: int) -> str:
    """850 -> "850 us", 12345 -> "12.3 ms", 2500000 -> "2.50 s"."""
    if duration_us < 1000:
        return f"{duration_us} us"
    if duration_us < 1_000_000:
        return f"{duration_us / 1000:.1f} ms"
    return f"{duration_us / 1_000_000:.2f} s"


def plural(count: int, noun: str, many: str = "") -> str:
    """(1, "task") -> "1 task"; (3, "task") -> "3 tasks"."""
    return f"{count} {noun}" if count == 1 else f"{count} {many or noun + 's'}"
