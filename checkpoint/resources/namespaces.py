"""Namespaces: a point has none, so every thread of a job must be in those of snap.

Owns the refusal, at the look and again in the frozen window, and what to do instead. A thread may have left those of its process
(setns(2), unshare(2)), all but the user namespace. Only for a whole job that shares a namespace is there a way: to run snap in it.

Also refused is the first process of a pid namespace, which cannot be made again: orphans of the namespace become its children, the
keeper of a tracker that a take leaves running among them, and its end is the end of all others.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping

from checkpoint.kernel import proc
from snapshotter.base.errors import Finding, TargetGoneError, UnsupportedError, wrap_os_error

_OPTIONS = {
    "cgroup": "-C",
    "ipc": "-i",
    "mnt": "-m",
    "net": "-n",
    "pid": "-p -m",
    "time": "-T",
    "uts": "-u",
}
"""Those of nsenter(1). A process in a pid namespace is only found through the /proc of that namespace, which is in a mount namespace."""
_WHAT = "is in another {} namespace than snap"
_OF_THREADS = tuple(name for name in proc.NAMESPACES if name not in {"user", "pid", "time"})
"""Those that one thread can leave by itself: setns(2), unshare(2)."""


def look(pid: int, tids: Iterable[int], report: list[Finding]) -> None:
    """Adds each namespace that is not snap's own. The process may be running."""
    try:
        foreign = _foreign(pid, pid, proc.NAMESPACES, _own())
    except PermissionError as error:
        # The kernel says so of a task that was reaped in this moment as well (proc_ns_readlink): its stat is gone, too.
        if proc.read_stat(pid).is_zombie:
            raise TargetGoneError("ended while it was looked at", where=f"task {pid}") from error
        hint = "run as root or as the user of the job"
        raise wrap_os_error(error, "cannot see its namespaces", where=f"task {pid}", hint=hint) from error
    for name, link in foreign.items():
        report.append(Finding(pid, f"namespace {link}", _WHAT.format(name), _hint(pid, name)))
    report += of_threads(pid, (tid for tid in tids if tid != pid), foreign)


def of_threads(pid: int, tids: Iterable[int], known: Iterable[str] = ()) -> list[Finding]:
    """A finding for each thread that is not in snap's namespaces, those named in `known` apart."""
    found = []
    own = _own()
    for tid in tids:
        try:
            foreign = _foreign(pid, tid, _OF_THREADS, own)
        except (OSError, TargetGoneError):
            continue  # it has ended
        for name, link in foreign.items():
            if name not in known:
                what = f"{_WHAT.format(name)} ({link})"
                found.append(
                    Finding(pid, f"thread {tid}", what, "let it go back to that of its process first")
                )
    return found


def check_user(pid: int) -> None:
    """In the frozen window: whose rights would be mistaken. Capabilities in a user namespace of its own are none outside of it.

    Raises:
        UnsupportedError: the process has left snap's user namespace since the look.
    """
    if foreign := _foreign(pid, pid, ("user",), _own(("user",))):
        finding = Finding(pid, f"namespace {foreign['user']}", _WHAT.format("user"), _hint(pid, "user"))
        raise UnsupportedError.of([finding], pid)


def _own(names: Iterable[str] = proc.NAMESPACES) -> dict[str, str]:
    """Name -> link of snap's own, of those kinds that this kernel has."""
    found = {}
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            found[name] = os.readlink(f"/proc/self/ns/{name}")
    return found


def _foreign(pid: int, tid: int, names: Iterable[str], own: Mapping[str, str]) -> dict[str, str]:
    """Name -> link of the namespaces of a thread that are not snap's own."""
    found = {}
    for name in names:
        if name not in own:
            continue
        try:
            theirs = os.readlink(f"/proc/{pid}/task/{tid}/ns/{name}")
        except (FileNotFoundError, ProcessLookupError):
            raise TargetGoneError("ended while it was looked at", where=f"task {tid}") from None
        if theirs != own[name]:
            found[name] = theirs
    return found


def _hint(pid: int, name: str) -> str:
    if name == "user":
        return (
            "start the job outside of that user namespace: snap in it may not make tasks with their old pids"
        )
    if name.endswith("_for_children"):
        return "take a point of its children, from inside of their namespace"
    inside = " PID, by its number there and not of number 1" if name == "pid" else f" {pid}"
    return (
        f"if all of the job shares it, run snap in it: nsenter -t {pid} {_OPTIONS[name]} snap take{inside}; "
        "a rollback needs the same, while it is there"
    )


def look_root(pid: int, report: list[Finding]) -> None:
    """The first process of snap's own pid namespace is none to be taken."""
    if pid == 1:
        what = "is the first process of this pid namespace, which a rollback could not make again without ending all others"
        report.append(Finding(pid, "task", what, "take a point of one of its children"))
