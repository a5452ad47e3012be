"""How long a job is watched before its pages are read: pages that it rewrites all the time are not stored in vain."""

import pytest

from checkpoint.precopy import Watch

STEP_S = 0.02


def simulate(nr_pages, rewritten):
    """(seconds watched, pages that are read, those of them rewritten while they are read): `rewritten(t)` pages by then."""
    watch, now_s, hot = Watch(nr_pages, STEP_S), 0.0, 0
    while (pause_s := watch.next_s) > 0:
        now_s += pause_s
        fresh = min(rewritten(now_s), nr_pages) - hot
        hot += fresh
        watch.looked(pause_s, fresh, nr_pages - hot)
    read = 0 if watch.hopeless else nr_pages - hot
    end_s = now_s + read * 16e-6
    return now_s, read, min(min(rewritten(end_s), nr_pages) - hot, read)


@pytest.mark.parametrize("nr_pages", [1000, 20000, 81920, 400000])
def test_an_idle_job_is_hardly_kept_waiting(nr_pages):
    seconds, read, wasted = simulate(nr_pages, lambda _t: 0)
    assert seconds <= 0.061
    assert (read, wasted) == (nr_pages, 0)


@pytest.mark.parametrize("nr_pages", [20000, 81920])
@pytest.mark.parametrize("cycle_s", [0.05, 0.1, 0.3, 0.7, 1.0, 1.5, 10, 60])
def test_a_job_that_rewrites_all_of_its_memory(nr_pages, cycle_s):
    wasted = simulate(nr_pages, lambda t: int(nr_pages * t / cycle_s))[2]
    # One that takes longer for it than we for reading is stored while it runs: better some waste than a long pause.
    bound = 0.1 if cycle_s <= nr_pages * 16e-6 else 0.25
    assert wasted <= nr_pages * bound


@pytest.mark.parametrize("burst_s", [0.03, 0.05])
def test_bursts(burst_s):
    nr_pages = 81920
    wasted = simulate(nr_pages, lambda t: int(t / burst_s) * int(nr_pages * burst_s))[2]
    assert wasted <= nr_pages * 0.1


def test_a_small_hot_set_does_not_keep_the_rest_from_being_read():
    seconds, read, wasted = simulate(81920, lambda t: 2000 if t > 0 else 0)
    assert read == 79920
    assert not wasted
    assert seconds < 0.6


@pytest.mark.parametrize("cycle_s", [0.4, 0.5, 0.6])
def test_what_would_be_stored_for_nothing_is_left_to_the_frozen_window(cycle_s):
    assert simulate(20000, lambda t: int(20000 * t / cycle_s))[1] == 0
