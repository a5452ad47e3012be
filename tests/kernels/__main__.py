"""python -m tests.kernels SERIES.. [-- COMMAND..]: run COMMAND, or the tests below, inside each kernel.

Software emulation is 10 to 17 times slower than the machine, so the default is a selection: the kernel layer, the trackers and
a few round trips. It runs in pieces, a fresh guest for each, and ends with a summary; `--list` names the pieces.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass

from tests.kernels import packages
from tests.kernels.guest import GuestError, run

ROUND_TRIPS = "nothing or signals or timers or tree or threads_scheduling or mem_private or fd_pipes"
PIECES = {
    "doctor": [],
    "trackers": ["tests/kernel/test_trackers.py"],
    "keeper": ["tests/kernel/test_keeper.py"],
    "freeze": ["tests/kernel/test_freeze.py", "tests/kernel/test_stopped.py", "tests/kernel/test_finisher.py"],
    "memory": ["tests/kernel/test_memory_look.py", "tests/kernel/test_memory_restore.py", "tests/kernel/test_native.py"],
    "parasite": [
        "tests/kernel/test_parasite.py",
        "tests/kernel/test_parasite_frames.py",
        "tests/kernel/test_parasite_lost.py",
    ],
    "files": ["tests/kernel/test_files.py", "tests/kernel/test_pipes.py"],
    "sockets": ["tests/kernel/test_sockets.py", "tests/kernel/test_socket_options.py"],
    "parasite-killed": ["tests/kernel/test_parasite_kill.py"],
    "dump-killed": ["tests/kernel/test_dump_killed.py"],
    "take-killed": ["tests/kernel/test_take_killed.py"],
    "rollback-killed": ["tests/kernel/test_rollback_killed.py"],
    "plain": ["tests/roundtrip/test_programs.py", "-k", f"plain and ({ROUND_TRIPS})"],
    "three": ["tests/roundtrip/test_programs.py", "-k", f"three and ({ROUND_TRIPS})"],
}  # fmt: skip
"""Name -> what pytest is given; each takes some minutes at most."""
DOCTOR = [sys.executable, "-m", "snapshotter.cli.main", "doctor"]
PYTEST = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """One line of the summary."""

    series: str
    piece: str
    status: int
    seconds: float
    said: str

    def __str__(self) -> str:
        verdict = "ok" if self.status == 0 else f"FAILED ({self.status})"
        return f"{self.series:6} {self.piece:16} {verdict:14} {self.seconds:5.0f} s  {self.said}"


def fetch(series: list[str]) -> int:
    """Download kernels, busybox and QEMU; 3 when a mirror or apt is missing."""
    try:
        for one in series:
            packages.kernel(one)
        packages.busybox()
        packages.qemu()
    except (OSError, subprocess.SubprocessError, SystemExit) as error:
        print(f"not to be had here: {error}", file=sys.stderr)
        return 3
    return 0


def command_of(piece: str, chosen: str) -> list[str]:
    """What the guest runs for a piece, narrowed by the user's -k."""
    arguments = list(PIECES[piece])
    if not arguments:
        return DOCTOR
    if chosen and "-k" in arguments:
        arguments[-1] = f"({arguments[-1]}) and ({chosen})"
    elif chosen:
        arguments += ["-k", chosen]
    return [*PYTEST, *arguments]


def attempt(
    series: str, piece: str, command: list[str], environment: dict[str, str], seconds: float
) -> Outcome:
    """Run one command in one guest; status 125 when the guest gave no answer."""
    print(f"== {series}: {' '.join(command)}", flush=True)
    started = time.monotonic()
    try:
        status, output = run(series, command, environment, seconds)
    except GuestError as error:
        print(error, file=sys.stderr)
        return Outcome(series, piece, 125, time.monotonic() - started, "no answer from the guest")
    summary = re.findall(r"^\d+ (?:passed|failed|skipped|deselected|errors?)\b.*$", output, re.MULTILINE)
    if status == 5 and command[: len(PYTEST)] == PYTEST:
        status = 0  # nothing of this piece was chosen
    return Outcome(series, piece, status, time.monotonic() - started, summary[-1] if summary else "")


def main() -> int:
    """How many commands failed; 125 when all that failed got no answer from their guest."""
    parser = argparse.ArgumentParser(prog="tests.kernels", description=__doc__)
    parser.add_argument("series", nargs="+", help="6.1, 6.12, 7")
    parser.add_argument(
        "--fetch", action="store_true", help="only download what is needed; status 3: it cannot be had"
    )
    parser.add_argument("--seconds", type=float, default=1800, help="limit of each command (default 1800)")
    parser.add_argument(
        "-k", dest="chosen", default="", metavar="EXPRESSION", help="only these tests, as pytest's -k"
    )
    parser.add_argument("--piece", action="append", choices=PIECES, help="only this piece; may be repeated")
    parser.add_argument("--list", action="store_true", help="name the pieces")
    arguments = sys.argv[1:]
    command: list[str] = []
    if "--" in arguments:
        at = arguments.index("--")
        arguments, command = arguments[:at], arguments[at + 1 :]
    options = parser.parse_args(arguments)
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": "/root",
        "LANG": "C.UTF-8",
        "PYTHONDONTWRITEBYTECODE": "1",
        "SNAP_TEST_DEADLINE": "300",
    }
    if options.fetch:
        return fetch(options.series)
    if options.list:
        print(
            *(f"{name}: {' '.join(arguments) or 'snap doctor'}" for name, arguments in PIECES.items()),
            sep="\n",
        )
        return 0
    outcomes = []
    for series in options.series:
        if command:
            outcomes.append(attempt(series, "command", command, environment, options.seconds))
            continue
        for piece in options.piece or PIECES:
            if options.chosen and not PIECES[piece]:
                continue
            line = command_of(piece, options.chosen)
            outcomes.append(attempt(series, piece, line, environment, options.seconds))
    print("\n".join(["== summary", *map(str, outcomes)]), flush=True)
    failed = [outcome for outcome in outcomes if outcome.status]
    silent = [outcome for outcome in failed if outcome.status == 125]
    return 125 if failed and len(failed) == len(silent) else min(len(failed), 100)


if __name__ == "__main__":
    sys.exit(main())
