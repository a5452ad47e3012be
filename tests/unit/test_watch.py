"""What a job rewrites is told from what may be stored while it runs, within a tenth of a second."""

import pytest

from checkpoint.precopy import Watch

STORING_S_PER_PAGE = 16e-6


def simulate(nr_pages, rewritten):
    """(seconds watched, pages that are stored, those of them rewritten while they are stored): `rewritten(t)` pages by then."""
    watch, now_s, hot = Watch(nr_pages), 0.0, 0
    while (pause_s := watch.next_s) > 0:
        now_s += pause_s
        hot = min(rewritten(now_s), nr_pages)
        watch.looked(pause_s, nr_pages - hot)
    stored = 0 if watch.stores_in_vain else nr_pages - hot
    end_s = now_s + stored * STORING_S_PER_PAGE
    return now_s, stored, min(min(rewritten(end_s), nr_pages) - hot, stored)


@pytest.mark.parametrize("nr_pages", [1000, 20000, 81920, 400000])
def test_an_idle_job_is_stored_while_it_runs(nr_pages):
    seconds, stored, wasted = simulate(nr_pages, lambda _t: 0)
    assert seconds <= 0.081
    assert (stored, wasted) == (nr_pages, 0)


@pytest.mark.parametrize("nr_pages", [20000, 81920, 400000])
@pytest.mark.parametrize("cycle_s", [0.05, 0.1, 0.3, 0.7, 1.0, 1.5, 2.5, 10, 60, 600])
def test_a_job_that_rewrites_all_of_its_memory(nr_pages, cycle_s):
    wasted = simulate(nr_pages, lambda t: int(nr_pages * t / cycle_s))[2]
    assert wasted <= nr_pages / 20


@pytest.mark.parametrize("burst_s", [0.03, 0.05])
def test_bursts(burst_s):
    nr_pages = 81920
    wasted = simulate(nr_pages, lambda t: int(t / burst_s) * int(nr_pages * burst_s))[2]
    assert wasted <= nr_pages / 20


def test_a_small_hot_set_does_not_keep_the_rest_from_being_stored():
    _, stored, wasted = simulate(81920, lambda t: 2000 if t > 0 else 0)
    assert (stored, wasted) == (79920, 0)
