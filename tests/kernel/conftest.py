"""Fixtures that several files here share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest

from tests.kernel.descriptor_jobs import Restored, child, dump
from tests.kernel.watched import PROGRAM, Watched


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


@pytest.fixture
def start(job, compile_program, tmp_path, monkeypatch):
    """start(): a running self_check.c, watched."""
    monkeypatch.setenv("SNAP_RUNTIME_DIR", str(tmp_path / "run"))
    with contextlib.ExitStack() as stack:

        def started():
            watched = Watched(job.start([compile_program(PROGRAM)]).wait_ready())
            stack.callback(watched.close)
            return watched

        yield started
