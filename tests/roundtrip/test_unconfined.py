"""What confined a job and is not kept: the take says so, the rollback says it again, and ids keep their meaning."""

from __future__ import annotations

import os

import pytest

from checkpoint.check import check
from checkpoint.kernel import proc
from checkpoint.resources import policies
from snapshotter.base.errors import RestoreConflictError
from tests import memory_store
from tests.jobs import is_running, state, wait_until
from tests.roundtrip.engine_jobs import kill

pytestmark = pytest.mark.requires("root")


@pytest.fixture
def sleeper(start):
    pid = start("sleep", "1000")
    wait_until(lambda: state(pid) == "S", "sleeping")
    return pid


def test_a_security_label_is_named_at_check_take_and_rollback(sleeper, monkeypatch):
    real = policies.security_label
    monkeypatch.setattr(
        policies, "security_label", lambda pid: "profile\udcff (enforce)" if pid == sleeper else real(pid)
    )
    said = f"task {sleeper}: its security label 'profile\\udcff (enforce)' is not kept"
    assert [text for text in check(sleeper).warnings if text.startswith(said)]
    point = memory_store.take(sleeper)
    assert [text for text in point.result.warnings if text.startswith(said)]
    kill(sleeper)
    monkeypatch.undo()
    again = [text for text in memory_store.rollback(point).warnings if "its security label" in text]
    assert len(again) == 1
    assert "is not kept" in again[0]


def test_ids_of_another_user_namespace_are_a_conflict(sleeper, monkeypatch):
    """Root of a user namespace is nobody outside of it, and must not come back as root."""
    point = memory_store.take(sleeper)
    monkeypatch.setattr(proc, "id_maps", lambda: "0 1000 1\n0 1000 1")
    with pytest.raises(RestoreConflictError, match="in another user namespace"):
        memory_store.rollback(point)
    assert is_running(sleeper)


def test_maps_of_ids_are_read():
    assert proc.id_maps().count("\n") == 1
    assert os.getuid() == 0
