"""Which memory a fork hands down: the pure part."""

from __future__ import annotations

from checkpoint.model import inherited, tree
from checkpoint.model import vma as model
from images import mm_pb2


def vma(first, end, prot=3, flags=0x22, **fields):
    return mm_pb2.Vma(
        start=first << 12, end=end << 12, kind=model.ANON_PRIVATE, prot=prot, flags=flags, **fields
    )


def pieces(mine, theirs):
    return [(piece.vma.start >> 12, piece.end >> 12) for piece in inherited.kept(mine, theirs)]


def test_the_same_and_what_was_cut_out_of_it():
    theirs = [vma(10, 20), vma(30, 40)]
    assert pieces(theirs, theirs) == [(10, 20), (30, 40)]
    assert pieces([vma(10, 12), vma(13, 20)], theirs) == [(10, 12), (13, 20)]


def test_longer_at_the_end_but_not_at_the_beginning():
    assert pieces([vma(10, 25)], [vma(10, 20)]) == [(10, 20)]
    assert pieces([vma(9, 20)], [vma(10, 20)]) == []
    assert pieces([vma(20, 25)], [vma(10, 20)]) == []


def test_only_what_was_mapped_alike():
    for other in (vma(10, 20, prot=1), vma(10, 20, flags=0x122), vma(10, 20, madvise=["nh"])):
        assert pieces([vma(10, 20)], [other]) == []
        assert pieces([other], [vma(10, 20)]) == []
    file = mm_pb2.Vma(start=10 << 12, end=20 << 12, kind=model.FILE_PRIVATE, prot=3, flags=2)
    assert pieces([file], [file]) == []
    # What is said of it later is no matter.
    assert pieces([vma(10, 20, madvise=["dd"])], [vma(10, 20, anon_name=b"x")]) == [(10, 20)]


def test_whose_memory_a_process_is_made_with():
    steps = [
        tree.SpawnRoot(1),
        tree.Fork(1, 2),
        tree.Fork(2, -1, helper=True),
        tree.Fork(-1, 3),
        tree.Fork(3, 4, sibling=True),
        tree.Fork(1, 9),
        tree.Fork(9, 5),
    ]
    # 9 is a zombie to be: it has its maker's memory.
    assert inherited.origins(steps, {1, 2, 3, 4, 5}) == {2: 1, 3: 2, 4: 3, 5: 1}
