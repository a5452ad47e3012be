"""Which tasks of a job get which file at a restore, and with which rights each of them acts. Pure.

Owns the reasoning only: what a task may be given is resources/authority.py's. A file that several tasks get must be open to
each of them, since none may get through another what it could not open itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from images import files_pb2, mm_pb2, task_pb2

_CAP_SETUID = 1 << 7


@dataclass(frozen=True, slots=True, order=True)
class Rights:
    """What the kernel looks at when a task opens a file."""

    uid: int
    gid: int
    groups: tuple[int, ...] = ()
    capabilities: int = 0
    """Bits of the effective set."""

    def __str__(self) -> str:
        return f"user {self.uid}, group {self.gid}"


Task = tuple[Rights, ...]
"""One task: the rights that it has, then others that it can take on by itself (seteuid(2) to its real or saved user)."""
Who = frozenset[Task]
"""Every task that gets something."""


def rights_of(credentials: task_pb2.Credentials) -> Task:
    """The rights that a task can act with. Those that it uses now come first."""
    own = credentials
    uids = dict.fromkeys((own.fsuid, own.euid, own.ruid, own.suid))
    if own.cap_permitted & _CAP_SETUID:
        uids[0] = None
    gids = dict.fromkeys((own.fsgid, own.egid, own.rgid, own.sgid))
    groups = tuple(sorted(own.groups))
    return tuple(Rights(uid, gid, groups, own.cap_permitted) for uid in uids for gid in gids)


@dataclass(slots=True)
class Holders:
    """Who gets what, by the numbers and names of the images."""

    everybody: Who
    processes: dict[int, Who] = field(default_factory=dict)
    """pid -> its tasks, with those of processes that share its directories."""
    threads: dict[int, Who] = field(default_factory=dict)
    """tid of a thread with directories of its own -> those that share them."""
    spaces: dict[str, Who] = field(default_factory=dict)
    """Image name of an address space -> the tasks that run in it."""
    descriptions: dict[int, Who] = field(default_factory=dict)
    objects: dict[str, Who] = field(default_factory=dict)
    """Image name of a Shmem."""

    def of_description(self, number: int) -> Who:
        """The tasks that get a file description, or can take it out of a socket's queue. All of them, where nobody is known."""
        return self.descriptions.get(number) or self.everybody

    def of_object(self, name: str) -> Who:
        """The tasks that map a memory object, or have a descriptor of it."""
        return self.objects.get(name) or self.everybody

    def of_space(self, name: str) -> Who:
        """The tasks of an address space."""
        return self.spaces.get(name) or self.everybody

    def of_directories(self, tid: int) -> Who:
        """The tasks with the working directory and root of a process, or of a thread that has its own."""
        return self.threads.get(tid) or self.processes.get(tid) or self.everybody


def find(
    processes: Mapping[int, task_pb2.Process],
    tables: Mapping[str, files_pb2.FdTable],
    files: files_pb2.Files | None,
    spaces: Mapping[str, mm_pb2.Mm],
) -> Holders:
    """Work out who gets what.

    Args:
        processes: by pid.
        tables: descriptor tables by image name.
        files: None when the job has no descriptors.
        spaces: address spaces by image name.
    """
    living = {pid: one for pid, one in processes.items() if one.state != task_pb2.Process.ZOMBIE}
    tasks = {
        pid: frozenset(rights_of(thread.credentials) for thread in process.threads)
        for pid, process in living.items()
    }
    found = Holders(frozenset().union(*tasks.values()))
    _directories(found, living, tasks)
    users: dict[str, Who] = {}
    for pid, process in living.items():
        found.spaces[process.mm] = found.spaces.get(process.mm, frozenset()) | tasks[pid]
        for name in {process.files, *(thread.files for thread in process.threads)} - {""}:
            users[name] = users.get(name, frozenset()) | tasks[pid]
    _descriptions(found, users, tables, files)
    _objects(found, spaces, files)
    return found


def _directories(found: Holders, living: Mapping[int, task_pb2.Process], tasks: Mapping[int, Who]) -> None:
    for pid, process in living.items():
        first = process.fs_of or pid
        found.processes[first] = found.processes.get(first, frozenset()) | tasks[pid]
        for thread in process.threads:
            if thread.fs_of:
                own = frozenset({rights_of(thread.credentials)})
                found.threads[thread.fs_of] = found.threads.get(thread.fs_of, frozenset()) | own


def _descriptions(
    found: Holders,
    users: Mapping[str, Who],
    tables: Mapping[str, files_pb2.FdTable],
    files: files_pb2.Files | None,
) -> None:
    queue: list[tuple[int, Who]] = [
        (entry.description, who)
        for name, who in users.items()
        if name in tables
        for entry in tables[name].entries
    ]
    carried = {
        description.id: [number for message in description.unix.queue for number in message.descriptions]
        for description in (files.descriptions if files is not None else ())
        if description.HasField("unix") and description.unix.queue
    }
    while queue:  # a socket in flight may carry descriptors itself
        number, who = queue.pop()
        known = found.descriptions.get(number, frozenset())
        if who <= known:
            continue
        found.descriptions[number] = known | who
        queue += [(inner, known | who) for inner in carried.get(number, ())]


def _objects(found: Holders, spaces: Mapping[str, mm_pb2.Mm], files: files_pb2.Files | None) -> None:
    def add(names: Iterable[str], who: Who) -> None:
        for name in names:
            if name:
                found.objects[name] = found.objects.get(name, frozenset()) | who

    for space, mm in spaces.items():
        names = {vma.shmem for vma in mm.vmas} | {file.kept for file in mm.files} | {mm.exe_shmem}
        add(names, found.of_space(space))
    for description in files.descriptions if files is not None else ():
        if description.HasField("regular"):
            regular = description.regular
            add({regular.shmem, regular.kept}, found.of_description(description.id))
