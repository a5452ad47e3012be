"""The order in which stub processes are made so that parents, sessions and groups come out right. Pure.

Owns the reasoning; makes no process. `plan_tree` turns "who is whose child, in which session and group" into
a list of steps, each of which one stub can do, and simulates them as it goes, so that what cannot be reached
is found before anything is touched.

What the kernel allows, and therefore what the plan is made of:
- a session is inherited by fork and left only by setsid, which makes a new one with the caller's own pid. So
  a child that is in its parent's *former* session is forked before the parent's setsid;
- a child that is in a session its parent was never in was adopted: it is made by a member of that session that
  is a child of the same parent (a sibling, CLONE_PARENT), or by a helper below one that then exits, which hands
  it to the nearest subreaper, as it happened to the job;
- a session or group whose leader is dead keeps its number: a helper with that pid makes it, and leaves once
  the members are there;
- setpgid is done by each process itself, once the whole tree stands;
- a descriptor table, or a working directory, that processes share is passed on at birth (sharing.py): who only passes
  it on leaves it when the whole tree stands.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from checkpoint.model.sharing import Sharing, shared_only


@dataclass(frozen=True, slots=True)
class TreeProcess:
    """One process of the job, as dumped."""

    pid: int
    ppid: int
    pgid: int
    sid: int
    zombie: bool = False
    exit_signal: int = 17
    subreaper: bool = False
    files: int = 0
    """A number for its descriptor table: those with the same one share it. 0: nobody does."""
    fs: int = 0
    """The same for working directory, root and umask."""


@dataclass(frozen=True, slots=True)
class SpawnRoot:
    """The root stub, child of the nearest subreaper or init."""

    pid: int

    def __str__(self) -> str:
        return f"spawn {self.pid}"


@dataclass(frozen=True, slots=True)
class Fork:
    """`maker` clones `pid`; with `sibling` the new process gets maker's parent (CLONE_PARENT).

    A pid below 0 names a helper that may have any free number.
    """

    maker: int
    pid: int
    exit_signal: int = 17
    sibling: bool = False
    helper: bool = False
    files: bool = False
    fs: bool = False

    def __str__(self) -> str:
        kind = "helper " if self.helper else ""
        sibling = " as its sibling" if self.sibling else ""
        return f"{self.maker} forks {kind}{self.pid}{sibling}{_with(self.files, self.fs)}"


@dataclass(frozen=True, slots=True)
class Unshare:
    """`pid` leaves what it shares for a copy of its own."""

    pid: int
    files: bool
    fs: bool

    def __str__(self) -> str:
        return f"{self.pid} unshare{_with(self.files, self.fs)}"


def _with(files: bool, fs: bool) -> str:
    names = [name for name, on in (("descriptors", files), ("directories", fs)) if on]
    return " with its " + " and ".join(names) if names else ""


@dataclass(frozen=True, slots=True)
class Subreaper:
    """`pid` sets PR_SET_CHILD_SUBREAPER to `on`, for the time of the plan."""

    pid: int
    on: bool

    def __str__(self) -> str:
        return f"{self.pid} child_subreaper={int(self.on)}"


@dataclass(frozen=True, slots=True)
class SetSid:
    """`pid` calls setsid."""

    pid: int

    def __str__(self) -> str:
        return f"{self.pid} setsid"


@dataclass(frozen=True, slots=True)
class SetPgid:
    """`pid` calls setpgid(0, pgid)."""

    pid: int
    pgid: int

    def __str__(self) -> str:
        return f"{self.pid} setpgid {self.pgid}"


@dataclass(frozen=True, slots=True)
class HelperExit:
    """The helper exits and `reaper` waits for it; its children go to the nearest subreaper."""

    pid: int
    reaper: int

    def __str__(self) -> str:
        return f"helper {self.pid} exits, {self.reaper} reaps it"


@dataclass(frozen=True, slots=True)
class Die:
    """`pid` becomes the zombie it was."""

    pid: int

    def __str__(self) -> str:
        return f"{self.pid} becomes a zombie"


Step = SpawnRoot | Fork | Unshare | Subreaper | SetSid | SetPgid | HelperExit | Die


@dataclass(frozen=True, slots=True)
class TreePlan:
    """Steps in order, the pids that helpers need, and what does not come out as it was."""

    steps: tuple[Step, ...]
    helper_pids: tuple[int, ...]
    warnings: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join(str(step) for step in self.steps)


class TreeError(ValueError):
    """The processes are not one tree."""


@dataclass(slots=True)
class _Sim:
    """Where a stub stands while the plan is being made."""

    sid: int
    pgid: int
    parent: int
    alive: bool = True


@dataclass(slots=True)
class _Planner:
    processes: dict[int, TreeProcess]
    root: int
    sims: dict[int, _Sim] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    helpers: dict[int, int] = field(default_factory=dict)
    """helper -> who must reap it."""
    next_helper: int = -1
    files: Sharing = field(init=False)
    fs: Sharing = field(init=False)

    def __post_init__(self) -> None:
        parents = {pid: process.ppid for pid, process in self.processes.items() if pid != self.root}
        files = {pid: process.files for pid, process in self.processes.items() if process.files}
        fs = {pid: process.fs for pid, process in self.processes.items() if process.fs}
        self.files = Sharing("descriptor table", shared_only(files, files), parents)
        self.fs = Sharing("working directory", shared_only(fs, fs), parents)

    # -- relations --------------------------------------------------------------------------------------

    def ancestors(self, pid: int) -> list[int]:
        chain = []
        while pid != self.root:
            pid = self.processes[pid].ppid
            chain.append(pid)
        return chain

    def needs(self, order: list[int], children: dict[int, list[int]]) -> dict[int, set[int]]:
        """Pid -> sessions it should be born in (empty: any), children before parents."""
        below: dict[int, set[int]] = {}
        needs: dict[int, set[int]] = {}
        for pid in reversed(order):
            process = self.processes[pid]
            below[pid] = {pid}.union(*(below[child] for child in children[pid]))
            if process.sid != pid:
                needs[pid] = {process.sid}
                continue
            wanted = set().union(*(needs[child] for child in children[pid]))
            # A living descendant's session cannot be one that this process was born in: those were adopted.
            needs[pid] = wanted - below[pid]
        return needs

    # -- steps ------------------------------------------------------------------------------------------

    def in_order(self, parent: int, children: list[int]) -> list[int]:
        """Children, those first that must share what the parent leaves for another."""
        if not self.files.born and not self.fs.born:
            return children
        return sorted(children, key=lambda pid: (self.files.rank(parent, pid), self.fs.rank(parent, pid)))

    def fork(
        self,
        maker: int,
        pid: int,
        exit_signal: int,
        *,
        sibling: bool = False,
        helper: bool = False,
        like: int = 0,
    ) -> None:
        """`like`: the process that a helper will make."""
        source = self.sims[maker]
        parent = source.parent if sibling else maker
        leave_files, files = self.files.fork(maker, pid, like or pid)
        leave_fs, fs = self.fs.fork(maker, pid, like or pid)
        if leave_files or leave_fs:
            self.steps.append(Unshare(maker, leave_files, leave_fs))
        self.steps.append(Fork(maker, pid, exit_signal, sibling, helper, files, fs))
        self.sims[pid] = _Sim(source.sid, source.pgid, parent)
        if helper:
            self.helpers[pid] = parent

    def setsid(self, pid: int) -> None:
        sim = self.sims[pid]
        sim.sid = sim.pgid = pid
        self.steps.append(SetSid(pid))

    def setpgid(self, pid: int, pgid: int) -> None:
        self.sims[pid].pgid = pgid
        self.steps.append(SetPgid(pid, pgid))

    def adopt(self, process: TreeProcess, born: int) -> bool:
        """Make a child in a session that its parent is not in. False: not yet (the session has nobody)."""
        parent = process.ppid
        if born not in self.processes and born not in self.sims:
            # The leader is dead: a helper with its pid makes the session.
            self.fork(parent, born, 17, helper=True, like=process.pid)
            self.setsid(born)
        siblings = [
            pid for pid, sim in self.sims.items() if sim.alive and sim.sid == born and sim.parent == parent
        ]
        if siblings:
            pid = process.pid
            able = [one for one in siblings if self.files.can(one, pid) and self.fs.can(one, pid)]
            self.fork((able or siblings)[0], pid, process.exit_signal, sibling=True)
            return True
        members = [
            pid for pid, sim in self.sims.items() if sim.alive and sim.sid == born and pid in self.processes
        ]
        for member in members:
            chain = self.ancestors(member)
            if parent not in chain:
                continue
            between = [pid for pid in chain[: chain.index(parent)] if pid in self.sims]
            if any(isinstance(step, Subreaper) and step.on and step.pid in between for step in self.steps):
                continue
            helper = self.next_helper
            self.next_helper -= 1
            self.steps.append(Subreaper(parent, on=True))
            self.fork(member, helper, 17, helper=True, like=process.pid)
            self.fork(helper, process.pid, process.exit_signal)
            self.leave(helper)
            self.steps.append(Subreaper(parent, on=False))
            self.sims[process.pid].parent = parent
            return True
        return False

    def unshare(self) -> None:
        """Everybody leaves what it has only passed on."""
        files, fs = self.files.leave(), self.fs.leave()
        self.steps += [Unshare(pid, pid in files, pid in fs) for pid in sorted(files | fs)]

    def leave(self, helper: int) -> None:
        self.steps.append(HelperExit(helper, self.helpers.pop(helper)))
        self.sims[helper].alive = False


def plan_tree(
    processes: Iterable[TreeProcess], root_pid: int, *, root_sid: int = 0, root_pgid: int = 0
) -> TreePlan:
    """The steps that rebuild this tree.

    Args:
        processes: the job, in any order; sessions and groups already mapped (see `map_outside`).
        root_pid: the one whose parent is not in the job.
        root_sid: the session that the root stub is born in (snap's own); 0: one that nobody of the job is in.
        root_pgid: the group that it is born in.

    Raises:
        TreeError: not one tree below root_pid.
        SharingError: a table is shared in a way that cannot be had by making processes.
    """
    by_pid = {process.pid: process for process in processes}
    order, children = _parents_first(by_pid, root_pid)
    planner = _Planner(by_pid, root_pid)
    needs = planner.needs(order, children)
    planner.steps.append(SpawnRoot(root_pid))
    planner.sims[root_pid] = _Sim(root_sid, root_pgid, 0)
    deferred = _make_all(planner, order, children, needs)
    while deferred:
        pid, born = deferred.pop(0)
        # Nobody can bring it into that session: it lives in its parent's, which is said.
        process = by_pid[pid]
        planner.fork(process.ppid, pid, process.exit_signal)
        planner.warnings.append(
            f"task {pid}: session {born} cannot be rebuilt, it gets session {planner.sims[pid].sid}"
        )
        deferred += _make_all(planner, [pid], children, needs)
    _make_groups(planner)
    for helper in list(planner.helpers):
        planner.leave(helper)
    planner.unshare()
    planner.steps += [Die(pid) for pid in reversed(order) if by_pid[pid].zombie]
    helper_pids = {
        step.pid for step in planner.steps if isinstance(step, Fork) and step.helper and step.pid > 0
    }
    return TreePlan(tuple(planner.steps), tuple(sorted(helper_pids)), tuple(planner.warnings))


def map_outside(
    processes: Iterable[TreeProcess], root_pid: int, *, keep_sid: bool, keep_pgid: bool
) -> tuple[list[TreeProcess], list[str]]:
    """Replace the session and group that the root had from outside the job, unless they can be kept.

    The root becomes leader of a session (or group) of its own, and every process that shared the old one
    shares the new one.
    """
    processes = list(processes)
    pids = {process.pid for process in processes}
    root = next(process for process in processes if process.pid == root_pid)
    warnings = []
    sids: dict[int, int] = {}
    pgids: dict[int, int] = {}
    if root.sid not in pids and not keep_sid:
        sids[root.sid] = root_pid
        # setsid makes the root its own group's leader; whoever shared its group goes with it.
        if root.pgid != root_pid:
            pgids[root.pgid] = root_pid
        warnings.append(
            f"session {root.sid} is not part of the job: task {root_pid} becomes leader of a new session"
        )
    elif root.pgid not in pids and not keep_pgid:
        pgids[root.pgid] = root_pid
        warnings.append(
            f"process group {root.pgid} is not part of the job: task {root_pid} becomes leader of a new one"
        )
    mapped = [
        replace(
            process,
            pgid=pgids.get(process.pgid, process.pgid),
            sid=sids.get(process.sid, process.sid),
        )
        for process in processes
    ]
    return mapped, warnings


def _parents_first(by_pid: dict[int, TreeProcess], root_pid: int) -> tuple[list[int], dict[int, list[int]]]:
    if root_pid not in by_pid:
        raise TreeError(f"the root {root_pid} is missing")
    children: dict[int, list[int]] = {pid: [] for pid in by_pid}
    for process in by_pid.values():
        if process.pid != root_pid:
            if process.ppid not in by_pid:
                raise TreeError(f"task {process.pid}: its parent {process.ppid} is missing")
            children[process.ppid].append(process.pid)
    order = [root_pid]
    for pid in order:
        order.extend(sorted(children[pid]))
    if len(order) != len(by_pid):
        raise TreeError("the processes are not one tree")
    for pid in order:
        if by_pid[pid].zombie and children[pid]:
            raise TreeError(f"task {pid} is a zombie with children")
    return order, children


def _born(planner: _Planner, pid: int, needs: dict[int, set[int]]) -> int | None:
    """The session to be born in; None: any. Prefers what the parent is in before or after its setsid."""
    wanted = needs[pid]
    if not wanted:
        return None
    parent = planner.processes[pid].ppid
    for sid in (planner.sims[parent].sid, planner.processes[parent].sid):
        if sid in wanted:
            return sid
    return min(wanted)


def _make_all(
    planner: _Planner,
    order: list[int],
    children: dict[int, list[int]],
    needs: dict[int, set[int]],
) -> list[tuple[int, int]]:
    """Fork everything reachable; returns (pid, session) of those whose session nobody can give."""
    queue = [order[0]]
    waiting: list[tuple[int, int]] = []
    while queue or waiting:
        progress = False
        while queue:
            pid = queue.pop(0)
            progress = True
            process = planner.processes[pid]
            late: list[int] = []
            for child in planner.in_order(pid, children[pid]):
                born = _born(planner, child, needs)
                if born == planner.sims[pid].sid:
                    planner.fork(pid, child, planner.processes[child].exit_signal)
                    queue.append(child)
                else:
                    late.append(child)
            if process.sid == pid and planner.sims[pid].sid != pid:
                planner.setsid(pid)
            for child in late:
                born = _born(planner, child, needs)
                if born is None or born == planner.sims[pid].sid:
                    planner.fork(pid, child, planner.processes[child].exit_signal)
                    queue.append(child)
                else:
                    waiting.append((child, born))
        for child, born in list(waiting):
            if planner.adopt(planner.processes[child], born):
                waiting.remove((child, born))
                queue.append(child)
                progress = True
        if not progress:
            break
    return waiting


def _make_groups(planner: _Planner) -> None:
    targets = {pid: process.pgid for pid, process in planner.processes.items()}
    wanted = {pgid for pid, pgid in targets.items() if planner.sims[pid].pgid != pgid}
    for pgid in sorted(wanted):
        members = [
            pid for pid, target in targets.items() if target == pgid and planner.sims[pid].pgid != pgid
        ]
        sid = planner.sims[members[0]].sid
        if pgid in planner.sims and planner.sims[pgid].alive:
            if planner.sims[pgid].pgid != pgid and planner.sims[pgid].sid == sid:
                planner.setpgid(pgid, pgid)
        elif not any(sim.alive and sim.pgid == pgid for sim in planner.sims.values()):
            # The group's leader is dead: a helper with its pid makes the group.
            planner.fork(members[0], pgid, 17, helper=True)
            planner.setpgid(pgid, pgid)
    for pid in sorted(targets, key=lambda pid: pid in wanted):
        pgid = targets[pid]
        if planner.sims[pid].pgid == pgid:
            continue
        exists = any(
            sim.alive and sim.pgid == pgid and sim.sid == planner.sims[pid].sid
            for sim in planner.sims.values()
        )
        if not exists or planner.sims[pid].sid == pid:
            planner.warnings.append(
                f"task {pid}: process group {pgid} cannot be rebuilt, it stays in {planner.sims[pid].pgid}"
            )
            continue
        planner.setpgid(pid, pgid)
