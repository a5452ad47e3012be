"""The manager on fakes."""

from __future__ import annotations

import pytest

from snapshotter.manager import config
from snapshotter.manager.session import Session
from tests.fakes import FakeEngine, FakeStore


@pytest.fixture
def engine():
    return FakeEngine()


@pytest.fixture
def store():
    return FakeStore()


@pytest.fixture
def session(tmp_path, engine, store):
    settings = config.Config(store=tmp_path / "store", store_from="test", lock_wait_s=0.0)
    return Session(settings, open_store=store.opener, open_engine=lambda: engine)
