"""Each piece of the soak for some rounds."""

from __future__ import annotations

import os

import pytest

from tests.soak.__main__ import PIECES
from tests.soak.frame import Run, rounds

pytestmark = pytest.mark.requires("root", "wp_async", "rseq_configuration")

ROUNDS = {"stress": 22, "kills": 25, "chaos": 20}
"""The differential piece has tests of its own, with seeds that stay."""


@pytest.mark.parametrize(
    "piece", [piece for piece in PIECES if piece.name in ROUNDS], ids=lambda piece: piece.name
)
def test_some_rounds(piece, tmp_path, monkeypatch):
    """SNAP_TEST_SOAK_ROUNDS sets the number of rounds."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    number = int(os.environ.get("SNAP_TEST_SOAK_ROUNDS", str(ROUNDS.get(piece.name, 20))))
    run = Run(tmp_path, rounds(number))
    try:
        piece.run(run)
    finally:
        print(f"{piece.name}, seed {run.seed}: {dict(run.counts)}")
    assert run.counts
