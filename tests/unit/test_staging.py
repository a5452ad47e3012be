"""Staging copies at once and gives back exactly that; fault points act as told."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoint import staging as staging_module
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


@given(st.lists(st.sets(st.integers(0, 60), min_size=1), max_size=6), st.integers(0, 80), st.integers(0, 6))
def test_the_last_copy_of_each_page_is_handed_on_once(puts, limit_pages, nr_before):
    """Whatever the reader says later; staged, staged again or too much to stage; before the freeze and in it."""
    sink, reader = MemoryPoint(), Numbers()
    staging = Staging(sink, limit_pages * PAGE)
    staging.prepare(8 * PAGE)
    direct, expected = 0, {}
    for number, pages in enumerate(puts):
        if number == nr_before:
            staging.freezing()
        reader.generation = number
        staging.put("mm/1", merge(pages), reader)
        expected |= {page: bytes([page + number]) * PAGE for page in pages}
    direct = sink.pages_put
    staging.drain()
    staging.close_space("mm/1", merge(expected))
    latest = {
        page for runs, _ in staging.latest("mm/1") for first, nr in runs for page in range(first, first + nr)
    }
    reader.generation = 99
    staging.flush()
    assert staging.nr_put_frozen == sum(map(len, puts[nr_before:] if nr_before < len(puts) else puts))
    assert sink.spaces["mm/1"] == expected
    assert sink.pages_put - direct == len(latest)
    assert staging.nr_handed == sink.pages_put


def test_pieces_that_are_replaced_as_a_whole_give_their_memory_back(monkeypatch):
    """A job that rewrites everything is copied again and again into the same memory, and none of it goes to the sink early."""
    touched = []
    monkeypatch.setattr(
        staging_module, "_touched", lambda size: touched.append(size) or memoryview(bytearray(size))
    )
    sink, reader = MemoryPoint(), Numbers()
    staging = Staging(sink, 8 * 2048 * PAGE)
    staging.prepare(4096 * PAGE)
    for _ in range(5):
        staging.put("mm/1", [(0, 4096)], reader)
    assert touched == [4096 * PAGE]
    assert not sink.pages_put
    staging.close_space("mm/1", [(0, 1000)])
    staging.flush()
    assert sink.pages_put == 1000, "pages that are gone need not be stored"


def test_no_more_than_half_of_the_limit_before_the_freeze():
    sink, reader = MemoryPoint(), Numbers()
    staging = Staging(sink, 20 * PAGE)
    staging.put("mm/1", [(0, 15)], reader)
    assert sink.pages_put == 5
    staging.freezing()
    staging.put("mm/1", [(20, 12)], reader)
    assert sink.pages_put == 7


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
