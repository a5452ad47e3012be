"""The same program of system calls with and without takes has the same results (tests/differential.py)."""

from __future__ import annotations

import pytest

from tests.differential import BROKEN, compare

pytestmark = pytest.mark.requires("root", "wp_async", "rseq_configuration")


@pytest.mark.parametrize("seed", [1, 3])
def test_every_result_is_the_same(tmp_path, seed):
    nr_points, difference = compare(seed, 6000, tmp_path)
    print(f"{nr_points} points: no difference")
    assert not difference, f"seed {seed}"
    assert nr_points


@pytest.mark.parametrize(
    ("broken", "only", "steps", "replace"),
    [
        ("restart_instead", "wait_in_vain", 2000, False),
        ("may_be_cut", "large", 1500, False),
        ("pages", "touch", 150_000, True),
    ],
)
def test_a_broken_rule_is_found(tmp_path, broken, only, steps, replace):
    """Otherwise the comparison above would prove nothing."""
    assert broken in BROKEN
    for seed in range(1, 4):
        _, difference = compare(seed, steps, tmp_path / str(seed), replace=replace, only=only, broken=broken)
        if difference:
            return
    pytest.fail(f"nothing differs without {broken}")
