"""STORED is what lives: pages put twice count once, and what a forgotten point had stored counts for the next that needs it."""

import os
import random

import pytest

from store import PointMeta, Store
from tests.unit.store_helpers import META, PAGE, Memory, take


def noise(number, nr_pages):
    return random.Random(number).randbytes(nr_pages * PAGE)


@pytest.fixture
def store(tmp_path):
    with Store.open(tmp_path / "store", create=True) as opened:
        yield opened


def in_packs(store):
    return sum(entry.stat().st_size for entry in os.scandir(store.packs_dir))


def test_pages_that_were_put_again_do_not_count(store):
    with store.writer("sim") as writer:
        for version in range(3):
            writer.put("mm/42", [(0, 600)], Memory(noise(version, 600)))
            writer.drain()
        writer.close_space("mm/42", [(0, 600)])
        writer.add_images({"manifest": b"manifest"})
        point = writer.commit(PointMeta(**META))
    assert in_packs(store) > 3 * 600 * PAGE
    assert 0.95 < point.bytes_stored / (600 * PAGE) < 1.1
    store.prune()
    assert in_packs(store) < 1.1 * 600 * PAGE
    assert 0.95 < store.resolve("sim").bytes_stored / in_packs(store) < 1.05


def test_sizes_after_prune(store):
    data = noise(1, 400)
    first = take(store, data)
    second = take(store, data + noise(2, 100), first, runs=[(400, 100)])
    third = take(store, data, second, runs=[])
    assert second.bytes_stored < 150 * PAGE
    assert third.bytes_stored < 10 * PAGE
    store.prune()
    sizes = [point.bytes_stored for point in store.points()]
    assert 0.95 < sizes[0] / (400 * PAGE) < 1.1
    assert 0.95 < sizes[1] / (100 * PAGE) < 1.1
    assert sizes[2] < 2 * PAGE
    assert 0.95 < sum(sizes) / in_packs(store) < 1.05
    store.forget([first, second])
    store.prune()
    (left,) = store.points()
    assert 0.95 < left.bytes_stored / (400 * PAGE) < 1.1
    assert left.bytes_stored < in_packs(store)  # a pack that is mostly alive stays as it is
    store.prune()
    assert store.points() == [left]


def test_dry_run_changes_no_size(store):
    first = take(store, noise(1, 50))
    second = take(store, noise(1, 50), first, runs=[])
    store.forget([first])
    store.prune(dry_run=True)
    assert store.points()[0].bytes_stored == second.bytes_stored
