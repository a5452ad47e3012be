"""A store and an engine in memory, for tests of the manager and the command line without root and kernel."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import itertools
import time
import types

from snapshotter.base.errors import Finding, LockedError, NoStoreError, NoSuchPointError, TargetGoneError
from snapshotter.manager.ports import Checked, Dumped, Identity, Restored
from store.types import Damage, Point, PruneReport, VerifyReport

BOOT = "11111111-2222-3333-4444-555555555555"


class FakeStore:
    def __init__(self):
        self.saved: dict[str, Point] = {}
        self.locked: set[str] = set()
        self.damage: tuple[Damage, ...] = ()
        self.exists = True
        self.saved_files = {}
        self.forget_error = None
        self.waited: list[tuple[str, float]] = []
        self.ids = (f"{number:04x}" + "a" * 28 for number in itertools.count(0x1000))

    def opener(self, path, create, *, upgrade=True, owner=None):
        if not (create or self.exists):
            raise NoStoreError("there is no store here", where=str(path))
        path.mkdir(parents=True, exist_ok=True)
        self.exists = True
        return self

    def points(self, job=None):
        return [point for point in self.saved.values() if job in {None, point.job}]

    def resolve(self, text):
        if text in {point.job for point in self.saved.values()}:
            return self.points(text)[-1]
        found = [point for point in self.saved.values() if point.id.startswith(text)]
        if text == "latest" and self.saved:
            return list(self.saved.values())[-1]
        if len(found) != 1:
            raise NoSuchPointError(f"no point {text!r}")
        return found[0]

    @contextlib.contextmanager
    def lock_job(self, job, wait_s=0.0):
        if job in self.locked:
            raise LockedError(f"job {job} is locked")
        self.locked.add(job)
        try:
            yield
        finally:
            self.locked.discard(job)

    @contextlib.contextmanager
    def writer(self, job, parent=None):
        yield FakeWriter(self, job, parent)

    def reader(self, point):
        return types.SimpleNamespace(
            point=point, image_names=lambda: ["manifest", "mm/7"], image=lambda name: name.encode()
        )

    def verify(self, points=None):
        ids = tuple(point.id for point in (points if points is not None else self.saved.values()))
        return VerifyReport(
            points=ids, nr_frames=1, nr_pages=1, nr_packs=1, bytes_read=4096, damage=self.damage
        )

    def files(self, point):
        return self.saved_files[point.id]

    def forget(self, points, *, wait_s=10.0):
        self.waited.append(("forget", wait_s))
        if self.forget_error is not None:
            raise self.forget_error
        for point in points:
            del self.saved[point.id]

    def prune(self, *, dry_run=False, wait_s=10.0):
        self.waited.append(("prune", wait_s))
        return PruneReport(1, 0, 0, 4096, 8192, dry_run)

    def close(self):
        pass


class FakeWriter:
    def __init__(self, store, job, parent):
        self.store, self.job, self.parent = store, job, parent
        self.images = {}

    def add_images(self, images):
        self.images.update(images)

    def commit(self, meta):
        values = {field.name: getattr(meta, field.name) for field in dataclasses.fields(meta)}
        for name in ("files", "point_id", "started_ns"):
            del values[name]
        point = Point(
            id=next(self.store.ids),
            parent=self.parent.id if self.parent else None,
            job=self.job,
            pages_new=1,
            pages_total=2,
            bytes_logical=8192,
            bytes_stored=100,
            duration_us=7,
            **values,
        )
        self.store.saved[point.id] = point
        self.store.saved_files[point.id] = meta.files
        return point


class FakeEngine:
    """Processes are entries of `alive`: pid -> start time; time passes with every dump."""

    def __init__(self):
        self.alive = {7: 100}
        self.started_s = {}
        self.uptime_ns = 10**12
        self.clock_offset_s = time.time() - self.uptime_ns / 1e9
        """Wall clock minus uptime; a test sets the clock by changing it."""
        self.late_warnings = []
        self.rights = True
        self.programs = {}
        self.program_stored = "sim"
        self.dumps = []
        self.findings = ()
        self.images = {"manifest": b""}
        self.during_dump = lambda: None

    def load(self):
        pass

    def identify(self, pid):
        if pid not in self.alive:
            raise TargetGoneError(f"there is no process {pid}")
        uptime_s = self.uptime_ns / 1e9
        return Identity(
            pid,
            self.alive[pid],
            BOOT,
            "sim",
            started_uptime_s=self.started_s.get(pid, self.alive[pid] / 100),
            uptime_s=uptime_s,
            seen_at=self.wall(uptime_s),
        )

    def wall(self, uptime_s):
        return self.clock_offset_s + uptime_s

    def dump(self, pid, sink, parent, after, commit):
        self.dumps.append((pid, parent, after))
        self.during_dump()
        self.uptime_ns += 10**9
        commit(
            Dumped(
                images=self.images,
                pid=pid,
                boot_id=BOOT,
                dump_uptime_ns=self.uptime_ns,
                taken_at=dt.datetime.fromtimestamp(self.wall(self.uptime_ns / 1e9), dt.UTC),
                tracker="compare",
                nonce="n",
                tasks={pid: self.alive[pid]},
                nr_tasks=1,
                frozen_us=5,
                pages_dirty=1,
                warnings=["a warning"],
            )
        )
        return self.late_warnings

    def check(self, pid):
        self.identify(pid)
        return Checked(pid, 1, self.findings, (pid,))

    def program(self, pid):
        return self.programs.get(pid, "sim")

    def program_at(self, reader, pid):
        return self.program_stored

    def may_restore(self):
        return self.rights

    def boot_id(self):
        return BOOT

    def restore(
        self, reader, known_tasks, *, dry_run, leave_stopped, terminal="auto", allow=frozenset(), record
    ):
        self.known_tasks = known_tasks
        pid = reader.point.pid
        # Far in the future of CLOCK_BOOTTIME here: nothing older than this restore compares as newer.
        self.alive[pid] = self.alive.get(pid, 100) + 1
        self.uptime_ns = max(self.uptime_ns, 10**12)
        if not dry_run:
            record({pid: self.alive[pid]})
        return Restored(pid, (pid,), 10, 2, (), {pid: self.alive[pid]})

    def keepers(self):
        return [7]

    def features(self):
        return [{"name": "wp_async", "ok": True, "errno": 0, "note": ""}]


def finding():
    return Finding(7, "descriptor 3", "an io_uring", "close it")
