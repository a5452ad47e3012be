"""python -m tests.kernels SERIES.. [-- COMMAND..]: run COMMAND, or the tests below, inside each kernel.

Software emulation is 10 to 17 times slower than the machine, so the default is a selection: the kernel layer, the trackers and
a few round trips.
"""

from __future__ import annotations

import argparse
import os
import sys

from tests.kernels.guest import GuestError, run

ROUND_TRIPS = "nothing or signals or timers or tree or threads_scheduling or mem_private or fd_pipes"
SELECTION = [
    [sys.executable, "-m", "snapshotter.cli.main", "doctor"],
    [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "tests/kernel"],
    [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "tests/roundtrip/test_programs.py",
     "-k", f"(plain or three) and ({ROUND_TRIPS})"],
]  # fmt: skip


def main() -> int:
    """The number of kernels in which something failed."""
    parser = argparse.ArgumentParser(prog="tests.kernels", description=__doc__)
    parser.add_argument("series", nargs="+", help="6.1, 6.12")
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
    failed = 0
    for series in options.series:
        for line in [command] if command else SELECTION:
            print(f"== {series}: {' '.join(line)}", flush=True)
            try:
                status = run(series, line, environment, options.seconds)
            except GuestError as error:
                print(error, file=sys.stderr)
                status = 125
            print(f"== {series}: exit status {status}", flush=True)
            failed += status != 0
    return min(failed, 100)


if __name__ == "__main__":
    sys.exit(main())
