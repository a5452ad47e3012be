"""What one restore knows while it runs: the decoded images, the page source, the stubs, options, result.

Owns the dataclasses that restore.py fills and the resources read, and the one way in which a descriptor of
snap's reaches a stub (`give`). No phases, no order: those are restore.py's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from checkpoint.kernel.rights import Acting
from checkpoint.model import holders as who_gets
from images import codec, files_pb2, manifest_pb2, mm_pb2, task_pb2
from snapshotter.base.errors import VerificationError
from snapshotter.base.obstacles import Obstacle

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from checkpoint.parasite import Batch, Ref, StubTask
    from checkpoint.plan import RestorePlan
    from snapshotter.base.pages import PageSource

M = TypeVar("M")


@dataclass(frozen=True, slots=True)
class RestoreOptions:
    """How a restore is to be made."""

    dry_run: bool = False
    """Decode, check and plan; touch nothing."""
    leave_stopped: bool = False
    """Every process is left in a group-stop (SIGSTOP) instead of running."""
    reap_timeout_s: float = 10.0
    """How long a killed job's zombies may wait for the parent that must reap them."""
    max_frozen_s: float = 5.0
    """A living job that stands still for longer before it is killed is let go, and the restore fails; 0: never."""
    replace: bool = True
    """A living job with these pids and start times is killed; False: it is a conflict."""
    known_tasks: Sequence[Mapping[int, int]] = ()
    """Identities (pid -> start time in ticks, this boot) of the living job besides the point's own: those that an
    earlier rollback (RestoreResult.tasks) or a later point gave it. They may be replaced too."""
    terminal: Literal["auto", "reopen", "null"] = "auto"
    allow: frozenset[str] = frozenset()
    """Options of Obstacle values that were given: what killing the living job may do to others."""
    before_release: Callable[[Mapping[int, int]], None] = lambda _tasks: None
    """Told the identities (RestoreResult.tasks) just before the job runs: whoever writes them down then knows it again even if
    snap dies at once."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """For resources: options of theirs by name."""


@dataclass(slots=True)
class RestoreResult:
    """What a restore did."""

    root_pid: int
    pids: list[int]
    duration_us: int = 0
    pages_written: int = 0
    warnings: list[str] = field(default_factory=list)
    phases_us: dict[str, int] = field(default_factory=dict)
    plan: RestorePlan | None = None
    """What was to be done, for --dry-run."""
    tasks: dict[int, int] = field(default_factory=dict)
    """tid -> start time in ticks of the restored tasks: what the next point's parent must match."""


@dataclass(slots=True, eq=False)
class RestoreContext:
    """One restore under way."""

    load: Callable[[str], bytes]
    """A serialised image by name."""
    source: PageSource
    options: RestoreOptions
    manifest: manifest_pb2.Manifest
    processes: dict[int, task_pb2.Process]
    """By pid, parents before children, zombies included."""
    names: tuple[str, ...] = ()
    """Every image the point has."""
    warnings: list[str] = field(default_factory=list)
    stubs: dict[int, StubTask] = field(default_factory=dict)
    """pid -> the process's leader."""
    threads: dict[int, StubTask] = field(default_factory=dict)
    """tid -> stub, leaders included."""
    supervisor_fd: int = -1
    """In every stub: a pidfd of snap. Closed by restore.py just before the registers are set."""
    arena: tuple[int, int] = (0, 0)
    """[start, end) of the stub's own memory in every process: keep it until the end."""
    holds: dict[int, str] = field(default_factory=dict)
    """pid of a stub (a helper's number) -> the space whose pages its memory has; those of its maker at birth."""
    accepted: tuple[Obstacle, ...] = ()
    """What killing the living job does to others, and was allowed."""
    old: frozenset[int] = frozenset()
    """Processes of the living job, which are going to be killed."""
    replaces: bool = False
    """A living job is replaced: it has gone on since the point."""
    pages_written: int = 0
    state: dict[str, Any] = field(default_factory=dict)
    """For resources, by their name: what must live from one phase to the next."""
    acting: Acting = field(default_factory=Acting)
    """Threads that act with the rights of the job's tasks."""
    _parsed: dict[str, Message] = field(default_factory=dict)
    _holders: who_gets.Holders | None = None

    def task_ids(self) -> set[int]:
        """The number of every task of the job, zombies included."""
        return {thread.tid for process in self.processes.values() for thread in process.threads} | set(
            self.processes
        )

    def warn(self, text: str) -> None:
        """Add a warning once."""
        if text not in self.warnings:
            self.warnings.append(text)

    def image(self, name: str, message_type: type[M]) -> M:
        """The image called `name`, parsed once and shared; do not change it."""
        message = self._parsed.get(name)
        if message is None:
            message = self._parsed[name] = codec.parse(name, self.load(name))
        if not isinstance(message, message_type):
            raise VerificationError(f"is not a {message_type.__name__}", where=f"image {name!r}")
        return message

    def parse_all(self) -> None:
        """Parse every image now. VerificationError for one that is damaged, missing or of no known kind."""
        for name in self.names:
            if name not in self._parsed:
                self._parsed[name] = codec.parse(name, self.load(name))

    def mm(self, process: task_pb2.Process) -> mm_pb2.Mm:
        """The address space of a process."""
        return self.image(process.mm, mm_pb2.Mm)

    def fd_table(self, process: task_pb2.Process) -> files_pb2.FdTable:
        """The descriptors of a process; empty when the point has none for it."""
        if not process.files:
            return files_pb2.FdTable()
        return self.image(process.files, files_pb2.FdTable)

    def tables(self) -> Iterator[tuple[int, int, str]]:
        """Every descriptor table once: (task that gets it, its process, image name). Threads have one of their own only where
        they did not share with their process.
        """
        seen = {""}
        for pid, process in self.processes.items():
            if process.state == task_pb2.Process.ZOMBIE:
                continue
            for tid, name in ((pid, process.files), *((one.tid, one.files) for one in process.threads)):
                if name not in seen:
                    seen.add(name)
                    yield tid, pid, name

    @property
    def holders(self) -> who_gets.Holders:
        """Which tasks get which file."""
        if self._holders is None:
            tables = {name: self.image(name, files_pb2.FdTable) for _, _, name in self.tables()}
            files = self.image("files", files_pb2.Files) if "files" in self.names else None
            spaces = {process.mm: self.mm(process) for process in self.processes.values() if process.mm}
            self._holders = who_gets.find(self.processes, tables, files, spaces)
        return self._holders

    def give(self, batch: Batch, local_fd: int) -> Ref:
        """Add to `batch` the arrival of a descriptor of snap's: the same file description, in the stub.

        The kernel sets close-on-exec on it; use dup3 (or fcntl) to choose number and flag.
        """
        return batch.call("pidfd_getfd", self.supervisor_fd, local_fd, 0)
