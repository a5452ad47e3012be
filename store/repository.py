"""The store as a whole: opening and making one, points by name, and the way to everything else.

Owns the directory's layout (FORMAT.md, "Directory") and the check that it is ours. Page work is loaded on first
use only: opening a store and listing its points imports SQLAlchemy Core, and neither numpy nor Alembic.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Self

from snapshotter.base.errors import (
    NoStoreError,
    NoSuchPointError,
    OutdatedStoreError,
    SnapshotterError,
    VerificationError,
)
from store import reserve
from store.catalog import BlobRefs, Catalog
from store.damage import NAME as DAMAGED
from store.damage import DamageList
from store.files import (
    TEMP_SUFFIX,
    check_private,
    check_way,
    fsync_dir,
    make_dir,
    publish,
    store_error,
    wrapped,
)
from store.locks import ORPHANED_S, Lock, lock_job, lock_store, try_lock
from store.schema import SCHEMA_REVISION
from store.types import FileRecord, Point, PruneReport, StoreStats, VerifyReport

if TYPE_CHECKING:
    from store.keytable import IndexDir, IndexFile, KeyTable
    from store.native import Stager
    from store.pack import PackKeys
    from store.packset import PackReaders
    from store.reader import PointReader
    from store.writer import PointWriter

FORMAT_VERSION = 1
ALGORITHM = "ph-blake3-128"
_MARK, _KEY, _CATALOG = "STORE", "key", "catalog.sqlite"
_DIRECTORIES = ("packs", "index", "heads", "locks")
_HEX = re.compile(r"[0-9a-f]{4,32}")
_RELATIVE = re.compile(r"(?P<name>.*?)(?:~(?P<back>\d+))?", re.DOTALL)


def _is_there(path: Path) -> bool:
    """Like exists(), but what may not be looked at is there: `check_private` says whose it is."""
    try:
        return path.exists()
    except PermissionError:
        return True


def _has_packs(root: Path) -> bool:
    return any((root / "packs").glob("*.pack"))


class Store:
    """An open store. Any thread; close it, or use it as a context manager."""

    def __init__(self, path: Path, mark: dict[str, object], secret: bytes, catalog: Catalog) -> None:
        self.path = path
        self.catalog = catalog
        self.packs_dir = path / "packs"
        self.damage = DamageList(path)
        self._locks = path / "locks"
        self._secret = secret
        self.id = str(mark["id"])

    # -- opening --------------------------------------------------------------------------------------

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        create: bool = False,
        catalog_url: str | None = None,
        *,
        upgrade: bool = True,
        owner: int | None = None,
    ) -> Store:
        """Opens the store in a directory, making or (unless told not to) migrating it as needed.

        It must belong to the caller, or to the uid `owner`, who is then trusted with what is in it.

        Raises:
            NoStoreError: nothing here, not a store, or one of a newer snap.
            OutdatedStoreError: one of an older snap, with upgrade=False.
            PermissionDeniedError: not ours, or open to others.
            StoreError: the disk failed or is full.
        """
        root = Path(path).absolute()
        if create and not _is_there(root / _MARK):
            cls._create(root, owner)
        check_private(root, owner)
        mark = cls._read_mark(root)
        with wrapped("cannot read the store's key", root / _KEY):
            try:
                secret = (root / _KEY).read_bytes()
            except FileNotFoundError:
                secret = b""
        if len(secret) != 32:
            raise NoStoreError("the store's key is missing or damaged", where=str(root / _KEY))
        catalog = cls._open_catalog(root, catalog_url, upgrade=upgrade)
        return cls(root, mark, secret, catalog)

    @staticmethod
    def _create(root: Path, owner: int | None) -> None:
        check_way(root, owner)
        with wrapped("cannot make a store", root):
            root.parent.mkdir(parents=True, exist_ok=True)
            make_dir(root)
            names = {name for name in os.listdir(root) if not name.endswith(TEMP_SUFFIX)}
            if names - {
                *_DIRECTORIES,
                _MARK,
                _KEY,
                _CATALOG,
                _CATALOG + "-journal",
                DAMAGED,
                reserve.NAME,
                "lost+found",
            }:
                raise NoStoreError(
                    "the directory is not empty and not a store",
                    where=str(root),
                    hint="name another with --store",
                )
            if names <= {"lost+found"} and os.stat(root).st_uid == os.geteuid():
                root.chmod(0o700)  # an empty directory made for us with `mkdir`
        check_private(root, owner)
        with wrapped("cannot make a store", root):
            for name in _DIRECTORIES:
                make_dir(root / name)
            with lock_store(root / "locks", exclusive=True):
                if (root / _MARK).exists():
                    return
                # STORE comes before the catalog and any pack: those without it are a store that lost its id.
                if (root / _CATALOG).exists() or _has_packs(root):
                    raise NoStoreError(
                        "the file STORE is missing beside a catalog or packs",
                        where=str(root),
                        hint="restore STORE from a backup, or name another directory with --store",
                    )
                if not (root / _KEY).exists():
                    publish(root, _KEY, secrets.token_bytes(32))
                mark = {"format": FORMAT_VERSION, "id": secrets.token_hex(16), "algorithm": ALGORITHM}
                publish(root, _MARK, (json.dumps(mark) + "\n").encode())
            fsync_dir(root.parent)

    @staticmethod
    def _read_mark(root: Path) -> dict[str, object]:
        try:
            text = (root / _MARK).read_bytes()[:4096]
            mark = json.loads(text)
            version, store_id, algorithm = mark["format"], bytes.fromhex(mark["id"]), mark["algorithm"]
        except FileNotFoundError:
            raise NoStoreError(
                "not a store", where=str(root), hint="name another with --store; `snap take` makes one"
            ) from None
        except (ValueError, KeyError, TypeError):
            raise NoStoreError("the file STORE is damaged", where=str(root)) from None
        except OSError as error:
            raise store_error(error, "cannot read the store", root) from error
        if version != FORMAT_VERSION or algorithm != ALGORITHM or len(store_id) != 16:
            raise NoStoreError(
                f"the store has format {version} with {algorithm}, this snap knows {FORMAT_VERSION} with {ALGORITHM}",
                where=str(root),
                hint="use the snap that wrote it, or another --store",
            )
        return dict(mark)

    @staticmethod
    def _open_catalog(root: Path, url: str | None, *, upgrade: bool) -> Catalog:
        path = root / _CATALOG
        if url is not None:
            catalog = Catalog(url, url)
        else:
            # A crash right after STORE was written leaves no catalog; packs without one are a lost catalog.
            fresh = upgrade and not path.exists() and not _has_packs(root)
            catalog = Catalog.at(path, create=fresh)
        if (revision := catalog.revision()) != SCHEMA_REVISION:
            if not upgrade and (revision is None or revision < SCHEMA_REVISION):  # numbers of four digits
                raise OutdatedStoreError(
                    f"the catalog has schema {revision or 'none'}, this snap's is {SCHEMA_REVISION}",
                    where=str(root),
                    hint="the next command that uses the store upgrades it",
                )
            with lock_store(root / "locks", exclusive=True, wait_s=30.0):
                revision = catalog.revision()
                if revision is None and _has_packs(root):
                    # Migrated, it would name no pack, and the next prune would take them all for garbage.
                    raise NoStoreError(
                        "the catalog is empty but there are packs",
                        where=str(path) if url is None else str(root),
                        hint="restore catalog.sqlite from a backup",
                    )
                if revision != SCHEMA_REVISION:
                    catalog.migrate()
        return catalog

    def close(self) -> None:
        """Idempotent."""
        if "readers" in self.__dict__:
            self.readers.forget_all()
        self.catalog.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    # -- parts, loaded on first use -------------------------------------------------------------------

    @cached_property
    def keys(self) -> PackKeys:
        """Keys derived from the store's secret, one per use."""
        from store.native import derive
        from store.pack import PackKeys

        return PackKeys(
            bytes.fromhex(self.id),
            derive(self._secret, b"snap frames 1"),
            derive(self._secret, b"snap pages 1"),
        )

    @cached_property
    def readers(self) -> PackReaders:
        """The packs, open."""
        from store.packset import PackReaders

        return PackReaders(self.packs_dir, self.keys)

    @cached_property
    def index(self) -> IndexDir:
        """The merged key tables."""
        from store.keytable import IndexDir

        return IndexDir(self.path / "index", self.keys.frames)

    def lock_shared(self, wait_s: float = 10.0) -> Lock:
        """Held while packs are read or written: no prune runs meanwhile."""
        return lock_store(self._locks, exclusive=False, wait_s=wait_s)

    def lock_exclusive(self, wait_s: float = 10.0) -> Lock:
        """Held by what removes packs."""
        return lock_store(self._locks, exclusive=True, wait_s=wait_s)

    def lock_job(self, job: str, wait_s: float = ORPHANED_S) -> Lock:
        """A context manager; LockedError while another snap works on the job."""
        return lock_job(self._locks, job, wait_s=wait_s)

    def blob_refs(self, point_id: str) -> BlobRefs:
        """Where a point's blobs lie."""
        found = self.catalog.blobs([point_id])
        if point_id not in found:
            raise NoSuchPointError(f"there is no point {point_id[:12]}", hint="`snap list` shows them")
        return found[point_id]

    def stager(self, packs: frozenset[int]) -> Stager:
        """Dedup against everything in `packs` but what is damaged: nothing is lost by leaving it out but space."""
        from store.native import Stager, Tables

        packs -= self.damage.load().keys()
        indexes = self.index.load(packs)
        tables = [index.table for index in indexes]
        tables += [table for table in self._own_tables(packs, indexes).values() if table.nr_keys]
        return Stager(self.keys.pages, Tables([table.native() for table in tables]))

    def _own_tables(self, packs: frozenset[int], indexes: Sequence[IndexFile]) -> dict[int, KeyTable]:
        """The key tables of packs that no index file covers. Packs whose footer is damaged are noted and left out."""
        tables = {}
        for pack in sorted(packs.difference(*(index.packs for index in indexes))):
            with contextlib.suppress(VerificationError), self.noting_damage():
                tables[pack] = self.readers.get(pack).table
        return tables

    def maintain_index(self) -> None:
        """Merges key tables when enough packs have none but their own. An accelerator: failure costs nothing."""
        from store import keytable

        with contextlib.suppress(OSError, SnapshotterError), try_lock(self._locks, "index") as free:
            if not free:
                return
            with self.lock_shared():
                packs = frozenset(self.catalog.packs().keys() - self.damage.load().keys())
                indexes = self.index.load(packs)
                useless = set(self.index.names()) - {index.name for index in indexes}
                fresh = self._own_tables(packs, indexes)
                if len(fresh) < keytable.MERGE_AT:
                    return
                chosen = keytable.tier(indexes, sum(table.nr_keys for table in fresh.values()))
                covered = set(fresh).union(*(index.packs for index in chosen))
                self.index.write(covered, [*fresh.values(), *(index.table for index in chosen)])
                # And those that are damaged, or that cover a damaged pack.
                self.index.remove({index.name for index in chosen} | useless)

    # -- points ---------------------------------------------------------------------------------------

    def points(self, job: str | None = None) -> list[Point]:
        """Every point (of a job), oldest first."""
        return self.catalog.points(job)

    def files(self, point: Point) -> list[FileRecord]:
        """The file identities that were recorded with a point."""
        return self.catalog.files(point.id)

    def resolve(self, text: str, job: str | None = None) -> Point:
        """A point by unique id prefix (4 hex digits or more), `latest`, `latest~N`, `JOB` or `JOB~N`."""
        match = _RELATIVE.fullmatch(text)
        name, back = (match["name"], match["back"]) if match else (text, None)
        points = self.points(job)
        if name == "latest":
            return self._back(points, int(back or 0), text, job)
        if back is None and _HEX.fullmatch(text):
            found = [point for point in points if point.id.startswith(text)]
            if len(found) == 1:
                return found[0]
            if found:
                ids = ", ".join(point.id[:12] for point in found[:8])
                raise NoSuchPointError(
                    f"{len(found)} points begin with {text}: {ids}", hint="give more digits"
                )
        of_job = [point for point in points if point.job == name]
        if of_job:
            return self._back(of_job, int(back or 0), text, name)
        of_job = [point for point in points if point.job == text]  # a job whose name holds a ~
        if of_job:
            return of_job[-1]
        raise NoSuchPointError(
            f"no point and no job is called {text!r}",
            where=str(self.path),
            hint="`snap list` shows them; an id prefix needs 4 hex digits",
        )

    def _back(self, points: Sequence[Point], back: int, text: str, job: str | None) -> Point:
        if back >= len(points):
            of = f" of job {job!r}" if job else ""
            count = (
                f"only {len(points)} points" if len(points) > 1 else "only 1 point" if points else "no points"
            )
            are = "are" if len(points) != 1 else "is"
            raise NoSuchPointError(
                f"{text}: there {are} {count}{of}", where=str(self.path), hint="`snap list` shows them"
            )
        return points[-1 - back]

    def writer(self, job: str, parent: Point | None = None) -> PointWriter:
        """A new point of a job; see PointWriter."""
        from store.writer import PointWriter

        return PointWriter(self, job, parent)

    def reader(self, point: Point) -> PointReader:
        """A point's images and pages; see PointReader."""
        from store.reader import PointReader

        return PointReader(self, point)

    def forget(self, points: Iterable[Point | str], *, wait_s: float = 10.0) -> list[str]:
        """Removes points from the catalog; `prune` gives their space back. Returns the ids removed."""
        ids = [point if isinstance(point, str) else point.id for point in points]

        def work() -> list[str]:
            with self.lock_shared(wait_s):
                return self.catalog.forget(ids)

        return reserve.use(self.path, work)

    # -- the whole store ------------------------------------------------------------------------------

    def verify(self, points: Iterable[Point] | None = None) -> VerifyReport:
        """Reads and checks everything that the points (None: all) need."""
        from store.verify import verify

        return verify(self, None if points is None else list(points))

    def prune(self, *, dry_run: bool = False, wait_s: float = 10.0) -> PruneReport:
        """Gives back the space of forgotten points and of takes that never committed."""
        from store.prune import prune

        report = reserve.use(self.path, lambda: prune(self, dry_run=dry_run, wait_s=wait_s))
        if not dry_run:
            reserve.make(self.path)
        return report

    def stats(self) -> StoreStats:
        """Sizes."""
        points, packs = self.points(), self.catalog.packs()
        return StoreStats(
            nr_points=len(points),
            nr_jobs=len({point.job for point in points}),
            nr_packs=len(packs),
            nr_pages=sum(pack.nr_pages for pack in packs.values()),
            bytes_logical=sum(point.bytes_logical for point in points),
            bytes_packs=sum(pack.size_bytes for pack in packs.values()),
            bytes_index=sum(path.stat().st_size for path in (self.path / "index").glob("*.idx")),
            bytes_catalog=sum(path.stat().st_size for path in self.path.glob(_CATALOG + "*")),
        )

    @contextlib.contextmanager
    def noting_damage(self) -> Iterator[None]:
        """Writes down, for later takes, what a VerificationError inside says of a pack."""
        try:
            yield
        except VerificationError as error:
            from store.pack import DamagedPackError

            if isinstance(error, DamagedPackError):
                self.damage.add([(error.pack, error.frame)])
            raise

    @contextlib.contextmanager
    def naming_points(self, frames: Sequence[tuple[int, int]]) -> Iterator[None]:
        """Adds to a VerificationError inside which points need the damaged frames, and notes the damage."""
        try:
            with self.noting_damage():
                yield
        except VerificationError as error:
            from store.verify import points_using

            hurt = points_using(self, frames)
            if hurt and "points hurt" not in error.what:
                names = ", ".join(point[:12] for point in hurt[:8]) + (" ..." if len(hurt) > 8 else "")
                error.what = f"{error.what} (points hurt: {names})"
            raise
