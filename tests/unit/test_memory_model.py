"""VMAs and page plans: golden bytes of /proc, and interval arithmetic against plain sets."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoint.model import pageplan
from checkpoint.model import vma as model
from checkpoint.resources.memory import filling
from images import mm_pb2

SMAPS = b"""\
55e0ae84e000-55e0ae850000 r--p 00002000 fe:00 260131                     /usr/bin/with\\012newline (deleted)
Size:                  8 kB
Rss:                   8 kB
THPeligible:           0
VmFlags: rd mr mw me dc
7f0000000000-7f0000001000 rw-s 00001000 00:01 77                         /memfd:ring x (deleted)
ProtectionKey:         3
VmFlags: rd wr sh mr mw me ms
7f0000001000-7f0000002000 ---p 00000000 00:00 0
VmFlags: mr mw me nr sd
7ffcff263000-7ffcff284000 rw-p 00000000 00:00 0                          [stack]
VmFlags: rd wr mr mw me gd ac
ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]
VmFlags: ex
"""


def test_smaps():
    text, memfd, none, stack, vsyscall = model.parse_smaps(SMAPS)
    assert (text.start, text.end, text.prot, text.offset) == (0x55E0AE84E000, 0x55E0AE850000, 1, 0x2000)
    assert text.plain_path == b"/usr/bin/with\nnewline"
    assert text.is_deleted
    assert text.flags == {"rd", "mr", "mw", "me", "dc"}
    assert (memfd.shared, memfd.pkey, memfd.ino, memfd.dev) == (True, 3, 77, 1)
    assert memfd.path == b"/memfd:ring x (deleted)"
    assert none.prot == 0
    assert model.map_flags(none, anonymous=True) == 0x2 | 0x20 | 0x4000
    assert model.map_flags(stack, anonymous=True) & model.MAP_GROWSDOWN
    assert model.kernel_kind(vsyscall) == model.VSYSCALL


def test_maps_has_no_flags():
    line = b"7f0000000000-7f0000001000 rw-p 00000000 00:00 0                          [anon:my heap]\n"
    (found,) = model.parse_smaps(line)
    assert not found.flags
    assert model.anon_name(found.path) == b"my heap"
    assert model.parse_smaps(b"") == []


@given(st.binary(max_size=400))
def test_smaps_of_anything(data):
    try:
        model.parse_smaps(data)
    except model.MapsError:
        pass


@pytest.mark.parametrize(
    ("path", "flags", "what"),
    [
        (b"/SYSV00000000 (deleted)", "rd wr sh", "System V"),
        (b"/[aio] (deleted)", "rd wr sh", "asynchronous"),
        (b"/secretmem (deleted)", "rd wr sh", "secret"),
        (b"/anon_hugepage (deleted)", "rd wr ht", "huge pages"),
        (b"/dev/mem", "rd wr io pf", "device"),
        (b"[uprobes]", "ex", "uprobe"),
        (b"", "rd wr ss", "shadow stack"),
        (b"", "rd wr um", "userfaultfd"),
    ],
)
def test_refused_by_name(path, flags, what):
    mapping = model.Mapping(0x1000, 0x2000, 3, True, 0, 0, 0, path, frozenset(flags.split()))
    found = model.refusal(mapping)
    assert found is not None
    assert what in found[0]
    assert found[1]


@pytest.mark.parametrize(
    "path", [b"", b"[heap]", b"[stack]", b"[anon:x]", b"[vdso]", b"[vvar]", b"/lib/x.so"]
)
def test_not_refused(path):
    assert (
        model.refusal(
            model.Mapping(
                0x1000,
                0x2000,
                3,
                False,
                0,
                0,
                0,
                path,
                frozenset(["rd", "dd", "pf"] if path.startswith(b"[v") else ["rd"]),
            )
        )
        is None
    )


pages = st.sets(st.integers(0, 60))


def runs_of(numbers) -> pageplan.Runs:
    return pageplan.from_list([(n, 1) for n in numbers])


def set_of(runs) -> set[int]:
    return {page for first, end in runs.tolist() for page in range(first, end)}


def is_normal(runs) -> bool:
    flat = runs.ravel()
    return bool(np.all(flat[1:] > flat[:-1]))


@given(st.integers(0, 2**32), st.sets(st.integers(0, 600), max_size=6), st.integers(0, 40))
def test_few_rows_against_many(seed, edges, length):
    """Where one table is short, another way is gone."""
    chance = random.Random(seed)
    many = {page for page in range(600) if chance.random() < 0.5}
    few = {page for edge in edges for page in range(edge, edge + length)}
    a, b = runs_of(many), runs_of(few)
    for result in (pageplan.intersect(a, b), pageplan.intersect(b, a)):
        assert set_of(result) == many & few
        assert is_normal(result)
    assert set_of(pageplan.subtract(a, a.copy())) == set()
    assert set_of(pageplan.union(a, pageplan.EMPTY)) == many


@given(pages, pages)
def test_arithmetic(one, two):
    a, b = runs_of(one), runs_of(two)
    for result, wanted in (
        (pageplan.union(a, b), one | two),
        (pageplan.intersect(a, b), one & two),
        (pageplan.subtract(a, b), one - two),
    ):
        assert set_of(result) == wanted
        assert is_normal(result)
    assert pageplan.count(a) == len(one)


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 9)), max_size=12))
def test_from_list_takes_any_order_and_overlap(runs):
    table = pageplan.from_list(runs)
    assert set_of(table) == {page for first, nr in runs for page in range(first, first + nr)}
    assert is_normal(table)
    assert pageplan.from_list(pageplan.to_list(table)).tolist() == table.tolist()


KINDS = [model.ANON_PRIVATE, model.FILE_PRIVATE, model.FILE_SHARED, model.VDSO]


@st.composite
def spaces(draw):
    """Sorted, disjoint VMAs on pages 0..60."""
    edges = sorted(draw(st.sets(st.integers(0, 60), max_size=12)))
    vmas = []
    for start, end in zip(edges[::2], edges[1::2], strict=False):
        kind = draw(st.sampled_from(KINDS))
        vmas.append(
            mm_pb2.Vma(
                start=start * 4096, end=end * 4096, kind=kind,
                shared_ino=draw(st.integers(1, 2)) if kind == model.FILE_PRIVATE else 0,
                offset=draw(st.integers(0, 1)) * 4096 if kind == model.FILE_PRIVATE else 0,
            )
        )  # fmt: skip
    return vmas


def identity_of(vmas, page):
    """What a page is, independently of the code under test; None outside private VMAs."""
    for vma in vmas:
        if vma.start <= page * 4096 < vma.end:
            if vma.kind == model.ANON_PRIVATE:
                return "anonymous"
            if vma.kind == model.FILE_PRIVATE:
                return vma.shared_ino, vma.offset + page * 4096 - vma.start
    return None


@given(spaces(), spaces(), pages, pages)
def test_plan_reads_whatever_is_doubtful(now, before, present, written):
    plan = pageplan.plan(now, runs_of(present), runs_of(written), before)
    here = {page for page in present if identity_of(now, page) is not None}
    assert set_of(plan.present) == here
    clean = {
        page for page in here if page not in written and identity_of(now, page) == identity_of(before, page)
    }
    assert set_of(plan.to_read) == here - clean


@given(spaces(), pages)
def test_plan_without_tracker_or_parent_reads_all(now, present):
    for plan in (
        pageplan.plan(now, runs_of(present), None, now),
        pageplan.plan(now, runs_of(present), runs_of([])),
    ):
        assert set_of(plan.to_read) == set_of(plan.present)


def test_holes():
    vmas = [[(0x2000, 0x3000)], [(0x2800, 0x4000), (0x6000, 0x7000)]]
    assert list(model.holes(vmas, 0x1000, 0x9000)) == [(0x1000, 0x2000), (0x4000, 0x6000), (0x7000, 0x9000)]


@pytest.mark.parametrize(
    ("runs", "bloats"), [([(512, 512)], False), ([(512, 100), (1100, 5)], True), ([], False)]
)
def test_sparse_memory_is_not_filled_with_huge_pages(monkeypatch, runs, bloats):
    monkeypatch.setattr(filling, "_huge_pages_for_everybody", lambda: True)
    mm = mm_pb2.Mm(vmas=[mm_pb2.Vma(start=0x200000, end=0x600000, kind=model.ANON_PRIVATE)])
    assert filling.huge_pages_would_bloat(mm, pageplan.from_list(runs)) is bloats
    mm.vmas[0].madvise.append("hg")
    assert not filling.huge_pages_would_bloat(mm, pageplan.from_list(runs))


@given(
    st.lists(st.tuples(st.integers(1, 50), st.integers(1, 20)), max_size=8),
    st.integers(0, 200),
)
def test_the_first_pages(gaps, nr_pages):
    rows, at = [], 0
    for gap, size in gaps:
        rows.append((at + gap, at + gap + size))
        at += gap + size
    table = np.asarray(rows, dtype=np.int64).reshape(-1, 2)
    every = [page for start, end in rows for page in range(start, end)]
    found = [
        page for start, end in pageplan.first_pages(table, nr_pages).tolist() for page in range(start, end)
    ]
    assert found == every[:nr_pages]
