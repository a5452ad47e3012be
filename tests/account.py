"""What every task of a job does just now, for the message of a test that waited for it in vain: a lost signal or wake-up shows here."""

from __future__ import annotations

import collections
import os
import pathlib

from tests.jobs import tree

_LINES = ("State", "TracerPid", "SigPnd", "ShdPnd", "SigBlk", "SigIgn", "SigCgt")
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def account(pid: int) -> str:
    """State, tracer, signals pending and blocked, where it waits and the CPU time, of each task of `pid` and its descendants.

    Tasks that do the same are one line: how many there are, and the first of them.
    """
    alike: collections.defaultdict[str, list[str]] = collections.defaultdict(list)
    for process in tree(pid):
        try:
            tids = os.listdir(f"/proc/{process}/task")
        except OSError:
            alike["gone"].append(f"{process}")
            continue
        for tid in tids:
            what, cpu_s = _one(pathlib.Path(f"/proc/{process}/task/{tid}"))
            alike[what].append(f"{process}/{tid} ({cpu_s:.2f} s of CPU)")
    return "\n".join(f"  {len(who)} as {who[0]}: {what}" for what, who in sorted(alike.items()))


def _one(folder: pathlib.Path) -> tuple[str, float]:
    status = dict(line.split(":\t", 1) for line in _read(folder / "status").splitlines() if ":\t" in line)
    stat = _read(folder / "stat").rpartition(")")[2].split()
    cpu_s = (int(stat[11]) + int(stat[12])) / _TICKS_PER_S if len(stat) > 12 else 0.0
    call = _read(folder / "syscall").split()[:1]
    what = [f"{name} {status.get(name, '?').strip()}" for name in _LINES]
    what += [f"call {' '.join(call) or '?'}", f"at {_read(folder / 'wchan') or '?'}"]
    stack = " < ".join(line.partition("] ")[2] for line in _read(folder / "stack").splitlines()[:6])
    return ", ".join([*what, stack] if stack else what), cpu_s


def _read(path: pathlib.Path) -> str:
    """Empty where it has ended, or nobody may look."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
