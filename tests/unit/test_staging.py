"""Staging copies at once and gives back exactly that; fault points act as told."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoint.staging import Staging
from snapshotter.base import faults
from snapshotter.base.errors import UsageError
from tests.memory_store import MemoryPoint, merge

PAGE = 4096


class Numbers:
    """A reader whose page n is filled with n + generation."""

    def __init__(self) -> None:
        self.generation = 0

    def read_into(self, runs, buffer):
        at = 0
        for first, nr_pages in runs:
            for page in range(first, first + nr_pages):
                buffer[at : at + PAGE] = bytes([(page + self.generation) % 256]) * PAGE
                at += PAGE


@given(st.lists(st.sets(st.integers(0, 60), min_size=1), max_size=5), st.integers(0, 40))
def test_what_was_put_is_what_is_flushed(puts, limit_pages):
    """Whatever the reader says later; staged or too much to stage."""
    sink, reader = MemoryPoint(), Numbers()
    staging = Staging(sink, 8 * PAGE, limit_pages * PAGE)
    for pages in puts:
        staging.put("mm/1", merge(pages), reader)
    staging.drain()
    staging.close_space("mm/1", merge(set().union(*puts)) if puts else [])
    reader.generation = 99
    staging.flush()
    assert staging.nr_pages == sum(map(len, puts))
    assert sink.spaces["mm/1"] == {page: bytes([page]) * PAGE for pages in puts for page in pages}


def test_fault_points(monkeypatch):
    monkeypatch.setattr(faults, "_selected", None)
    faults.configure("dump.frozen@2:error, dump.copied:error")
    faults.point("dump.frozen")
    with pytest.raises(faults.FaultInjectedError, match=r"dump\.frozen"):
        faults.point("dump.frozen")
    faults.point("dump.frozen")
    with pytest.raises(faults.FaultInjectedError):
        faults.point("dump.copied")
    for text in ("dump.frozen", "no.such:kill", "dump.frozen@x:kill", "dump.frozen:burn"):
        with pytest.raises(UsageError):
            faults.configure(text)
    faults.configure("")
    faults.point("dump.frozen")
