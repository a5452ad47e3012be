"""Taking a point: look, pre-copy, freeze, dump, thaw, commit.

Owns the order of all steps and what the frozen window consists of; what the state of one resource is, the resources
know (checkpoint/resources). Invariants:

- Nothing of the job is touched before every resource has had its look and found nothing.
- A page is read after its tracker was reset, or while its task is frozen: a page written after it was read is
  reported by the next collect and read again; a later put of the same page wins.
- Pages of the parent point are only used for a task that provably is the one that the parent saw (`_usable`).
- The tracker's nonce is valid only between a commit and the next collect.
- The job is thawed on every way out, in the state it had, and keeps running when snap is killed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
import time
from collections.abc import Callable

import numpy as np

from checkpoint import environment, oracle, surroundings, tracking, transfers, watchdog
from checkpoint.check import CheckReport, check, look_at_process, program_of
from checkpoint.context import DumpContext, DumpOptions, DumpResult, FrozenProcess, ParentPoint
from checkpoint.finisher import Finisher
from checkpoint.freeze import FrozenTree, lead_out, settled_tree
from checkpoint.kernel import distant, proc
from checkpoint.kernel.mem import ProcMem
from checkpoint.model import pageplan
from checkpoint.model.pageplan import Runs
from checkpoint.precopy import Precopied, Round, Watch, due, plausible_pages
from checkpoint.resources import files, keyrings, locks, memory, namespaces, policies, registers, task
from checkpoint.resources.proof import record_ways
from checkpoint.staging import Staging
from checkpoint.tracking import keeper
from checkpoint.tracking.soft_dirty import SoftDirtyTracker
from checkpoint.uninterrupted import stops_wait
from checkpoint.watchdog import Watchdog
from images import codec, manifest_pb2, task_pb2
from snapshotter.base import faults
from snapshotter.base.errors import Finding, SnapshotterError, TargetGoneError, UnsupportedError
from snapshotter.base.pages import PAGE_SIZE, PageSink, Run
from snapshotter.base.text import bounded

_NS_PER_S = 1_000_000_000
_MIN_STAGED_BYTES = 4 << 20
_MAPPINGS_FRESH_NS = 50_000_000
_LESS = 7 / 8
"""A further round of pre-copy is made when this one had at most so much of the last one to read."""
_AHEAD_FROM, _AHEAD_PART = 32768, 32
"""Of so many pages to read, this part is read without watching, so that the sink has work while others are watched."""
_SETTLE_S = 2.0
_TAIL_PAGES = 24576
"""What the sink may still have to read when the next step begins: some 60 ms of it."""

Commit = Callable[[DumpResult], None]


def dump(
    pid: int,
    sink: PageSink,
    parent: ParentPoint | None = None,
    options: DumpOptions | None = None,
    commit: Commit | None = None,
) -> DumpResult:
    """Take a point of the job below `pid`.

    Args:
        pid: the root of the job.
        sink: gets the pages.
        parent: the point to build upon; None reads and hands over everything.
        options: see DumpOptions.
        commit: called once with the result, when all pages are with the sink: after the thaw (after="run"), or
            while the job is still frozen. When it raises, the job goes on and no tracker claims to know anything.

    Raises:
        TargetGoneError, UnsupportedError, PermissionDeniedError: the job is not touched.
        SnapshotterError: whatever else went wrong; the job runs on.
    """
    options = options or DumpOptions()
    environment.check_children()
    with Watchdog(options.max_frozen_s), distant.asking(watchdog.left_s, watchdog.note):
        return _dump(pid, sink, parent, options, commit)


def _dump(
    pid: int, sink: PageSink, parent: ParentPoint | None, options: DumpOptions, commit: Commit | None
) -> DumpResult:
    started = time.monotonic_ns()
    found = check(pid, max_tasks=options.max_tasks)
    if not found.ok:
        # What stands in the way may be what a snap that was killed has left there.
        lead_out(found.pids)
        found = check(pid, max_tasks=options.max_tasks)
    found.raise_if_refused()
    faults.point("dump.looked")
    tracker = tracking.choose(options.tracker if options.track else "compare")
    usable = parent if parent is not None and parent.tracker in {"", tracker.name} else None
    nonce = usable.nonce if usable is not None else ""
    ctx = DumpContext(root_pid=pid, sink=sink, parent=parent, options=options)
    keeper.end_others(pid, found.tasks[pid], tracker.name)
    with tracker.session(pid, found.tasks, nonce) as session:
        take = _Take(ctx, session, found, tracker.name)
        return take.run(commit, started)


class _Take:
    """One dump under way."""

    def __init__(self, ctx: DumpContext, session: tracking.Session, found: CheckReport, tracker: str) -> None:
        self.ctx = ctx
        self.session = session
        self.found = found
        self.tracker = tracker
        self.boot_id = proc.boot_id()
        self.precopied: dict[int, Precopied] = {}
        self.spaces: dict[int, tuple[int, memory.AddressSpace]] = {}
        """pid -> when (monotonic ns) and what its mappings were."""
        self.backings: memory.Backings = {}
        self.dump_uptime_ns = 0
        self.frozen_readers: dict[int, memory.MmReader] = {}
        self.witness: oracle.Witness | None = None
        self.wrong: dict[int, SnapshotterError] = {}
        """pid -> what the oracle found, if it is not read again."""
        self.planned: dict[int, tuple[Runs, Runs]] = {}
        """pid -> its pages, and those of them that were read in the frozen window."""
        if ctx.options.verify_pages or oracle.is_wanted():
            ctx.sink = self.witness = oracle.Witness(ctx.sink)
        self.staging = Staging(ctx.sink, self.stage_limit())
        self.manifest = manifest_pb2.Manifest()
        self.ready = contextlib.ExitStack()
        """What is kept ready from pre-copy until the frozen window has been answered for."""
        self._marks = time.monotonic_ns()

    def run(self, commit: Commit | None, started: int) -> DumpResult:
        with self.ready:
            return self._run(commit, started)

    def _run(self, commit: Commit | None, started: int) -> DumpResult:
        ctx, sink, staging = self.ctx, self.ctx.sink, self.staging
        self._mark("look")
        self.prepare_manifest()
        self.ready_bystanders()
        for text in self.found.warnings:
            ctx.warn(text)
        if ctx.options.after == "kill":
            for text in surroundings.of_a_kill(ctx.root_pid, self.found.pids):
                ctx.warn(text)
        keyrings.prepare()
        if ctx.options.precopy:
            self.precopy()
        else:
            locks.prepare(ctx)
            staging.prepare(_MIN_STAGED_BYTES)
        staging.freezing()
        self._mark("precopy")
        after = ctx.options.after
        sink.pause()
        with contextlib.ExitStack() as stack:
            finisher = stack.enter_context(Finisher()) if after != "run" else None
            stack.enter_context(stops_wait())
            tree = stack.enter_context(
                settled_tree(
                    ctx.root_pid,
                    timeout_s=ctx.options.freeze_timeout_s,
                    max_tasks=ctx.options.max_tasks,
                    unsettled=self.shares_memory,
                )
            )
            ctx.processes = tree.processes
            faults.point("dump.frozen")
            self.dump_frozen(tree, staging)
            if after != "run" and finisher is not None:
                watchdog.lifted()
                sink.resume()
                result = self.finish(staging, started, tree)
                self.commit(result, commit)
                tree.leave(after, finisher)
        sink.resume()
        for call in tree.cut_short:
            ctx.warn(call)
        if after == "run":
            faults.point("dump.thawed")
            result = self.finish(staging, started, tree)
            self.commit(result, commit)
        result.stats.frozen_us = tree.frozen_us
        result.stats.duration_us = (time.monotonic_ns() - started) // 1000
        return result

    # -- while it runs -----------------------------------------------------------------------------------------

    def precopy(self) -> None:
        """Read what would be read in the frozen window, while the job runs; again while that is too much.

        The first round stores what the job leaves alone. What it rewrites is copied into memory by the others, each of which has
        less to copy than the one before, unless the job writes faster than that.
        """
        ctx = self.ctx
        nr_before = 0
        for number in range(ctx.options.max_rounds):
            found: list[Round] = []
            for pid, start in self.found.tasks.items():
                with contextlib.suppress(TargetGoneError, FileNotFoundError, ProcessLookupError):
                    found += self.begin_round(pid, start)
            found = self.settled(found)
            nr_pages = sum(pageplan.count(one.due) for one in found)
            if number == 0:
                nr_hot = self.store_cold(found, nr_pages)
                self.prepare_freeze()
                ctx.sink.drain(hurry=False, leave=_TAIL_PAGES)
                self.ready.enter_context(locks.kept_ready())
                nr_expected = nr_hot + nr_pages // 32
            else:
                for one in found:
                    self.stage_round(one)
                nr_expected = nr_pages
            ctx.stats.rounds = number + 1
            few = nr_pages * PAGE_SIZE <= ctx.options.frozen_budget_bytes // 8
            last = few or (number > 1 and nr_pages > nr_before * _LESS)
            if number > 0 and not few:
                nr_expected //= 2  # the memory of pieces that are replaced as a whole is used again
            self.staging.prepare(max(_MIN_STAGED_BYTES, nr_expected * PAGE_SIZE))
            if last:
                break
            nr_before = nr_pages
            if number > 0:
                ctx.sink.drain(hurry=False)  # so that the next round is short
        ctx.sink.drain(hurry=False, leave=_TAIL_PAGES // 4)
        for pid in self.precopied:
            # Read once more just before the freeze, so that smaps need not be read in it.
            if time.monotonic_ns() - self.spaces[pid][0] > _MAPPINGS_FRESH_NS:
                with contextlib.suppress(SnapshotterError):
                    self.note_mappings(pid, memory.address_space(ctx, pid, frozen=False))
        # Whatever is read after the freeze is not of its instant.
        ctx.sink.drain(hurry=False)
        locks.prepare(ctx)
        faults.point("dump.precopied")

    def prepare_freeze(self) -> None:
        """What can be found out while the sink has work."""
        for pid in self.found.tasks:
            if nr_bound := policies.mappings_with_a_policy(pid):
                self.ctx.warn(
                    f"task {pid}: the memory policy of {nr_bound} mappings (mbind) is not part of the point"
                )

    def ready_bystanders(self) -> None:
        """Those that the frozen window will need, if nobody changes its ids until then."""
        bystanders = self.ready.enter_context(self.ctx.bystanders)
        for pid in self.found.tasks:
            with contextlib.suppress(TargetGoneError):
                status = proc.read_status(pid)
                bystanders.of((status.uids[0], status.gids[0]))

    def note_mappings(self, pid: int, space: memory.AddressSpace) -> None:
        self.spaces[pid] = (time.monotonic_ns(), space.prepare())

    def begin_round(self, pid: int, start: int) -> list[Round]:
        """Begin one round of one process: what is due in it; nothing when it is not to be read while it runs."""
        ctx = self.ctx
        if pid in self.precopied and not self.precopied[pid].complete:
            return []  # it is left to the frozen window as a whole
        looked = memory.take_looked(pid)
        try:
            space = memory.address_space(ctx, pid, frozen=False, known=looked)
        except UnsupportedError:
            return []  # mappings came and went while they were looked at; the frozen window will tell
        written = self.written(pid, space)
        faults.point("dump.armed")
        if not self.session.tracks(pid):
            return []
        known = self.precopied.get(pid)
        self.note_mappings(pid, space)
        if looked:  # of an instant that nobody has noted: read again before the freeze
            self.spaces[pid] = (0, space)
        if known is None:
            if written is not None and not self._usable(pid, start):
                written = None
            plan = memory.page_plan(ctx, space, _as_runs(written))
            to_read = plan.to_read
        else:
            plan = memory.page_plan(ctx, space, None)
            to_read = due(plan, written, known)
        if pageplan.count(to_read) > plausible_pages(pid):
            # A large mapping that went away between two looks counts as content.
            self.precopied[pid] = Precopied(start, complete=False)
            return []
        # Until the end of the round what the tracker said is nowhere but here.
        self.precopied[pid] = Precopied(start, complete=False)
        return [Round(pid, start, space, plan.present, to_read, known)]

    def settled(self, found: list[Round]) -> list[Round]:
        """Those rounds whose pages nobody writes into unseen; the rest is left to the frozen window (see transfers.py)."""
        if not found or not transfers.settle(self.ctx.root_pid, _SETTLE_S, self.ctx.warn):
            return []
        return [one for one in found if not transfers.asynchronous(one.pid, one.space.mappings)]

    def read_ahead(self, one: Round) -> Round:
        """Have a part of what is due read at once."""
        ahead = pageplan.first_pages(one.due, pageplan.count(one.due) // _AHEAD_PART)
        with contextlib.suppress(TargetGoneError):
            readers = self.have_read(one.pid, ahead)
            return dataclasses.replace(one, due=pageplan.subtract(one.due, ahead), ahead=readers)
        return one

    def have_read(self, pid: int, pages: Runs) -> list[memory.MmReader]:
        """Give pages of a running process to the sink. Returns who reads them: nobody where there are none."""
        if not len(pages):
            return []
        reader = memory.reader(ProcMem(pid), may_go=True)
        self.ctx.sink.put(memory.space_name(pid), pageplan.to_table(pages), reader)
        self.ctx.stats.pages_dirty += pageplan.count(pages)
        return [reader]

    def store_cold(self, found: list[Round], nr_pages: int) -> int:
        """Have those pages stored that the job does not rewrite meanwhile. Returns how many are left to the next round."""
        if nr_pages > _AHEAD_FROM:
            self.ctx.sink.expect(nr_pages)
            found = [self.read_ahead(one) for one in found]
        watch = Watch(nr_pages)
        hot = self.watch(found, watch)
        if watch.stores_in_vain:
            hot = {one.pid: pageplan.union(hot[one.pid], one.due) for one in found if one.pid in hot}
        return sum(self.end_round(one, hot[one.pid]) for one in found if one.pid in hot)

    def watch(self, found: list[Round], watch: Watch) -> dict[int, Runs]:
        """Wait until the job has shown which pages it rewrites. Returns these for each process that is still there."""
        hot = {one.pid: pageplan.EMPTY for one in found}
        while (pause_s := watch.next_s) > 0:
            since = time.monotonic()
            time.sleep(pause_s)
            nr_left = 0
            for one in found:
                before = hot.pop(one.pid, None)
                if before is None:
                    continue
                with contextlib.suppress(TargetGoneError, FileNotFoundError, ProcessLookupError):
                    written = self.written(one.pid, one.space)
                    now = one.present if written is None else pageplan.normalise(written)
                    hot[one.pid] = pageplan.union(before, now)
                    nr_left += pageplan.count(pageplan.subtract(one.due, hot[one.pid]))
            watch.looked(time.monotonic() - since, nr_left)
        return hot

    def end_round(self, one: Round, hot: Runs) -> int:
        """Have read what was due, but for the pages that the job rewrites. Returns how many pages that is."""
        pid, known = one.pid, one.known
        readers = [*(known.readers if known is not None else ()), *one.ahead]
        try:
            readers += self.have_read(pid, pageplan.subtract(one.due, hot))
        except (TargetGoneError, FileNotFoundError, ProcessLookupError):
            return 0
        covered = pageplan.subtract(one.present, hot)
        self.precopied[pid] = Precopied(one.start, known is None or known.complete, covered, readers)
        return pageplan.count(pageplan.intersect(hot, one.present))

    def stage_round(self, one: Round) -> None:
        """Copy what was due into memory, up to the limit; the rest goes to the sink."""
        pid, known = one.pid, one.known
        readers = list(known.readers) if known is not None else []
        try:
            if len(one.due):
                readers.append(memory.reader(ProcMem(pid), may_go=True))
                self.staging.put(memory.space_name(pid), pageplan.to_table(one.due), readers[-1])
        except (TargetGoneError, FileNotFoundError, ProcessLookupError):
            return
        self.precopied[pid] = Precopied(one.start, known is None or known.complete, one.present, readers)

    def written(
        self, pid: int, space: memory.AddressSpace, frozen: FrozenProcess | None = None
    ) -> Runs | None:
        """What the tracker says, and what it cannot see."""
        runs = self.session.collect(pid, space.private_ranges, frozen=frozen)
        if runs is not None and self.tracker == SoftDirtyTracker.name:
            # KSM makes a new page table entry, without the bit that the page had.
            merged = [vma for vma in space.vmas if "mg" in vma.madvise]
            if merged:
                runs = np.concatenate((runs, pageplan.of_vmas(merged)))
        return runs

    def _usable(self, pid: int, start: int) -> bool:
        """Whether the parent's pages of this pid are of this very process (see the design: dump_uptime)."""
        parent = self.ctx.parent
        if parent is None or parent.boot_id != self.boot_id or parent.tasks.get(pid) != start:
            return False
        # Start times are rounded down to a tick: only one that lies wholly before the dump counts.
        ticks_at_dump = parent.dump_uptime_ns * os.sysconf("SC_CLK_TCK") // _NS_PER_S
        return start < ticks_at_dump and parent.has_space(memory.space_name(pid))

    # -- while it stands still ---------------------------------------------------------------------------------

    def dump_frozen(self, tree: FrozenTree, staging: Staging) -> None:
        ctx = self.ctx
        if ctx.processes[ctx.root_pid].is_zombie:
            raise TargetGoneError("ended while the point was being taken", where=f"task {ctx.root_pid}")
        self.note_instant()
        self._mark("freeze")
        self.look_at_new()
        real, ctx.sink = ctx.sink, staging
        try:
            spaces = {process.pid: self.copy_pages(process) for process in ctx.living()}
            faults.point("dump.copied")
            self._mark("pages")
            self.verify_pages(spaces)
            for process in ctx.processes.values():
                watchdog.note(f"reading the state of task {process.pid}")
                message = task.dump_process(ctx, process)
                ctx.images[f"process/{process.pid}"] = message
                if not process.is_zombie:
                    message.mm = memory.dump_mm(ctx, process, spaces[process.pid])
                    self.doubt(process, spaces[process.pid], staging)
                faults.point("dump.state")
            for error in self.wrong.values():
                raise error
            self._mark("state")
            watchdog.note("reading the descriptors of the job")
            files.dump_files(ctx)
            locks.dump(ctx, spaces)
            self._mark("files")
            watchdog.note("copying the shared memory of the job")
            memory.shmem.put_all(ctx)
            self._mark("shmem")
            staging.drain()
            memory.shmem.close_all(ctx)
            self.read_again(staging)
        finally:
            ctx.sink = real
        living = {process.pid for process in ctx.living()}
        for pid in self.precopied.keys() - living:
            self.session.forget(pid)
            staging.close_space(memory.space_name(pid), [])

    def look_at_new(self) -> None:
        """Refuse by name what processes have that were not there at the look, or have executed a program or changed their rights
        since.
        """
        findings: list[Finding] = []
        for process in self.ctx.living():
            known = self.found.tasks.get(process.pid) == process.start_time_ticks
            if not known or self.found.programs.get(process.pid) != program_of(process.stat, process.status):
                look_at_process(process.pid, findings)
            else:
                namespaces.check_user(process.pid)
        if self.found.tasks.keys() != {process.pid for process in self.ctx.living()}:
            memory.look_sharing([process.pid for process in self.ctx.living()], findings)
        if findings:
            raise UnsupportedError.of(findings, self.ctx.root_pid)

    def look_at_namespaces(self) -> None:
        """Once more, of every thread, after the thaw: only somebody with rights over them can have left them for the window alone."""
        findings: list[Finding] = []
        for process in self.ctx.living():
            with contextlib.suppress(TargetGoneError):
                namespaces.look(process.pid, [one.tid for one in process.threads], findings)
        if findings:
            raise UnsupportedError.of(findings, self.ctx.root_pid)

    def shares_memory(self, tree: FrozenTree) -> bool:
        """Whether a process that was not there at the look runs in another's memory: on its way to an exec, mostly."""
        living = {pid for pid, process in tree.processes.items() if not process.is_zombie}
        findings: list[Finding] = []
        if not living <= self.found.tasks.keys():
            memory.look_sharing(living, findings)
        return bool(findings)

    def copy_pages(self, process: FrozenProcess) -> memory.AddressSpace:
        """Collect, plan and copy the pages of one process that are not with the sink yet."""
        ctx, pid = self.ctx, process.pid
        assert process.mem is not None
        watchdog.note(f"copying the memory of task {pid}")
        _, before = self.spaces.get(pid, (0, None))
        space = memory.address_space(ctx, pid, frozen=True, before=before, backings=self.backings)
        self.session.add(pid, process.start_time_ticks)
        written = self.written(pid, space, process)
        faults.point("dump.collected")
        known = self.precopied.get(pid)
        if known is not None and not known.is_whole(process.start_time_ticks):
            written, known = None, None
        if known is not None:
            plan = memory.page_plan(ctx, space, None)
            to_read = due(plan, written, known)
        else:
            if written is not None and not self._usable(pid, process.start_time_ticks):
                written = None
            plan = memory.page_plan(ctx, space, _as_runs(written))
            to_read = plan.to_read
        name = memory.space_name(pid)
        reader = memory.reader(process.mem)
        if len(to_read):
            ctx.sink.put(name, pageplan.to_table(to_read), reader)
        self.frozen_readers[pid] = reader
        self.planned[pid] = plan.present, to_read
        ctx.sink.close_space(name, pageplan.to_table(plan.present))
        ctx.stats.pages_total += plan.nr_present
        return space

    def doubt(self, process: FrozenProcess, space: memory.AddressSpace, staging: Staging) -> None:
        """Read what may have been written into unseen while the job ran, and let no later point build on what may be so after it."""
        pid = process.pid
        hidden = process.used_io_uring and not transfers.has_ring(space.mappings)
        if hidden:
            present, was_read = self.planned[pid]
            pages = pageplan.subtract(present, was_read)
            staging.put(memory.space_name(pid), pageplan.to_table(pages), self.frozen_readers[pid])
            self.wrong.pop(pid, None)
        if hidden or transfers.held(process):
            self.session.distrust(pid)

    def verify_pages(self, spaces: dict[int, memory.AddressSpace]) -> None:
        """Where the oracle is wanted: before anything is run in the job, which would change its stacks. What it finds counts once `doubt` has been heard."""
        if self.witness is None:
            return
        parent = self.ctx.parent.pages if self.ctx.parent is not None else None
        for pid, (present, was_read) in self.planned.items():
            name, mem = memory.space_name(pid), self.ctx.processes[pid].mem
            assert mem is not None
            pages = pageplan.subtract(present, was_read)
            seen = self.witness.seen(name)
            for runs, piece in self.staging.latest(name):
                seen.update(oracle.read_digests(runs, piece))
            wrong = oracle.compare(name, pages, mem, seen, parent)
            self.ctx.stats.pages_verified += pageplan.count(pages)
            if wrong:
                self.wrong[pid] = oracle.error(pid, wrong, spaces[pid].mappings)
        self.witness.rest()
        self._mark("verify")

    def read_again(self, staging: Staging) -> None:
        """Pages that another thread of ours could not read: once more from this one, which is the tracer.

        Raises:
            SnapshotterError: there is a page that cannot be read. A point never has zeros in its place.
        """
        for pid, reader in self.frozen_readers.items():
            failed, reader.failed = sorted(reader.failed), set()
            if not failed:
                continue
            staging.put(memory.space_name(pid), [(page, 1) for page in failed], reader)
            staging.drain()
            if reader.failed:
                raise SnapshotterError(
                    f"{len(reader.failed)} pages cannot be read, the first is {min(reader.failed):#x}",
                    where=f"task {pid}",
                    hint="broken memory (see dmesg), or /proc/PID/mem is restricted (proc_mem.force_override)",
                )

    def note_instant(self) -> None:
        """When this point is of."""
        manifest = self.manifest
        self.dump_uptime_ns = manifest.dump_uptime_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        manifest.dump_monotonic_ns = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
        manifest.taken_at_ns = time.clock_gettime_ns(time.CLOCK_REALTIME)

    def prepare_manifest(self) -> None:
        """What can be known before the freeze."""
        name = os.uname()
        self.manifest = manifest_pb2.Manifest(
            format_version=codec.FORMAT_VERSION,
            boot_id=self.boot_id,
            kernel_release=name.release,
            machine=name.machine,
            cpu_flags=sorted(environment.cpu_flags()),
            root_pid=self.ctx.root_pid,
            tracker=self.tracker,
            producer=self.ctx.options.producer,
            hostname=socket.gethostname(),
            id_maps=proc.id_maps(),
        )

    def stage_limit(self) -> int:
        """How much may be copied into our memory: a part of what is free."""
        return max(4 * self.ctx.options.frozen_budget_bytes, proc.available_bytes() // 3)

    # -- afterwards --------------------------------------------------------------------------------------------

    def finish(self, staging: Staging, started: int, tree: FrozenTree) -> DumpResult:
        """Hand over what was copied, serialise, sum up."""
        ctx, manifest = self.ctx, self.manifest
        ctx.stats.pages_frozen = staging.nr_put_frozen
        for answer in ctx.later:
            answer()
        self.look_at_namespaces()
        self.ready.close()
        staging.flush()
        ctx.stats.pages_dirty += staging.nr_handed
        self._mark("flush")
        tasks: dict[int, int] = {}
        for pid in ctx.processes:
            message = ctx.images[f"process/{pid}"]
            assert isinstance(message, task_pb2.Process)
            for thread in message.threads:
                tasks[thread.tid] = thread.start_time_ticks
                if thread.xstate:
                    manifest.xfeatures |= registers.xfeatures(thread.xstate)
                    manifest.xstate_size_bytes = max(manifest.xstate_size_bytes, len(thread.xstate))
        manifest.pids.extend(ctx.processes)
        manifest.unconfined.extend(
            text.encode("utf-8", "backslashreplace").decode() for text in ctx.unconfined
        )
        ctx.images["manifest"] = manifest
        stats = ctx.stats
        stats.nr_tasks, stats.nr_processes = len(tasks), len(ctx.processes)
        stats.frozen_us = tree.frozen_us
        stats.bytes_logical = stats.pages_total * PAGE_SIZE
        record_ways(ctx.images.values())
        images = {name: codec.serialise(name, message) for name, message in ctx.images.items()}
        self._mark("serialise")
        stats.duration_us = (time.monotonic_ns() - started) // 1000
        return DumpResult(
            root_pid=ctx.root_pid,
            images=images,
            stats=stats,
            warnings=bounded(ctx.warnings),
            boot_id=self.boot_id,
            dump_uptime_ns=self.dump_uptime_ns,
            taken_at_ns=manifest.taken_at_ns,
            tasks=tasks,
            tracker=self.tracker,
            nonce=self.session.nonce,
        )

    def commit(self, result: DumpResult, commit: Commit | None) -> None:
        """Commit, then let the tracker know that the next point may build on this one."""
        faults.point("dump.commit")
        if commit is not None:
            commit(result)
        faults.point("dump.committed")
        self._mark("commit")
        if self.ctx.options.after == "kill":
            return
        try:
            self.session.confirm()
        except (OSError, SnapshotterError) as error:
            # The point is safe. The next one reads everything.
            result.warnings.append(f"tracking ends here: {error}")
        self._mark("confirm")

    def _mark(self, phase: str) -> None:
        now = time.monotonic_ns()
        phases = self.ctx.stats.phases_us
        phases[phase] = phases.get(phase, 0) + (now - self._marks) // 1000
        self._marks = now


def _as_runs(table: Runs | None) -> list[Run] | None:
    """Rows [first, end) as (first, nr_pages)."""
    return None if table is None else pageplan.to_list(pageplan.normalise(table))
