"""The same program of system calls with and without takes has the same results (tests/differential.py)."""

from __future__ import annotations

import pathlib
import subprocess
import sys

import pytest

from tests.jobs import ROOT, SnapFailedError, snap, wait_until

pytestmark = pytest.mark.requires("root")

STEPS = 20_000


def compare(seed: int, steps: int, folder: pathlib.Path) -> int:
    """Run it both ways. Returns how many points were taken."""
    plain, taken = folder / "plain", folder / "taken"
    command = [sys.executable, "-m", "tests.differential", str(seed), str(steps)]
    subprocess.run([*command, plain], cwd=ROOT, check=True, stdin=subprocess.DEVNULL)
    job = subprocess.Popen(
        [*command, taken],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    nr_points = 0
    try:
        wait_until(lambda: taken.exists() and taken.stat().st_size, "the program runs")
        while job.poll() is None:
            try:
                snap("take", job.pid, "--job", "test", store=folder / "store")
                nr_points += 1
            except SnapFailedError:
                if job.poll() is None and nr_points == 0:
                    raise  # at its end it may be gone or a zombie
    finally:
        job.kill()
        job.wait()
    for number, (one, other) in enumerate(
        zip(plain.read_text().splitlines(), taken.read_text().splitlines(), strict=True)
    ):
        assert one == other, f"seed {seed}, step {number}"
    return nr_points


@pytest.mark.parametrize("seed", [1, 2])
def test_every_result_is_the_same_with_takes_in_between(tmp_path, seed):
    nr_points = compare(seed, STEPS, tmp_path)
    print(f"{STEPS} steps, {nr_points} points: no difference")
    assert nr_points
