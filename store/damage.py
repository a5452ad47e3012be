"""What is known to be damaged: a small file of the store, so that no later take builds upon it.

A pack whose bytes went bad still lists keys of pages, and a take that found a page there would be born
damaged. So whoever meets damage writes it down (`DamageList.add`), a take looks nothing up in such a pack and
inherits nothing from such a frame, `verify` strikes out what is right again, and `prune` moves what is readable
out of it. The file is an aid: without it everything works as if no damage had been met yet.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path

from snapshotter.base.errors import LockedError, SnapshotterError
from store.files import publish
from store.locks import Lock

NAME = "damaged"
VERSION = 1
MAX_BYTES = 8 << 20
MAX_FRAMES = 1000
"""Of one pack; with more the whole pack is distrusted, so that the file stays small."""

Damaged = dict[int, frozenset[int]]
"""pack -> its damaged frames; none named: nothing in the pack can be trusted."""


class DamageList:
    """The file `damaged` of one store. Any thread, any process."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def load(self) -> Damaged:
        """What is known; nothing if the file is not there or cannot be understood."""
        try:
            with open(self._root / NAME, "rb") as file:
                data = json.loads(file.read(MAX_BYTES))
            if data["format"] != VERSION:
                return {}
            return {int(pack, 16): frozenset(map(int, frames)) for pack, frames in data["packs"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}

    def add(self, found: Iterable[tuple[int, int | None]]) -> None:
        """Writes down (pack, frame or None: all of it). Never raises: what was met is reported anyway."""
        new: dict[int, set[int | None]] = {}
        for pack, frame in found:
            new.setdefault(pack, set()).add(frame)

        def merge(known: Damaged) -> Damaged:
            return known | {pack: _together(known.get(pack), frames) for pack, frames in new.items()}

        known = self.load()
        if merge(known) != known:
            self._change(merge)  # once more, under the lock: somebody else may have added to it since

    def strike(self, packs: Collection[int]) -> None:
        """Forgets packs: they are gone, or right again. Never raises."""
        if not self.load().keys().isdisjoint(packs):
            self._change(lambda known: {pack: frames for pack, frames in known.items() if pack not in packs})

    def _change(self, change: Callable[[Damaged], Mapping[int, frozenset[int]]]) -> None:
        try:
            lock = Lock(
                self._root / "locks" / NAME, exclusive=True, wait_s=5.0, what="the list is busy", hint=""
            )
            with lock:
                packs = {
                    f"{pack:08x}": sorted(frames) for pack, frames in sorted(change(self.load()).items())
                }
                publish(self._root, NAME, (json.dumps({"format": VERSION, "packs": packs}) + "\n").encode())
        except (OSError, LockedError, SnapshotterError):
            return  # a full or read-only disk


def _together(known: frozenset[int] | None, new: set[int | None]) -> frozenset[int]:
    """Damaged frames known and new; none: the whole pack."""
    if None in new or known == frozenset() or len(new) + len(known or ()) > MAX_FRAMES:
        return frozenset()
    return frozenset(known or ()) | {frame for frame in new if frame is not None}
