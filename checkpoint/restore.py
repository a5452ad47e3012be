"""Restore: a point's images and pages become the running job again, under its pids. Orchestrates, phase by phase.

    decode -> survey, plan, check (nothing touched) -> replace the old job -> tree of stubs -> descriptors
    -> memory -> threads -> state -> registers, all tasks let go together

Invariants: until `replace` nothing on the machine changes. From the first stub on, a failure kills
every stub (they also die with snap: PTRACE_O_EXITKILL) and raises; no stub runs an instruction of the job before
all of them are complete. What one kind of state needs is its resource's; building and releasing tasks is assembly.py's.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator, Sequence

from checkpoint import environment, room, surroundings
from checkpoint.assembly import ARENA_BYTES, Assembly
from checkpoint.finisher import Finisher
from checkpoint.kernel import sys as ksys
from checkpoint.plan import RestorePlan, decode, make_plan
from checkpoint.replace import replace
from checkpoint.resources import directories, files, memory, nameless, scheduling, task
from checkpoint.restore_context import RestoreContext, RestoreOptions, RestoreResult
from checkpoint.uninterrupted import stops_wait
from checkpoint.watchdog import Watchdog
from images import task_pb2
from snapshotter.base import faults
from snapshotter.base.errors import RestoreConflictError, SnapshotterError, wrap_os_error
from snapshotter.base.pages import PageSource
from snapshotter.base.text import bounded

__all__ = ["RestoreOptions", "RestoreResult", "plan", "restore"]


def plan(
    images: Callable[[str], bytes],
    names: Sequence[str],
    source: PageSource,
    options: RestoreOptions | None = None,
) -> RestorePlan:
    """What `restore` would do, all checks made. Touches nothing.

    Raises:
        RestoreConflictError: something on this machine stands in the way.
        VerificationError, UnsupportedError: the point itself does.
    """
    ctx, _, planned = _prepare(images, names, source, options or RestoreOptions())
    _release(ctx)
    return planned


def restore(
    images: Callable[[str], bytes],
    names: Sequence[str],
    source: PageSource,
    options: RestoreOptions | None = None,
) -> RestoreResult:
    """Bring a point back to life.

    Args:
        images: a serialised image by name.
        names: every image the point has.
        source: its pages.
        options: defaults are right for replacing the job or starting it anew.

    Raises:
        RestoreConflictError: something on this machine stands in the way; nothing was touched, unless the error
            says that the old job was killed and a zombie keeps a pid.
        VerificationError, UnsupportedError, PermissionDeniedError: as they say; no trace is left.
    """
    options = options or RestoreOptions()
    started = time.monotonic_ns()
    phases: dict[str, int] = {}
    with _timed(phases, "plan"):
        ctx, found, planned = _prepare(images, names, source, options)
    result = RestoreResult(planned.root_pid, list(ctx.processes), plan=planned, phases_us=phases)
    result.warnings = bounded(ctx.warnings)
    faults.point("restore.planned")
    if options.dry_run:
        _release(ctx)
        return result
    with contextlib.ExitStack() as stack:
        stack.enter_context(stops_wait())
        try:
            finisher = stack.enter_context(Finisher(_numbers(ctx, planned)))
            stack.enter_context(Watchdog(options.max_frozen_s if found.old else 0, _numbers(ctx, planned)))
            faults.point("restore.watched")
            with _timed(phases, "replace"):
                replace(ctx, found, finisher)
        except BaseException:
            _release(ctx)
            raise
        faults.point("restore.killed")
        collecting = gc.isenabled()
        gc.disable()
        try:
            _build(ctx, planned, finisher, phases)
        finally:
            if collecting:
                gc.enable()
    result.tasks = ctx.state.pop("tasks", {})
    result.pages_written = ctx.pages_written
    result.warnings = bounded(ctx.warnings)
    result.duration_us = (time.monotonic_ns() - started) // 1000
    return result


def _prepare(
    images: Callable[[str], bytes], names: Sequence[str], source: PageSource, options: RestoreOptions
) -> tuple[RestoreContext, environment.Survey, RestorePlan]:
    ctx = decode(images, names, source, options)
    ksys.allow_descriptors()  # every mapped file is open at once from the check on
    try:
        environment.check_children()
        environment.check_machine(ctx)
        environment.check_rights(ctx)
        found = environment.survey(ctx)
        ctx.replaces, ctx.old = bool(found.old), frozenset(found.old)
        room.check(ctx, found)
        _check_surroundings(ctx, found)
        planned = make_plan(ctx, found)
        environment.check_free(planned.tree.helper_pids, found)
        for process in ctx.processes.values():
            task.check(ctx, process)
        scheduling.check(one for one in ctx.processes.values() if one.state != task_pb2.Process.ZOMBIE)
        memory.check(ctx)
        # The root stub's own few mappings will want to be avoided too: in 128 TiB that never decides.
        memory.arena_hole([ctx.mm(process) for process in ctx.processes.values() if process.mm], ARENA_BYTES)
        files.check(ctx)
    except BaseException:
        _release(ctx)
        raise
    finally:
        ctx.acting.close()
    return ctx, found, planned


def _check_surroundings(ctx: RestoreContext, found: environment.Survey) -> None:
    """What killing the old job does to others is allowed, or refused now."""
    around = surroundings.look(found, ctx.manifest.root_pid)
    obstacles = (*around.obstacles, *room.memory(ctx, found))
    refused = [one for one in obstacles if one.option not in ctx.options.allow]
    if refused:
        raise RestoreConflictError.of(refused)
    ctx.accepted = obstacles
    for text in (*map(str, obstacles), *around.notes):
        ctx.warn(text)


def _numbers(ctx: RestoreContext, planned: RestorePlan) -> set[int]:
    """Every number that a task, group or session of the job needs."""
    groups = {number for process in ctx.processes.values() for number in (process.pgid, process.sid)}
    return ctx.task_ids() | groups | set(planned.tree.helper_pids)


def _release(ctx: RestoreContext) -> None:
    """Close what the checks opened and keep open: files, directories, pipes of others. End the threads with others' rights: whatever
    fails, since a process with threads cannot be forked safely.
    """
    with contextlib.ExitStack() as stack:
        stack.callback(ctx.acting.close)
        for release in (nameless.release, directories.release, memory.release, files.close_all):
            stack.callback(release, ctx)


def _build(ctx: RestoreContext, planned: RestorePlan, finisher: Finisher, phases: dict[str, int]) -> None:
    assembly = Assembly(ctx, planned)
    try:
        with _timed(phases, "tree"):
            assembly.make_tree()
        faults.point("restore.tree")
        with _timed(phases, "files"):
            files.open_all(ctx)
            files.install(ctx)
        faults.point("restore.files")
        with _timed(phases, "memory"):
            for stub, process in assembly.living():
                memory.restore_mm(ctx, stub, process)
                faults.point("restore.memory")
        with _timed(phases, "threads"):
            assembly.make_threads()
            files.install_own(ctx)
        faults.point("restore.threads")
        with _timed(phases, "state"):
            files.late(ctx)
            memory.finish(ctx)
            assembly.restore_state()
        faults.point("restore.state")
        with _timed(phases, "release"):
            assembly.release(finisher)
    except SnapshotterError:
        assembly.abandon()
        raise
    except OSError as error:
        assembly.abandon()
        raise wrap_os_error(
            error, f"cannot restore: {error}", where=f"task {planned.root_pid}", hint="no trace of it is left"
        ) from error
    except BaseException:
        assembly.abandon()
        raise
    finally:
        with contextlib.suppress(Exception):
            _release(ctx)


@contextlib.contextmanager
def _timed(phases: dict[str, int], name: str) -> Iterator[None]:
    start = time.monotonic_ns()
    try:
        yield
    finally:
        phases[name] = (time.monotonic_ns() - start) // 1000
