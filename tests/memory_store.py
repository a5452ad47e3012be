"""A page store in memory: PageSink and PageSource for tests of the engine, no store, no files.

Pages are read inside put() itself, so what a dump queued is what the job had at that moment.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from snapshotter.base.pages import PAGE_SIZE, PageReader, Run

_ZERO = bytes(PAGE_SIZE)
_PIECE = 256


def merge(pages: Iterable[int]) -> list[Run]:
    """Sorted page numbers as runs."""
    runs: list[Run] = []
    for page in sorted(pages):
        if runs and sum(runs[-1]) == page:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((page, 1))
    return runs


@dataclass
class MemoryPoint:
    """A sink while it is being written, a source afterwards."""

    parent: MemoryPoint | None = None
    images: dict[str, bytes] = field(default_factory=dict)
    spaces: dict[str, dict[int, bytes]] = field(default_factory=dict)
    pages_put: int = 0
    result: object = None

    # -- sink -------------------------------------------------------------------------------------------

    def expect(self, nr_pages: int) -> None:
        """A hint."""

    def put(self, space: str, runs: Sequence[Run], reader: PageReader) -> None:
        pages = self.spaces.setdefault(space, {})
        for first, count in runs:
            for start in range(first, first + count, _PIECE):
                nr = min(_PIECE, first + count - start)
                buffer = bytearray(nr * PAGE_SIZE)
                reader.read_into([(start, nr)], memoryview(buffer))
                for at in range(nr):
                    pages[start + at] = bytes(buffer[at * PAGE_SIZE : (at + 1) * PAGE_SIZE])
                self.pages_put += nr

    def drain(self, *, hurry: bool = True, leave: int = 0) -> None:
        """Nothing is ever queued."""

    def pause(self) -> None:
        """Nothing works here."""

    def resume(self) -> None:
        """Nothing works here."""

    def close_space(self, space: str, present: Iterable[Run]) -> None:
        put = self.spaces.get(space, {})
        final = {}
        for first, count in present:
            for page in range(first, first + count):
                if page in put:
                    final[page] = put[page]
                elif self.parent is not None and page in self.parent.spaces.get(space, {}):
                    final[page] = self.parent.spaces[space][page]
                else:
                    raise AssertionError(f"{space}: page {page:#x} was never put and the parent lacks it")
        self.spaces[space] = final

    def commit(self, result: object) -> None:
        """What dump() calls: keeps the serialised images."""
        self.result = result
        self.images = dict(result.images)  # type: ignore[attr-defined]

    # -- source -----------------------------------------------------------------------------------------

    def runs(self, space: str) -> Sequence[Run]:
        return merge(self.spaces.get(space, {}))

    def fill(
        self,
        space: str,
        write: Callable[[Sequence[Run], memoryview], None],
        only: Sequence[Run] | None = None,
    ) -> int:
        pages = self._stored(space)
        if only is not None:
            wanted = {page for first, count in only for page in range(first, first + count)}
            pages = {page: data for page, data in pages.items() if page in wanted}
        for first, count in merge(pages):
            for start in range(first, first + count, _PIECE):
                nr = min(_PIECE, first + count - start)
                data = b"".join(pages[start + at] for at in range(nr))
                write([(start, nr)], memoryview(data))
        return len(pages)

    def changes(self, space: str, base: str) -> tuple[Sequence[Run], Sequence[Run]]:
        pages, old = self._stored(space), self._stored(base)
        return (
            merge(page for page, data in pages.items() if old.get(page) != data),
            merge(old.keys() - pages.keys()),
        )

    def _stored(self, space: str) -> dict[int, bytes]:
        return {page: data for page, data in self.spaces.get(space, {}).items() if data != _ZERO}

    def read(self, space: str, runs: Sequence[Run]) -> bytes:
        pages = self.spaces.get(space, {})
        return b"".join(
            pages.get(page, _ZERO) for first, count in runs for page in range(first, first + count)
        )

    # -- images -----------------------------------------------------------------------------------------

    def image(self, name: str) -> bytes:
        return self.images[name]

    def image_names(self) -> list[str]:
        return sorted(self.images)

    def as_parent(self):
        """This point as the parent of the next dump."""
        from checkpoint.context import ParentPoint

        result = self.result
        return ParentPoint(
            boot_id=result.boot_id,  # type: ignore[attr-defined]
            dump_uptime_ns=result.dump_uptime_ns,  # type: ignore[attr-defined]
            tasks=result.tasks,  # type: ignore[attr-defined]
            nonce=result.nonce,  # type: ignore[attr-defined]
            images=self.image,
            has_space=self.spaces.__contains__,
            tracker=result.tracker,  # type: ignore[attr-defined]
            pages=self,
        )


def take(pid: int, parent: MemoryPoint | None = None, *, after: str = "run", **more: int) -> MemoryPoint:
    """Dump a job into memory."""
    from checkpoint.context import DumpOptions
    from checkpoint.dump import dump

    point = MemoryPoint(parent)
    options = DumpOptions(after=after, producer="tests", **more)  # type: ignore[arg-type]
    dump(pid, point, parent.as_parent() if parent else None, options, point.commit)
    return point


def rollback(point: MemoryPoint, **options):
    """Restore it; the restored tasks are children of the nearest subreaper (the test)."""
    from checkpoint.restore import restore
    from checkpoint.restore_context import RestoreOptions

    assert os.geteuid() == 0
    return restore(point.image, point.image_names(), point, RestoreOptions(**options))
