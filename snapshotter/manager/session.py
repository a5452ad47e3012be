"""One run of the manager: its settings, and the store and the engine, each opened when first needed.

Listing points must not pay for the engine, and checking a job must not make a store, so both are lazy.
Tests hand in fakes for either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from snapshotter.manager.config import Config
from snapshotter.manager.ports import EngineLike, StoreLike


class OpenStore(Protocol):
    """Opens (and with `create` makes) the store in a directory."""

    def __call__(
        self, path: Path, create: bool, *, upgrade: bool = True, owner: int | None = None
    ) -> StoreLike:
        """See stores.open_store."""


def _open_real_store(
    path: Path, create: bool, *, upgrade: bool = True, owner: int | None = None
) -> StoreLike:
    from snapshotter.manager.stores import open_store

    return open_store(path, create, upgrade=upgrade, owner=owner)


def _open_real_engine(config: Config) -> EngineLike:
    from snapshotter.manager.engine import RealEngine

    return RealEngine(max_frozen_s=config.max_frozen_s, tracker=config.tracker)


class Session:
    """Settings plus lazily opened store and engine. A context manager: leaving closes the store."""

    def __init__(
        self,
        config: Config,
        *,
        open_store: OpenStore = _open_real_store,
        open_engine: Callable[[], EngineLike] | None = None,
    ) -> None:
        self.config = config
        self._open_store = open_store
        self._open_engine = open_engine
        self._store: StoreLike | None = None
        self._engine: EngineLike | None = None

    @property
    def store_path(self) -> Path:
        """Where the store is or would be."""
        return self.config.store

    def store(self, *, create: bool = False) -> StoreLike:
        """The open store; `create` makes it (0700) if it is not there."""
        if self._store is None:
            self._store = self._open_store(self.config.store, create, owner=self.config.store_owner)
        return self._store

    def store_as_it_is(self) -> StoreLike:
        """The open store for a look: an older one is not upgraded but raises OutdatedStoreError."""
        if self._store is None:
            self._store = self._open_store(
                self.config.store, False, upgrade=False, owner=self.config.store_owner
            )
        return self._store

    def store_exists(self) -> bool:
        """Whether something is where the store is or would be: an empty directory is nothing."""
        path = self.store_path
        return self._store is not None or (path.exists() and not (path.is_dir() and not any(path.iterdir())))

    @property
    def engine(self) -> EngineLike:
        """The engine, imported now if it was not yet."""
        if self._engine is None:
            self._engine = self._open_engine() if self._open_engine else _open_real_engine(self.config)
        return self._engine

    @contextmanager
    def locked(self, job: str, *, wait_s: float = 0.0, create: bool = False) -> Iterator[None]:
        """Hold the job's lock; LockedError if somebody else still has it after `wait_s`."""
        with self.store(create=create).lock_job(job, wait_s=wait_s):
            yield

    def close(self) -> None:
        """Close what was opened."""
        if self._store is not None:
            store, self._store = self._store, None
            store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
