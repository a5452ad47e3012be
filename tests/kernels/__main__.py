"""python -m tests.kernels SERIES.. [-- COMMAND..]: run COMMAND, or the tests below, inside each kernel.

Software emulation is 10 to 17 times slower than the machine, so the default is a selection: the kernel layer, the trackers and
a few round trips.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

from tests.kernels import packages
from tests.kernels.guest import GuestError, run

ROUND_TRIPS = "nothing or signals or timers or tree or threads_scheduling or mem_private or fd_pipes"
SELECTION = [
    [sys.executable, "-m", "snapshotter.cli.main", "doctor"],
    [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "tests/kernel"],
    [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "tests/roundtrip/test_programs.py",
     "-k", f"(plain or three) and ({ROUND_TRIPS})"],
]  # fmt: skip


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


def main() -> int:
    """How many commands failed; 125 when all that failed got no answer from their guest."""
    parser = argparse.ArgumentParser(prog="tests.kernels", description=__doc__)
    parser.add_argument("series", nargs="+", help="6.1, 6.12")
    parser.add_argument(
        "--fetch", action="store_true", help="only download what is needed; status 3: it cannot be had"
    )
    parser.add_argument("--seconds", type=float, default=1800, help="limit of each command (default 1800)")
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
    failed = silent = 0
    for series in options.series:
        for line in [command] if command else SELECTION:
            print(f"== {series}: {' '.join(line)}", flush=True)
            try:
                status = run(series, line, environment, options.seconds)
            except GuestError as error:
                print(error, file=sys.stderr)
                status = 125
                silent += 1
            print(f"== {series}: exit status {status}", flush=True)
            failed += status != 0
    return 125 if failed and failed == silent else min(failed, 100)


if __name__ == "__main__":
    sys.exit(main())
