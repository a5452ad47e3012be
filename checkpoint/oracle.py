"""The oracle: compares, while the job stands still, every page that was not read in the frozen window with living memory.

Turned on by SNAP_VERIFY_PAGES=1. Owns what each page looked like when it was read (`Witness`, a sink in front of the real one), and
the comparison. It trusts neither the tracker nor the page plan: a page that differs fails the take by name. The frozen window
then lasts as long as it takes to read and to hash all memory of the job: about a second for each GiB.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from checkpoint.kernel.mem import ProcMem
from checkpoint.model import pageplan
from checkpoint.model.pageplan import Runs
from checkpoint.model.vma import Mapping
from snapshotter.base.errors import SnapshotterError
from snapshotter.base.pages import PAGE_SIZE, PageReader, PageSink, PageSource
from snapshotter.base.runs import PageRuns, as_table, cut

VARIABLE = "SNAP_VERIFY_PAGES"
_DIGEST_BYTES = 16
_PIECE_PAGES = 256
_NAMED = 4

Way = Literal["pre-copied", "inherited"]


class WrongPageError(SnapshotterError):
    """A page of the point differs from the living memory that it was said to be equal to."""

    code = "wrong_page"


def is_wanted() -> bool:
    """Whether the environment asks for the comparison."""
    return os.environ.get(VARIABLE, "") not in {"", "0"}


@dataclass(frozen=True, slots=True)
class Wrong:
    """One page that differs."""

    page: int
    way: Way


class Witness:
    """A PageSink that remembers a digest of each page that goes through it."""

    def __init__(self, sink: PageSink) -> None:
        self.sink = sink
        self._seen: dict[str, dict[int, tuple[int, bytes]]] = {}
        self._nr_puts = 0
        self._guard = threading.Lock()
        self._over = False

    def seen(self, space: str) -> dict[int, bytes]:
        """Page -> digest of what was read of it last; everything put must have been drained."""
        return {page: digest for page, (_, digest) in self._seen.get(space, {}).items()}

    def rest(self) -> None:
        """The comparison is over: what follows need not be noted."""
        self._over = True
        self._seen.clear()

    def note(self, space: str, number: int, runs: PageRuns, buffer: memoryview) -> None:
        """What a reader has just read for the put of that number."""
        found = dict(_digests(runs, buffer))
        with self._guard:
            pages = self._seen.setdefault(space, {})
            for page, digest in found.items():
                if page not in pages or pages[page][0] <= number:  # a later put of the same page wins
                    pages[page] = (number, digest)

    # -- PageSink ------------------------------------------------------------------------------------------

    def expect(self, nr_pages: int) -> None:
        """See PageSink."""
        self.sink.expect(nr_pages)

    def put(self, space: str, runs: PageRuns, reader: PageReader) -> None:
        """See PageSink."""
        if not self._over:
            self._nr_puts += 1
            reader = _Noted(self, space, self._nr_puts, reader)
        self.sink.put(space, runs, reader)

    def drain(self, *, hurry: bool = True, leave: int = 0) -> None:
        """See PageSink."""
        self.sink.drain(hurry=hurry, leave=leave)

    def pause(self) -> None:
        """See PageSink."""
        self.sink.pause()

    def resume(self) -> None:
        """See PageSink."""
        self.sink.resume()

    def close_space(self, space: str, present: PageRuns) -> None:
        """See PageSink."""
        self.sink.close_space(space, present)


@dataclass(frozen=True, slots=True)
class _Noted:
    """A PageReader whose pages are noted as they are read."""

    witness: Witness
    space: str
    number: int
    reader: PageReader

    def read_into(self, runs: PageRuns, buffer: memoryview) -> None:
        """PageReader."""
        self.reader.read_into(runs, buffer)
        self.witness.note(self.space, self.number, runs, buffer)


def compare(
    space: str, pages: Runs, mem: ProcMem, seen: dict[int, bytes], parent: PageSource | None
) -> list[Wrong]:
    """Those of `pages` whose content in the point is not what the memory holds now.

    Args:
        space: their name in the parent point.
        pages: that were not read in the frozen window.
        mem: of the process, which stands still.
        seen: page -> digest of what was read while the job ran; the others are the parent point's.
        parent: the parent point; None: it cannot be read, and its pages count as wrong.
    """
    wrong: list[Wrong] = []
    inherited: dict[int, bytes] = {}
    for piece in cut(pageplan.to_table(pages), _PIECE_PAGES):
        buffer = bytearray(int(piece[:, 1].sum()) * PAGE_SIZE)
        unread = set(mem.read_runs(piece, buffer))
        for page, digest in _digests(piece, memoryview(buffer)):
            if page in seen:
                if page in unread or seen[page] != digest:
                    wrong.append(Wrong(page, "pre-copied"))
            else:
                inherited[page] = b"" if page in unread else digest
    wrong += [Wrong(page, "inherited") for page in _unlike_parent(space, inherited, parent)]
    return sorted(wrong, key=lambda one: one.page)


def _unlike_parent(space: str, living: dict[int, bytes], parent: PageSource | None) -> list[int]:
    """Those of page -> digest whose digest is another one in the parent point."""
    if not living or parent is None:
        return list(living)
    guard = threading.Lock()
    stored: dict[int, bytes] = {}

    def got(runs: PageRuns, buffer: memoryview) -> None:
        found = dict(_digests(runs, buffer))
        with guard:
            stored.update(found)

    table = pageplan.to_table(pageplan.from_list([(page, 1) for page in sorted(living)]))
    parent.fill(space, got, only=table)
    # What a source does not hand out is zero.
    return [page for page, digest in living.items() if stored.get(page, _ZERO) != digest]


def read_digests(runs: PageRuns, reader: PageReader) -> Iterator[tuple[int, bytes]]:
    """Page -> digest of what a reader gives."""
    for piece in cut(as_table(runs), _PIECE_PAGES):
        buffer = memoryview(bytearray(int(piece[:, 1].sum()) * PAGE_SIZE))
        reader.read_into(piece, buffer)
        yield from _digests(piece, buffer)


def _digests(runs: PageRuns, buffer: memoryview) -> Iterator[tuple[int, bytes]]:
    at = 0
    for first, nr_pages in as_table(runs).tolist():
        for page in range(first, first + nr_pages):
            yield page, _digest(buffer[at : at + PAGE_SIZE])
            at += PAGE_SIZE


def _digest(page: bytes | memoryview) -> bytes:
    return hashlib.blake2b(page, digest_size=_DIGEST_BYTES).digest()


_ZERO = _digest(bytes(PAGE_SIZE))


def error(pid: int, wrong: Sequence[Wrong], mappings: Sequence[Mapping]) -> WrongPageError:
    """Names the first pages, where each lies and which way it came."""

    def name(one: Wrong) -> str:
        address = one.page * PAGE_SIZE
        lies = next((each.text for each in mappings if each.start <= address < each.end), "no mapping")
        return f"{address:#x} in {lies}, {one.way}"

    what = "; ".join(name(one) for one in wrong[:_NAMED])
    more = f"; and {len(wrong) - _NAMED} more" if len(wrong) > _NAMED else ""
    return WrongPageError(
        f"{len(wrong)} page{'s' * (len(wrong) != 1)} of the point would differ from its memory: {what}{more}",
        where=f"task {pid}",
        hint="a bug in snap, please report it; nothing was stored, the job runs on, and the next take reads everything",
    )
