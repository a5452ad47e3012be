"""Real jobs for tests: start one, wait for its state with a deadline, take and roll back through the command line.

The test process is a child subreaper (conftest.py), so whatever a job leaves behind and every restored root becomes
its child and is reaped here. No sleeps: every wait has a condition and a deadline.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
SNAP = [sys.executable, "-c", "import sys; from snapshotter.cli.main import main; sys.exit(main())"]
PROGRAMS = ROOT / "tests" / "programs"
DEADLINE_S = float(os.environ.get("SNAP_TEST_DEADLINE", "30"))


PR_SET_CHILD_SUBREAPER = 36


def be_subreaper() -> None:
    """Orphans of jobs become children of this process."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def compile_c(source: pathlib.Path, target: pathlib.Path, *options: str) -> pathlib.Path:
    """Compile a self-checking program."""
    warnings = ["-Wall", "-Wextra", "-Werror"]
    command = ["gcc", "-std=gnu11", "-O2", "-g", *warnings, "-pthread", f"-I{PROGRAMS}", *options]
    done = subprocess.run(
        [*command, "-o", target, source, "-lrt", "-lm"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return target


def wait_until(condition: Callable[[], Any], what: str, seconds: float = DEADLINE_S) -> Any:
    """Poll until `condition()` is true and return it; AssertionError naming `what` after the deadline."""
    end = time.monotonic() + seconds
    pause = 0.001
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > end:
            raise AssertionError(f"{what}: not within {seconds:g} s")
        time.sleep(pause)
        pause = min(pause * 1.5, 0.05)


def state(pid: int) -> str:
    """The letter of /proc/PID/stat, "" if there is no such process."""
    try:
        text = pathlib.Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return text.rsplit(")", 1)[1].split()[0]


def is_running(pid: int) -> bool:
    """Neither gone nor a zombie."""
    return state(pid) not in {"", "Z", "X"}


def tree(pid: int) -> list[int]:
    """`pid` and all its descendants, parents first."""
    found = [pid]
    for parent in found:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            for tid in os.listdir(f"/proc/{parent}/task"):
                children = pathlib.Path(f"/proc/{parent}/task/{tid}/children").read_text()
                found += map(int, children.split())
    return found


def signal_tree(pid: int, signo: int = signal.SIGKILL) -> list[int]:
    """Send a signal to `pid` and all its descendants; whoever ends meanwhile needs none. Returns them all.

    Stopped are parents first, killed children first; and before a kill they are stopped, so that no parent sees its child's end
    and makes another.
    """
    if signo == signal.SIGKILL:
        signal_tree(pid, signal.SIGSTOP)
    pids = tree(pid)
    for one in pids if signo == signal.SIGSTOP else reversed(pids):
        with contextlib.suppress(ProcessLookupError):
            os.kill(one, signo)
    return pids


def reap(pid: int, seconds: float = DEADLINE_S) -> int | None:
    """Wait for a child of ours to end and reap it; its wait status, None if it is not our child."""
    end = time.monotonic() + seconds
    while True:
        try:
            got, status = os.waitpid(pid, os.WNOHANG)
        except ChildProcessError:
            return None
        if got:
            return status
        if time.monotonic() > end:
            raise AssertionError(f"task {pid} (state {state(pid)}) did not end within {seconds:g} s")
        time.sleep(0.002)


def reap_all() -> None:
    """Reap every child of ours that has ended."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def ticks(pid: int) -> int:
    """Clock ticks of CPU that a process has had."""
    try:
        words = pathlib.Path(f"/proc/{pid}/stat").read_text(errors="replace").rsplit(")", 1)[1].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return int(words[11]) + int(words[12])


def session(pid: int) -> int:
    """The session of a process or zombie, 0 if there is none."""
    try:
        return int(pathlib.Path(f"/proc/{pid}/stat").read_text(errors="replace").rsplit(")", 1)[1].split()[3])
    except (FileNotFoundError, ProcessLookupError):
        return 0


@contextlib.contextmanager
def reaping() -> Iterator[None]:
    """Reap what jobs leave to us as it ends, as init would: a rollback that replaces a living job waits for that.

    Children in our own session are left alone: they are subprocess's.
    """
    over = threading.Event()
    own = os.getsid(0)

    def loop() -> None:
        while not over.wait(0.01):
            for pid in tree(os.getpid())[1:]:
                if state(pid) == "Z" and session(pid) != own:
                    with contextlib.suppress(ChildProcessError):
                        os.waitpid(pid, os.WNOHANG)

    thread = threading.Thread(target=loop)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@dataclass
class SnapFailedError(Exception):
    """`snap` ended with a status other than 0."""

    status: int
    error: dict[str, Any]
    stderr: str

    def __str__(self) -> str:
        return f"snap: exit status {self.status}: {self.error or self.stderr}"


def snap(*args: str | int, store: os.PathLike[str] | str, **popen: Any) -> dict[str, Any]:
    """Run `snap ARGS --json` in a process of its own and return its object.

    Raises:
        SnapFailedError: with the error object of the documented shape.
    """
    env = dict(os.environ, PYTHONPATH=str(ROOT), **popen.pop("env", {}))
    command = [*SNAP, "--store", os.fspath(store), *map(str, args), "--json"]
    done = subprocess.run(
        command,
        env=env,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=180,
        check=False,
        **popen,
    )
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        answer = {}
    if done.returncode != 0:
        raise SnapFailedError(done.returncode, answer.get("error", {}), done.stderr + done.stdout)
    assert isinstance(answer, dict)
    return answer


@dataclass
class Job:
    """A program in its own session and directory, by the protocol of tests/programs/selfcheck.h."""

    directory: pathlib.Path
    store: pathlib.Path
    pid: int = 0
    points: list[dict[str, Any]] = field(default_factory=list)

    def start(self, command: Sequence[str | os.PathLike[str]], *, env: dict[str, str] | None = None) -> Job:
        """Start `command DIRECTORY`, descriptors 1 and 2 in files, 0 on /dev/null, no others."""
        self.directory.mkdir(parents=True, exist_ok=True)
        self.directory.chmod(0o777)
        with open(self.directory / "stdout", "ab") as out, open(self.directory / "stderr", "ab") as err:
            process = subprocess.Popen(
                [*command, str(self.directory)],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
                env=env,
                cwd=self.directory,
            )
        self.pid = process.pid
        process.returncode = 0  # reaped by this class, not by subprocess
        return self

    def wait_ready(self) -> Job:
        """Until the program has prepared its state."""

        def ready() -> bool:
            if not is_running(self.pid):
                raise AssertionError(f"the program ended before it was ready: {self.said()}")
            return (self.directory / "ready").exists()

        wait_until(ready, f"task {self.pid} ready")
        return self

    def take(self, *options: str) -> dict[str, Any]:
        """`snap take PID`; the point is appended to `points`."""
        point = snap("take", self.pid, "--job", "test", *options, store=self.store)
        self.points.append(point)
        if "--kill" in options:
            self.wait_gone()
        return point

    def rollback(self, point: str = "latest", *options: str) -> dict[str, Any]:
        """`snap rollback`; the job runs again under the same pids when this returns."""
        with reaping():
            result = snap("rollback", point, *options, store=self.store)
        assert result["root_pid"] == self.pid
        return result

    def wait_gone(self) -> None:
        """Until the whole old tree is reaped, so that its pids are free."""
        wait_until(lambda: not is_running(self.pid), f"task {self.pid} killed")
        reap(self.pid)
        wait_until(lambda: reap_all() or not state(self.pid), f"task {self.pid} reaped")

    def finish(self) -> str:
        """SIGTERM, let the program check itself, its verdict: the last line of "out"."""
        os.kill(self.pid, signal.SIGTERM)
        out = self.directory / "out"

        def over() -> bool:
            return out.exists() or not is_running(self.pid)

        wait_until(over, f"task {self.pid} (state {state(self.pid)}) checking itself; so far: {self.said()}")
        status = reap(self.pid)
        if not out.exists():
            return f"FAIL: ended with wait status {status} and no verdict: {self.said()}"
        return out.read_text().strip().splitlines()[-1]

    def said(self) -> str:
        """The program's standard error."""
        path = self.directory / "stderr"
        return path.read_text(errors="replace").strip() if path.exists() else ""

    def destroy(self) -> None:
        """Kill what is left of the job."""
        if not self.pid:
            return
        signal_tree(self.pid)
        reap(self.pid)
        reap_all()
