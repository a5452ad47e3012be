"""Which memory a process can have from the one that forks it, copy-on-write, instead of a copy of its own.

Pure. Only writable anonymous memory counts: the rest is the files' or small. A process that was made by a helper has
what the helper had from its own maker.
"""

from __future__ import annotations

import bisect
from collections.abc import Container, Iterable
from dataclasses import dataclass

from checkpoint.model import tree
from checkpoint.model import vma as model
from images import mm_pb2

_EARLY_ADVICE = frozenset({"hg", "nh"})


def is_inheritable(vma: mm_pb2.Vma) -> bool:
    """Whether its pages are put in place before its process forks, if that pays."""
    writable = vma.prot & model.READ_WRITE == model.READ_WRITE
    return vma.kind == model.ANON_PRIVATE and writable and "dp" not in vma.madvise


@dataclass(frozen=True, slots=True)
class Piece:
    """A VMA of which [vma.start, end) is inherited."""

    vma: mm_pb2.Vma
    end: int


def kept(mine: Iterable[mm_pb2.Vma], inherited: Iterable[mm_pb2.Vma]) -> list[Piece]:
    """Those of my VMAs whose beginning is there in a copy of memory with the inheritable ones of `inherited`.

    The copy may be longer, and can be made longer at its end; at its beginning it cannot.
    """
    there = sorted((vma for vma in inherited if is_inheritable(vma)), key=lambda vma: vma.start)
    starts = [vma.start for vma in there]
    found = []
    for vma in mine:
        at = bisect.bisect_right(starts, vma.start) - 1
        if is_inheritable(vma) and at >= 0 and vma.start < there[at].end and _kind(vma) == _kind(there[at]):
            found.append(Piece(vma, min(vma.end, there[at].end)))
    return found


def _kind(vma: mm_pb2.Vma) -> tuple[object, ...]:
    return vma.prot, vma.flags, _EARLY_ADVICE.intersection(vma.madvise)


def origins(steps: Iterable[tree.Step], living: Container[int]) -> dict[int, int]:
    """Whose memory each living process is made with: pid -> pid of another living process; the root has none."""
    source: dict[int, int] = {}
    found = {}
    for step in steps:
        if isinstance(step, tree.Fork):
            origin = step.maker if step.maker in living else source.get(step.maker, 0)
            source[step.pid] = origin
            if origin and step.pid in living:
                found[step.pid] = origin
    return found
