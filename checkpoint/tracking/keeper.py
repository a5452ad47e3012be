"""Finding, starting and replacing the keeper: the small process that keeps tracking alive between takes.

Owns the state files (one per job, JSON) and the protocol with parasite_c/keeper.c. A state file is only a hint
where to look: what it says is believed when the keeper still is the process that was started (pid, start time,
boot id); descriptors are then fetched from it with pidfd_getfd. The nonce lives in a memfd of the keeper, so that it
dies with the tracking it speaks of.

A keeper takes over by itself (it renames its state file into place and ends the one before it), so that at whatever
instant snap dies, the state file names the one keeper that stays. Two would be one too many: the tracking that the
unnamed one holds could not be used, and would be in the way of any other.

State files lie in /run/snap/track (root) or below XDG_RUNTIME_DIR; the folder must belong to us and to us alone.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import signal
import socket
import stat
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from checkpoint.kernel import proc
from checkpoint.kernel import sys as ksys
from snapshotter.base import faults
from snapshotter.base.errors import SnapshotterError

BINARY = Path(__file__).resolve().parents[2] / "parasite_c" / "keeper.bin"
_MAX_TASKS = 16000
_NONCE_BYTES = 32
_HAND_OVER_S = 10.0


def state_dir() -> Path:
    """Where state files are, made if need be.

    Raises:
        SnapshotterError: the folder belongs to somebody else or others may write to it.
    """
    told = os.environ.get("SNAP_RUNTIME_DIR")
    if told:
        path = Path(told)
    elif os.geteuid() == 0:
        path = Path("/run/snap/track")
    elif runtime := os.environ.get("XDG_RUNTIME_DIR"):
        path = Path(runtime) / "snap" / "track"
    else:
        path = Path(tempfile.gettempdir()) / f"snap-{os.geteuid()}"
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = path.lstat()
    except OSError as error:
        raise SnapshotterError(
            f"cannot make {path}: {error.strerror}", hint="set SNAP_RUNTIME_DIR"
        ) from error
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise SnapshotterError(
            f"{path} is not a folder of ours alone", hint="remove it, or set SNAP_RUNTIME_DIR"
        )
    return path


@dataclass(slots=True)
class Kept:
    """Descriptors of ours that are the same as a keeper's: the nonce, and one userfaultfd per process."""

    tracker: str
    nonce_fd: int
    uffds: dict[int, int] = field(default_factory=dict)
    """pid -> descriptor here; only with write_protect."""
    tasks: dict[int, int] = field(default_factory=dict)
    """pid -> start time in ticks, of the processes that the keeper watches."""
    keeper_pidfd: int = -1

    @property
    def nonce(self) -> str:
        """What the last collect of these was called; "" when a take is under way or failed."""
        return os.pread(self.nonce_fd, _NONCE_BYTES, 0).rstrip(b"\0").decode("ascii", "replace")

    @nonce.setter
    def nonce(self, value: str) -> None:
        os.pwrite(self.nonce_fd, value.encode("ascii").ljust(_NONCE_BYTES, b"\0"), 0)

    def close(self) -> None:
        """Close our copies; the keeper has its own."""
        for fd in (self.nonce_fd, self.keeper_pidfd, *self.uffds.values()):
            if fd >= 0:
                with contextlib.suppress(OSError):
                    os.close(fd)
        self.nonce_fd = self.keeper_pidfd = -1
        self.uffds.clear()


class JobLock:
    """One take at a time may touch a job's tracking, whichever store it works for."""

    def __init__(self, root_pid: int) -> None:
        self.path = state_dir() / f"{root_pid}.lock"
        self._fd = -1

    def acquire(self) -> bool:
        """Whether we have it; never waits."""
        while True:
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Another may have removed the file between our open and our lock: then the lock says nothing.
                if os.fstat(fd).st_ino == self.path.stat().st_ino:
                    self._fd = fd
                    return True
            except BlockingIOError:
                os.close(fd)
                return False
            except FileNotFoundError:
                pass
            os.close(fd)

    def release(self) -> None:
        """Give it back; does nothing when we do not have it."""
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                self.path.unlink()
            os.close(self._fd)
            self._fd = -1


def state_path(root_pid: int) -> Path:
    """Where the state file of a job is."""
    return state_dir() / f"{root_pid}.json"


def find(root_pid: int, root_start: int, tracker: str) -> Kept | None:
    """Fetch what the keeper of this job holds; None when there is none that can be believed."""
    try:
        state = json.loads(state_path(root_pid).read_bytes())
        pid, start = int(state["keeper"]), int(state["keeper_start"])
        tasks = {int(task): (int(begun), int(uffd)) for task, (begun, uffd) in state["tasks"].items()}
        nonce_fd = int(state["nonce_fd"])
        identity = (state["boot_id"], int(state["root_start"]), state["tracker"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if identity != (proc.boot_id(), root_start, tracker):
        return None
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:
        return None
    kept = Kept(tracker, -1, keeper_pidfd=pidfd)
    try:
        # Read after the pidfd was opened: if it is the right process now, the pidfd is of the right process.
        if proc.read_stat(pid).start_time_ticks != start:
            raise OSError("the keeper is another process")
        kept.nonce_fd = ksys.pidfd_getfd(pidfd, nonce_fd)
        for task, (begun, uffd) in tasks.items():
            kept.tasks[task] = begun
            if uffd >= 0:
                with contextlib.suppress(OSError):  # the keeper closes those of processes that have ended
                    kept.uffds[task] = ksys.pidfd_getfd(pidfd, uffd)
    except (OSError, SnapshotterError):
        kept.close()
        return None
    return kept


def others(root_pid: int, tracker: str) -> dict[int, list[tuple[int, int]]]:
    """Which other jobs a process is tracked for: pid -> [(root pid, its start time in ticks)].

    A process can be part of two jobs, one inside the other.
    """
    found: dict[int, list[tuple[int, int]]] = {}
    for path in state_dir().glob("*.json"):
        try:
            root = int(path.stem)
            state = json.loads(path.read_bytes())
            if root == root_pid or state["tracker"] != tracker:
                continue
            for task in state["tasks"]:
                found.setdefault(int(task), []).append((root, int(state["root_start"])))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return found


def invalidate(root_pid: int, root_start: int, tracker: str) -> None:
    """Make the next take of a job read everything."""
    kept = find(root_pid, root_start, tracker)
    if kept is not None:
        kept.nonce = ""
        kept.close()


def end_others(root_pid: int, root_start: int, tracker: str) -> None:
    """End the keeper of any tracker but this one, and with it what that tracker left on the job.

    Nothing happens while another take of the job is under way. A keeper that does not end in time holds on to its tracking, which
    costs the job nothing but what tracking costs.
    """
    if not state_path(root_pid).exists():
        return
    lock = JobLock(root_pid)
    if not lock.acquire():
        return
    try:
        for name in ("write_protect", "soft_dirty"):
            kept = find(root_pid, root_start, name) if name != tracker else None
            if kept is None:
                continue
            try:
                # Our copies of its userfaultfds are closed first: the last one that is closed ends the registration.
                pidfd, kept.keeper_pidfd = kept.keeper_pidfd, -1
                kept.close()
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                if select.select([pidfd], [], [], _HAND_OVER_S)[0]:
                    state_path(root_pid).unlink(missing_ok=True)
            finally:
                os.close(pidfd)
    finally:
        lock.release()


def new(tracker: str) -> Kept:
    """Nothing kept yet: an empty nonce, no descriptors, no keeper."""
    fd = os.memfd_create("snap-nonce", os.MFD_CLOEXEC)
    os.ftruncate(fd, _NONCE_BYTES)
    return Kept(tracker, fd)


def keep(kept: Kept, root_pid: int, root_start: int, tasks: Mapping[int, int]) -> None:
    """Start a keeper for these descriptors in place of the one that there was.

    Args:
        kept: what it shall hold. Its keeper_pidfd is replaced.
        root_pid: the job.
        root_start: start time of the root in ticks.
        tasks: pid -> start time in ticks of the processes to wait for; those that have ended are left out.
    """
    pidfds: dict[int, int] = {}
    leash, other_end = socket.socketpair()
    try:
        for pid in list(tasks)[:_MAX_TASKS]:
            with contextlib.suppress(OSError):
                pidfds[pid] = os.pidfd_open(pid)
        if not pidfds:
            return
        path = state_path(root_pid)
        new = path.with_suffix(f".{os.getpid()}.tmp")
        old = kept.keeper_pidfd
        words = [f"{fd}:{kept.uffds[pid]}" if pid in kept.uffds else str(fd) for pid, fd in pidfds.items()]
        passed = [other_end.fileno(), kept.nonce_fd, *pidfds.values(), *kept.uffds.values()]
        passed += [old] if old >= 0 else []
        numbers = [str(other_end.fileno()), str(old) if old >= 0 else "-", str(kept.nonce_fd)]
        pid = _spawn(root_pid, [str(path), str(new), *numbers, *words], passed)
        other_end.close()
        faults.point("track.keeper")
        state = {
            "keeper": pid,
            "keeper_start": proc.read_stat(pid).start_time_ticks,
            "boot_id": proc.boot_id(),
            "root_start": root_start,
            "tracker": kept.tracker,
            "nonce_fd": kept.nonce_fd,
            "tasks": {task: (tasks[task], kept.uffds.get(task, -1)) for task in pidfds},
        }
        pidfd = os.pidfd_open(pid)
        try:
            _write(new, json.dumps(state).encode())
            faults.point("track.described")
            _hand_over(leash, path)
        except BaseException:
            os.close(pidfd)
            raise
        kept.keeper_pidfd = pidfd
        kept.tasks = {task: tasks[task] for task in pidfds}
        if old >= 0:
            os.close(old)
    finally:
        leash.close()
        other_end.close()
        for fd in pidfds.values():
            os.close(fd)


def _hand_over(leash: socket.socket, path: Path) -> None:
    """Let the new keeper put its state file in place and end the old one: it does both, whatever happens to us."""
    leash.settimeout(_HAND_OVER_S)
    try:
        leash.sendall(b"k")
        faults.point("track.kept")
        answered = leash.recv(1) == b"k"
    except OSError as error:
        raise SnapshotterError(f"the keeper does not answer: {error}", where=str(path)) from error
    if not answered:
        raise SnapshotterError(
            "the keeper could not write its state file", where=str(path), hint="is its folder writable?"
        )


def running() -> list[int]:
    """Roots of the jobs that have a keeper of this user's now."""
    found = []
    for path in state_dir().glob("*.json"):
        try:
            state = json.loads(path.read_bytes())
            if proc.read_stat(int(state["keeper"])).start_time_ticks == int(state["keeper_start"]):
                found.append(int(path.stem))
        except (OSError, ValueError, KeyError, TypeError, SnapshotterError):
            continue
    return sorted(found)


def _spawn(root_pid: int, words: list[str], fds: list[int]) -> int:
    """Run the keeper with these descriptors under the same numbers; its pid. `ps` shows what it is for."""
    ksys.allow_descriptors()
    try:
        done = subprocess.run(
            [f"snap: keeper of job {root_pid}, ends with it", *words],
            executable=str(BINARY),
            pass_fds=fds,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            cwd="/",
            env={},
            timeout=10,
            check=True,
        )
        return int(done.stdout)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise SnapshotterError(
            f"cannot start the keeper: {error}", where=str(BINARY), hint="run `make build`"
        ) from error


def _write(path: Path, data: bytes) -> None:
    """A small file of ours. Not synced: it is worth nothing after a reboot."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    with open(fd, "wb") as file:
        file.write(data)
