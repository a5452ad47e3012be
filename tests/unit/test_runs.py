"""Tables of page runs (snapshotter.base.runs) against lists of page numbers."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from snapshotter.base.runs import as_table, cut

RUNS = st.lists(st.tuples(st.integers(0, 1 << 40), st.integers(1, 20)), max_size=30)


def pages(table):
    return [first + at for first, nr_pages in table.tolist() for at in range(nr_pages)]


@given(RUNS)
def test_a_table_is_the_runs(runs):
    table = as_table(runs)
    assert table.tolist() == [list(run) for run in runs]
    assert as_table(iter(runs)).tolist() == table.tolist()
    assert as_table(table) is table
    columns = np.asfortranarray(table)
    assert as_table(columns).flags.c_contiguous


@given(RUNS, st.integers(1, 40))
def test_cut_keeps_all_pages_in_their_order(runs, size):
    pieces = cut(as_table(runs), size)
    assert [page for piece in pieces for page in pages(piece)] == pages(as_table(runs))
    counts = [len(pages(piece)) for piece in pieces]
    assert all(count == size for count in counts[:-1])
    assert all(0 < count <= size for count in counts)
    assert all((piece[:, 1] > 0).all() and piece.flags.c_contiguous for piece in pieces)
