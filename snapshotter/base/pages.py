"""How pages travel between the engine and the store, neither of which knows the other.

A *space* is a named set of pages: one per address space ("mm/4242") and one per shared memory
object ("shmem/3"), with the same name as the image that describes it. A page number is
vaddr // 4096 in an mm, offset // 4096 in a shmem object. A run is (first page number, nr_pages).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from snapshotter.base.runs import PageRuns

PAGE_SIZE = 4096

Run = tuple[int, int]
"""(first page number, nr_pages), nr_pages > 0. Many of them travel as a table (snapshotter.base.runs)."""


class PageReader(Protocol):
    """Reads pages of one space. Called from any thread of the sink, without the GIL where it matters."""

    def read_into(self, runs: PageRuns, buffer: memoryview) -> None:
        """Fill `buffer` (sum of nr_pages * PAGE_SIZE bytes, writable) with the runs' bytes, in order.

        Pages that cannot be read (unmapped meanwhile) are zeroed; the reader itself remembers which.
        """


class PageSink(Protocol):
    """Where a dump puts pages (the store's point writer)."""

    def expect(self, nr_pages: int) -> None:
        """About so many pages will be put: what that takes may be prepared. Only a hint."""

    def put(self, space: str, runs: PageRuns, reader: PageReader) -> None:
        """Queue pages; may return before they were read. A later put of the same page wins."""

    def drain(self, *, hurry: bool = True, leave: int = 0) -> None:
        """Wait until every queued page was read (not necessarily stored); raises what a worker raised.

        `hurry`: reading goes before all other work, at the price of a copy (the job is frozen).
        `leave`: so many pages may still be unread.
        """

    def pause(self) -> None:
        """Leave the processors to the frozen window: returns when no thread of the sink works any more. They go on
        at `resume`; a `drain` meanwhile still gets pages read.
        """

    def resume(self) -> None:
        """End a pause. Idempotent."""

    def close_space(self, space: str, present: PageRuns) -> None:
        """The space's final set of pages. Those never put are the parent point's; a page that the parent
        lacks too raises. Parent pages outside `present` are dropped.
        """


class PageSource(Protocol):
    """Where a restore gets pages (the store's point reader)."""

    def runs(self, space: str) -> Sequence[Run]:
        """Every page of the space, sorted, merged. Unknown space: empty."""

    def fill(
        self,
        space: str,
        write: Callable[[PageRuns, memoryview], None],
        only: PageRuns | None = None,
    ) -> int:
        """Read, verify and decompress all pages of the space, or those of `only` (sorted, disjoint); `write(runs, data)`
        gets them in pieces, from several threads at once. All-zero pages are not handed out. Returns the number of pages
        handed out.
        """

    def changes(self, space: str, base: str) -> tuple[Sequence[Run], Sequence[Run]]:
        """What makes memory that holds `base` one that holds `space`: pages to write, and pages to drop (they read as zero).

        Sorted, merged. A page of equal content may be among those to write, never the other way about.
        """
