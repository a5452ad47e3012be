"""What one dump knows while it runs: the frozen job, the parent point, options, and the result.

Owns the dataclasses that freeze.py fills, the resources read and dump.py turns into a result. No I/O
except the lazy infection of a frozen task. Nothing here knows the store.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from snapshotter.base import faults

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from checkpoint.kernel.cut_short import Rest
    from checkpoint.kernel.mem import ProcMem
    from checkpoint.kernel.proc import Stat, Status
    from checkpoint.kernel.ptrace import Regs
    from checkpoint.kernel.threads import ThreadFacts
    from checkpoint.parasite import RemoteTask
    from checkpoint.resources.landlock import Bystanders
    from snapshotter.base.pages import PageSink, PageSource, Run


def _no_bystanders() -> Bystanders:
    from checkpoint.resources.landlock import Bystanders

    return Bystanders()


ProcessState = Literal["running", "stopped", "zombie"]


@dataclass(slots=True, eq=False)
class FrozenTask:
    """One seized and stopped task (a thread or a thread group leader)."""

    tid: int
    pid: int
    """The thread group it belongs to."""
    regs: Regs
    """As they were at the stop; the parasite puts exactly these back."""
    sigmask: int
    start_time_ticks: int
    facts: ThreadFacts
    """What else was read of it at the stop."""
    places: list[tuple[int, int]]
    """(rip, rsp) of every thread of its process at the stop."""
    remote: RemoteTask | None = None
    """Set by the first infect(), cleared by the thaw."""
    group_stopped: bool = False
    """It was in a group-stop (SIGSTOP, SIGTSTP ...) when it was seized and goes back to it at the thaw."""
    stop_signal: int = 0
    """The signal of that group-stop."""
    rest: Rest | None = None
    """What is left of its system call, which the freeze has cut short."""
    wait_left_ms: int = 0
    """Until the timeout of its system call, which is restarted; 0: it has none that would begin anew."""

    def infect(self) -> RemoteTask:
        """The task as something that can run syscalls. Cured by the thaw."""
        if self.remote is None:
            from checkpoint.parasite import infect

            self.remote = infect(self)
            faults.point("dump.infected")
        return self.remote


@dataclass(slots=True, eq=False)
class FrozenProcess:
    """One process of the job with all of its threads stopped, or a zombie (which has none)."""

    pid: int
    leader: FrozenTask | None
    """None for a zombie: there is nothing left to seize."""
    threads: list[FrozenTask]
    """All of them, the leader first."""
    stat: Stat
    status: Status
    """/proc/PID/stat and status, read after the freeze."""
    mem: ProcMem | None
    """None for a zombie."""
    state: ProcessState = "running"
    stop_signal: int = 0
    start_time_ticks: int = 0
    brk: int = 0
    """Where its heap ends; set by task.dump_process."""
    used_io_uring: bool = False
    """A thread of it has used io_uring since its exec; set by task.dump_process."""

    @property
    def parasite(self) -> RemoteTask:
        """The leader as something that can run syscalls (infected at the first use)."""
        if self.leader is None:
            raise ValueError(f"task {self.pid} is a zombie: nothing can run in it")
        return self.leader.infect()

    @property
    def is_zombie(self) -> bool:
        """It has ended and waits for its parent."""
        return self.state == "zombie"


@dataclass(frozen=True, slots=True)
class ParentPoint:
    """What the engine needs to know of the point that the new one builds upon."""

    boot_id: str
    dump_uptime_ns: int
    tasks: Mapping[int, int]
    """pid (and tid) -> start time in ticks, as they were in the parent."""
    nonce: str
    """What the tracker called the instant of the parent's dump; "" when it had none."""
    images: Callable[[str], bytes]
    """A serialised image of the parent by name; raises KeyError or a SnapshotterError when absent."""
    has_space: Callable[[str], bool]
    """Whether the parent stores a page space of that name."""
    tracker: str = ""
    pages: PageSource | None = None
    """Its pages, for the oracle alone; None: it cannot compare what is inherited, and says so."""


@dataclass(frozen=True, slots=True)
class DumpOptions:
    """How a dump is to be made; every default is right for a job that is to go on."""

    after: Literal["run", "stop", "kill"] = "run"
    """What happens to the job: goes on (thawed before the commit), is left stopped, or is killed once committed."""
    tracker: Literal["auto", "write_protect", "soft_dirty", "compare"] = "auto"
    track: bool = True
    """False leaves no tracker behind: the next point reads everything."""
    precopy: bool = True
    frozen_budget_bytes: int = 64 << 20
    """More dirty memory than this is pre-copied once more instead of being copied in the frozen window."""
    max_rounds: int = 4
    """Pre-copy rounds at most; after them the window is as long as it must be."""
    max_tasks: int = 32768
    freeze_timeout_s: float = 10.0
    max_frozen_s: float = 5.0
    """A job that stands still for longer is let go, and the take fails; 0: never."""
    files: Literal["open", "none"] = "open"
    verify_pages: bool = False
    """Compare every page that is not read in the frozen window with the living memory (checkpoint/oracle.py)."""
    producer: str = "snap"
    extra: Mapping[str, Any] = field(default_factory=dict)
    """For resources: options of theirs by name."""


@dataclass(slots=True)
class DumpStats:
    """Measured while dumping; times in microseconds, wall clock."""

    nr_tasks: int = 0
    nr_processes: int = 0
    frozen_us: int = 0
    """First task interrupted to last task detached."""
    duration_us: int = 0
    """Everything, commit included."""
    pages_dirty: int = 0
    """Pages handed to the sink (read since the parent point or in full)."""
    pages_frozen: int = 0
    """Those of them that were copied in the frozen window."""
    pages_verified: int = 0
    """Pages that the oracle compared with the living memory."""
    pages_total: int = 0
    """Pages present in all spaces."""
    bytes_logical: int = 0
    rounds: int = 0
    phases_us: dict[str, int] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class DumpContext:
    """One dump under way: resources read the processes and add their images."""

    root_pid: int
    sink: PageSink
    parent: ParentPoint | None
    options: DumpOptions
    processes: dict[int, FrozenProcess] = field(default_factory=dict)
    """By pid, parents before children. Empty until the freeze."""
    images: dict[str, Message] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    _told: set[str] = field(default_factory=set)
    """The same warnings: a job with thousands of files may have one for each."""
    unconfined: list[str] = field(default_factory=list)
    """Those of them that a rollback tells again."""
    stats: DumpStats = field(default_factory=DumpStats)
    written: dict[int, list[Run] | None] = field(default_factory=dict)
    """pid -> pages its tracker saw written since the last collection; None or absent: unknown, all are dirty."""

    later: list[Callable[[], None]] = field(default_factory=list)
    """What is left to do after the thaw: images that are put together from what was read in the window."""

    bystanders: Bystanders = field(default_factory=_no_bystanders)
    """Whom the tasks are asked about, to find out about Landlock."""

    resources: dict[str, Any] = field(default_factory=dict)
    """What one resource must remember across processes, under its own name (shared memory objects, descriptions)."""

    def warn(self, text: str) -> None:
        """Add a warning once."""
        if text not in self._told:
            self._told.add(text)
            self.warnings.append(text)

    def warn_unconfined(self, text: str) -> None:
        """The same of something that confines a task and is not kept."""
        self.warn(text)
        if text not in self.unconfined:
            self.unconfined.append(text)

    def living(self) -> Iterator[FrozenProcess]:
        """The processes that are not zombies, parents first."""
        return (process for process in self.processes.values() if not process.is_zombie)


@dataclass(slots=True)
class DumpResult:
    """A finished dump, before its commit. `images` are serialised; pages are with the sink."""

    root_pid: int
    images: dict[str, bytes]
    stats: DumpStats
    warnings: list[str]
    boot_id: str
    dump_uptime_ns: int
    taken_at_ns: int
    tasks: dict[int, int]
    """tid -> start time in ticks, every task of the job."""
    tracker: str
    """The tracker that was armed by this dump: write_protect, soft_dirty or compare."""
    nonce: str
    """What that tracker calls the instant of this dump; "" = it cannot tell."""
