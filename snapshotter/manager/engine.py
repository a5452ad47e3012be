"""The real engine as the manager uses it: the only module that names the `checkpoint` package's functions.

Translates between the engine's dataclasses and the manager's, and identifies processes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Literal, cast

from snapshotter.base.errors import SnapshotterError, TargetGoneError, UsageError
from snapshotter.base.pages import PageSink
from snapshotter.base.text import bounded
from snapshotter.manager.ports import Checked, Dumped, Identity, ParentInfo, ReaderLike, Restored

if TYPE_CHECKING:
    from checkpoint.context import DumpResult


class RealEngine:
    """`checkpoint`, imported piece by piece when needed.

    Args:
        max_frozen_s: how long a job may stand still before it is let go.
        tracker: how takes find written pages: auto, or the name of a tracker.
    """

    def __init__(self, max_frozen_s: float = 5.0, tracker: str = "auto") -> None:
        self.max_frozen_s = max_frozen_s
        self.tracker = tracker

    def load(self) -> None:
        """Import what `dump` needs: 50 ms, which are Python's start and not the take's."""
        from checkpoint import dump  # noqa: F401

    def identify(self, pid: int) -> Identity:
        """Which process `pid` is now. Raises TargetGoneError when there is none or it has ended."""
        from checkpoint.kernel import proc

        if not 0 < pid < 1 << 22:
            raise UsageError(
                f"{pid} cannot be the pid of a process", hint="`ps -e` lists the processes that run"
            )
        try:
            stat, status = proc.read_stat(pid), proc.read_status(pid)
        except (TargetGoneError, FileNotFoundError, ProcessLookupError) as error:
            raise TargetGoneError(
                f"there is no process {pid}", hint="`ps -e` lists the processes that run"
            ) from error
        if stat.state in {"Z", "X"}:
            raise TargetGoneError(
                f"process {pid} has ended; it is a zombie",
                hint=f"its parent, process {stat.ppid}, must reap it",
            )
        return Identity(
            pid=pid,
            start_time_ticks=stat.start_time_ticks,
            boot_id=proc.boot_id(),
            comm=stat.comm.decode(errors="replace"),
            started_uptime_s=stat.start_time_ticks / os.sysconf("SC_CLK_TCK"),
            uptime_s=time.clock_gettime(time.CLOCK_BOOTTIME),
            seen_at=time.time(),
            uids=frozenset(map(int, status.fields["Uid"].split())),
        )

    def may_restore(self) -> bool:
        """Whether this user may make processes with their old pids: without that no rollback works."""
        from checkpoint import environment

        return environment.may_restore()

    def boot_id(self) -> str:
        """The id of the present boot of this machine."""
        from checkpoint.kernel import proc

        return proc.boot_id()

    def program(self, pid: int) -> object:
        """Which program a process runs: equal for a restart of it; `str()` names it."""
        from checkpoint import program

        return program.running(pid)

    def program_at(self, reader: ReaderLike, pid: int) -> object:
        """Which program the root process of a point ran. Raises VerificationError."""
        from checkpoint import program

        return program.stored(reader.image, reader, pid)

    def dump(
        self,
        pid: int,
        sink: PageSink,
        parent: ParentInfo | None,
        after: str,
        commit: Callable[[Dumped], None],
    ) -> Sequence[str]:
        """Dump the job below `pid` into `sink`; calls `commit` once everything was read.

        Returns warnings that came too late to be part of the point.
        """
        from checkpoint.context import DumpOptions, ParentPoint
        from checkpoint.dump import dump
        from snapshotter import __version__

        known = None
        if parent is not None:
            known = ParentPoint(
                boot_id=parent.boot_id,
                dump_uptime_ns=parent.dump_uptime_ns,
                tasks=parent.tasks,
                nonce=parent.nonce,
                images=parent.images,
                has_space=parent.has_space,
                tracker=parent.tracker,
                pages=parent.pages,
            )
        options = DumpOptions(
            after=cast("Literal['run', 'stop', 'kill']", after),
            producer=f"snap {__version__}",
            max_frozen_s=self.max_frozen_s,
            tracker=cast("Literal['auto', 'write_protect', 'soft_dirty', 'compare']", self.tracker),
        )
        told: list[str] = []

        def hand_over(result: DumpResult) -> None:
            told.extend(result.warnings)
            commit(_dumped(result))

        return dump(pid, sink, known, options, hand_over).warnings[len(told) :]

    def check(self, pid: int) -> Checked:
        """The engine's look at a running job; never touches it."""
        from checkpoint.check import check
        from checkpoint.resources import files

        self.identify(pid)
        report = check(pid)
        return Checked(
            pid=pid,
            nr_tasks=report.nr_tasks,
            findings=tuple(report.findings),
            pids=tuple(report.pids),
            warnings=tuple(bounded([*report.warnings, *files.look_fleeting(report.tasks, pid)])),
            unseen=report.unseen,
        )

    def restore(
        self,
        reader: ReaderLike,
        known_tasks: Sequence[Mapping[int, int]],
        *,
        dry_run: bool,
        leave_stopped: bool,
        terminal: str = "auto",
        allow: frozenset[str] = frozenset(),
        record: Callable[[Mapping[int, int]], None],
    ) -> Restored:
        """Bring the point that `reader` reads back to life, replacing the job if one of `known_tasks` lives.

        `allow` are the options of Obstacle values that were given. `record` is told the identities of the restored tasks just before they run.
        """
        from checkpoint.restore import restore
        from checkpoint.restore_context import RestoreOptions

        options = RestoreOptions(
            dry_run=dry_run,
            leave_stopped=leave_stopped,
            max_frozen_s=self.max_frozen_s,
            known_tasks=tuple(known_tasks),
            terminal=cast("Literal['auto', 'reopen', 'null']", terminal),
            allow=allow,
            before_release=record,
        )
        result = restore(reader.image, reader.image_names(), reader, options)
        return Restored(
            root_pid=result.root_pid,
            pids=tuple(result.pids),
            duration_us=result.duration_us,
            pages_written=result.pages_written,
            warnings=tuple(result.warnings),
            tasks=result.tasks,
            plan_text=str(result.plan or ""),
            plan={} if result.plan is None else result.plan.as_dict(),
        )

    def keepers(self) -> Sequence[int]:
        """Roots of the jobs beside which a keeper process stays."""
        from checkpoint.tracking import keeper

        try:
            return keeper.running()
        except SnapshotterError:
            return ()  # no state directory yet, or another user's

    def features(self) -> Sequence[Mapping[str, object]]:
        """What this kernel can do, each found out by trying."""
        from checkpoint.kernel import features

        return [
            {"name": found.name, "ok": found.ok, "errno": found.errno, "note": found.note}
            for found in features.probe_all()
        ]


def _dumped(result: DumpResult) -> Dumped:
    return Dumped(
        images=result.images,
        pid=result.root_pid,
        boot_id=result.boot_id,
        dump_uptime_ns=result.dump_uptime_ns,
        taken_at=datetime.fromtimestamp(result.taken_at_ns / 1e9, UTC),
        tracker=result.tracker,
        nonce=result.nonce,
        tasks=result.tasks,
        nr_tasks=result.stats.nr_tasks,
        frozen_us=result.stats.frozen_us,
        pages_dirty=result.stats.pages_dirty,
        warnings=tuple(result.warnings),
    )
