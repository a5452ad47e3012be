"""What is around a living job that is going to be killed: its parent, whoever supervises it, its terminal.

Killing the root of a job is an event for others. A terminal hangs up when the leader of its session dies; a parent that waits goes on with
its next command or starts another one; a zombie keeps its pid until its parent reaps it, and the job cannot come back under that pid
before. All of it is looked at here, before anything is killed. The result is a list of Obstacle values: those whose option was not given
make a refusal, the others warnings. Reads /proc only; `judge` is pure.

The parent of a restored job is the nearest subreaper of snap, or init. If that is the parent already, nothing changes for it.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace

from checkpoint.environment import Holder, Survey, holder_of, processes
from checkpoint.kernel import proc, waits
from checkpoint.kernel.waits import Told, Waits
from snapshotter.base.errors import SnapshotterError
from snapshotter.base.obstacles import Obstacle

HANG_UP = "hang-up"
DETACH = "detach-from-parent"
_ZOMBIE_S = 0.4
_POLL_S = 0.02
_MOST_ENVIRONMENT = 1 << 20
_SHELL = re.compile(r"(ba|da|z|k|mk|pdk|tc|c|fi|a)?sh(\.[a-z]+)?")


@dataclass(frozen=True, slots=True)
class Parent:
    """What is known of the parent of a process that is going to be killed."""

    pid: int
    comm: str
    stopped: bool = False
    heir: bool = False
    """The restored job will be its child too (it is init, the nearest subreaper of snap, or snap itself)."""
    above: bool = False
    """It is an ancestor of snap: the rollback was started from there."""
    waits: Waits = ""
    told: Told = ""
    zombie: int = 0
    """A child of it that ended a while ago and was not reaped; 0: none."""
    background: bool = False
    """It is a shell with job control, and the process is not the job in front."""
    shell: bool = False
    younger: bool = False
    """It is a shell, and started another child after the process: the one that it waits for."""


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What killing the old job does to others."""

    obstacles: tuple[Obstacle, ...] = ()
    notes: tuple[str, ...] = ()
    """Harmless, and worth saying: a shell that loses a job in its background."""


def look(found: Survey, root_pid: int) -> Surroundings:
    """What killing the processes of `found.old` does to others; nothing, when there are none.

    Args:
        found: the survey; `old` are the processes to be killed.
        root_pid: the root of the job: it may be what a service manager has started.
    """
    obstacles: list[Obstacle] = []
    notes: list[str] = []
    line = _own_line()
    for holder in found.old.values():
        if holder.state in "ZX":
            continue
        if holder.pid == holder.sid and holder.tty:
            obstacles.append(_hangs_up(holder))
        parent = holder_of(holder.ppid) if holder.ppid and holder.ppid not in found.old else None
        if parent is not None:
            known = _describe(holder, parent, found, line)
            reasons = judge(holder, known)
            obstacles += reasons
            if not reasons and not known.heir and known.told != "ignored":
                notes.append(_reported(holder, known))
    root = found.old.get(root_pid)
    if root is not None and (unit := _unit_of(root.pid)) is not None:
        obstacles.append(_service(root, unit))
    return Surroundings(tuple(obstacles), tuple(notes))


def of_a_kill(root_pid: int, pids: Iterable[int]) -> list[str]:
    """What a take that kills these processes afterwards does to others, as warnings: whoever says --kill has decided."""
    there = processes()
    found = Survey(there, os.getsid(0), os.getpgid(0), {pid: there[pid] for pid in pids if pid in there})
    return [f"task {one.pid}: {one.what}" for one in look(found, root_pid).obstacles]


def judge(child: Holder, parent: Parent) -> list[Obstacle]:
    """The rule: what a parent does when this child of it dies."""
    name = f"its parent, process {parent.pid} ({parent.comm}),"
    if parent.heir:
        return []
    if parent.stopped:
        return [
            Obstacle(
                "parent_stopped",
                child.pid,
                f"{name} is stopped: it cannot reap the process, whose pid would stay taken",
                f"let it go on (kill -CONT {parent.pid}), then roll back",
            )
        ]
    if parent.zombie and parent.told != "ignored":
        return [
            Obstacle(
                "parent_does_not_reap",
                child.pid,
                f"{name} does not reap its children (process {parent.zombie} is a zombie of its): the pid would stay taken",
                f"end process {parent.pid} first; init then takes the job over",
            )
        ]
    detach = f"--{DETACH} kills it all the same: the restored job is a child of init, and its old parent knows nothing of it"
    harmless = parent.background or parent.younger or parent.above
    if harmless and (parent.waits or parent.told):
        return []
    if parent.waits:
        return [
            Obstacle(
                "supervised",
                child.pid,
                f"{name} waits for it, and goes on when it dies: a shell runs the next command, a supervisor starts another one",
                detach,
                DETACH,
            )
        ]
    if parent.told == "ignored" and (parent.shell or parent.above):
        return []
    if parent.told == "ignored":
        return [
            Obstacle(
                "supervised",
                child.pid,
                f"{name} ignores SIGCHLD and is no shell: it may look for the pid from time to time, and start another one when it is gone",
                detach,
                DETACH,
            )
        ]
    if parent.told:
        return [
            Obstacle(
                "supervised",
                child.pid,
                f"{name} is told when it dies ({_TOLD[parent.told]}): a supervisor starts another one then",
                detach,
                DETACH,
            )
        ]
    return [
        Obstacle(
            "parent_may_not_reap",
            child.pid,
            f"{name} neither waits for it nor is told when it dies: until it reaps the process, its pid stays taken",
            f"end process {parent.pid} first, and init takes the job over; --{DETACH} tries it, and may leave the job dead",
            DETACH,
        )
    ]


_TOLD = {
    "handler": "it handles SIGCHLD",
    "signalfd": "it has a signalfd",
    "pidfd": "it has a pidfd of it",
}


def _reported(child: Holder, parent: Parent) -> str:
    unknown = ": that shell's fg, wait and jobs do not know it" if parent.shell else ""
    return (
        f"process {parent.pid} ({parent.comm}), the parent, sees the old process {child.pid} as killed; the restored job is a child "
        f"of init{unknown}"
    )


def _hangs_up(leader: Holder) -> Obstacle:
    return Obstacle(
        "terminal_leader",
        leader.pid,
        f"it ({leader.comm}) leads the session on {_terminal_name(leader.tty)}: killing it hangs that terminal up, and what holds "
        "its other side (tmux, an ssh connection, a terminal window) closes it",
        f"--{HANG_UP} kills it all the same: the restored job has the terminal if it is still there, else /dev/null",
        HANG_UP,
    )


def _terminal_name(tty: int) -> str:
    """By the numbers of Documentation/admin-guide/devices.txt; tty_nr of proc_pid_stat(5)."""
    major, minor = tty >> 8 & 0xFFF, (tty & 0xFF) | (tty >> 12 & 0xFFF00)
    if 136 <= major < 144:
        return f"/dev/pts/{(major - 136) * 256 + minor}"
    return f"/dev/tty{minor}" if major == 4 and minor < 64 else f"terminal {major}:{minor}"


def _describe(child: Holder, parent: Holder, found: Survey, line: frozenset[int]) -> Parent:
    above = parent.pid in line
    known = Parent(parent.pid, parent.comm, stopped=parent.state in "Tt", above=above)
    if parent.pid in {1, os.getpid()} or parent.comm == "systemd":
        return replace(known, heir=True)  # systemd is asked by _unit_of
    if above and parent.pid == waits.nearest_reaper():
        return replace(known, heir=True)
    if known.stopped:
        return known
    return replace(
        known,
        waits=waits.waits_for(parent.pid, child.pid),
        told=waits.told_of(parent.pid, child.pid),
        zombie=_unreaped(parent.pid, found),
        background=bool(
            child.tty
            and child.sid == parent.sid
            and child.tty == parent.tty
            and child.pgid not in {parent.pgid, child.front}
        ),
        shell=(shell := _is_shell(parent.pid)),
        younger=shell and _has_younger(parent, child, found.processes),
    )


def _is_shell(pid: int) -> bool:
    try:
        return _SHELL.fullmatch(os.path.basename(os.readlink(f"/proc/{pid}/exe"))) is not None
    except OSError:
        return False


def _has_younger(parent: Holder, child: Holder, all_of_them: dict[int, Holder]) -> bool:
    """Whether it started another command a while later, which is then the one in front.

    What began in the same second may be the rest of a pipeline: the shell waits for all of it.
    """
    later = child.start_time_ticks + os.sysconf("SC_CLK_TCK")
    return any(
        other.ppid == parent.pid and other.state not in "ZX" and other.start_time_ticks > later
        for other in all_of_them.values()
    )


def _unreaped(parent: int, found: Survey) -> int:
    """A zombie child that stays for a while; 0: none does."""
    deadline = time.monotonic() + _ZOMBIE_S
    dead = {one.pid for one in found.processes.values() if one.ppid == parent and one.state in "ZX"}
    while dead:
        dead = {pid for pid in dead if _is_zombie(pid, parent)}
        if dead and time.monotonic() > deadline:
            return min(dead)
        if dead:
            time.sleep(_POLL_S)
    return 0


def _is_zombie(pid: int, parent: int) -> bool:
    holder = holder_of(pid)
    if holder is None or holder.ppid != parent or holder.state not in "ZX":
        return False
    try:
        return len(os.listdir(f"/proc/{pid}/task")) == 1  # else only its first thread has ended
    except OSError:
        return False


def _own_line() -> frozenset[int]:
    """The ancestors of snap."""
    line: set[int] = set()
    pid = os.getppid()
    while pid > 0 and pid not in line:
        line.add(pid)
        try:
            pid = proc.read_stat(pid).ppid
        except (OSError, SnapshotterError):
            break
    return frozenset(line)


# -- systemd ----------------------------------------------------------------------------------------------------


def _unit_of(pid: int) -> str | None:
    """The service whose main process this is; None: it is not one.

    systemd tells each process that it starts its own pid (SYSTEMD_EXEC_PID, systemd.exec(5)); children inherit the number of another.
    """
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            environment = file.read(_MOST_ENVIRONMENT).split(b"\0")
        with open(f"/proc/{pid}/cgroup", encoding="utf-8", errors="replace") as file:
            groups = file.read()
    except OSError:
        return None
    if b"SYSTEMD_EXEC_PID=%d" % pid not in environment:
        return None
    return service_of(groups) or "a unit of systemd"


def service_of(groups: str) -> str:
    """The innermost service of a /proc/PID/cgroup; "" if there is none."""
    names: Iterable[str] = (
        name for line in groups.splitlines() for name in line.partition(":/")[2].split("/")
    )
    services = [name for name in names if name.endswith(".service")]
    return services[-1] if services else ""


def _service(root: Holder, unit: str) -> Obstacle:
    return Obstacle(
        "service",
        root.pid,
        f"it is the main process of {unit}: when it dies, systemd ends the unit's other processes, and starts another one if the unit "
        "has Restart=",
        f"--{DETACH} kills it all the same: the restored job is a child of init, and systemctl knows nothing of it",
        DETACH,
    )
