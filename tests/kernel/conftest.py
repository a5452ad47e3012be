"""Fixtures that several files here share."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.kernel.descriptor_jobs import Restored, child, dump


@pytest.fixture
def again():
    """again(prepare): what `prepare` opened in a child, dumped and opened here."""
    made: list[Restored] = []

    def run(prepare: Callable[[], object], **options) -> Restored:
        with child(prepare) as pid:
            ctx = dump(pid)
        restored = Restored(ctx, pid, **options)
        made.append(restored)
        return restored

    yield run
    for restored in made:
        restored.opening.close()
