"""Rolling back a job that lives: what its death would do to others is found before it is killed, by the dry run too."""

from __future__ import annotations

import contextlib
import os
import pathlib
import pty
import select
import shlex
import signal
import subprocess
import sys
import time

import pytest

from tests.counting import COUNTER, count, fails, goes_on
from tests.jobs import ROOT, SNAP, is_running, reap_all, reaping, signal_tree, snap, state, tree, wait_until

pytestmark = pytest.mark.requires("root")


def started(pid: int) -> str:
    return pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19]


class Nested:
    """A counter that is the child of something else than the test."""

    def __init__(self, tmp_path: pathlib.Path) -> None:
        self.directory = tmp_path / "job"
        self.directory.mkdir()
        self.store = tmp_path / "store"
        self.script = self.directory / "counter.py"
        self.script.write_text(
            f"import os\nopen({str(self.directory)!r} + '/pid', 'w').write(str(os.getpid()))\n{COUNTER}"
        )
        self.command = f"{sys.executable} {self.script} {self.directory}"
        self.pid = 0
        self.outer: list[int] = []

    def start(self, *command: str, **popen) -> subprocess.Popen[bytes]:
        """What will start the counter."""
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen(command, start_new_session=True, **(quiet | popen))
        process.returncode = 0
        self.outer.append(process.pid)
        return process

    def await_counter(self) -> None:
        path = self.directory / "pid"
        wait_until(lambda: path.exists() and path.read_text(), "the counter's pid")
        self.pid = int(path.read_text())
        wait_until(lambda: count(self) > 3, "the counter counting")

    def take(self) -> dict:
        return snap("take", self.pid, "--job", "test", store=self.store)

    def refused(self, *options: str) -> set[str]:
        """Rollback and dry run both refuse for the same reasons, and nothing happens to the job; their codes."""
        before = started(self.pid)
        errors = [
            fails(7, "rollback", "latest", *options, *more, store=self.store) for more in ((), ("--dry-run",))
        ]
        assert errors[0]["obstacles"] == errors[1]["obstacles"]
        assert errors[0]["message"] == errors[1]["message"]
        assert errors[0]["hint"]
        assert started(self.pid) == before
        goes_on(self)
        return {one["code"] for one in errors[0]["obstacles"]}

    def end(self) -> None:
        for pid in [*self.outer, self.pid]:
            if pid:
                signal_tree(pid)
        for pid in [*self.outer, self.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
            wait_until(lambda pid=pid: reap_all() or not is_running(pid), f"task {pid} gone")


@pytest.fixture
def nested(tmp_path):
    made = Nested(tmp_path)
    yield made
    made.end()


def rolled_back(job: Nested, *options: str) -> dict:
    with reaping():
        result = snap("rollback", "latest", *options, store=job.store)
    goes_on(job)
    return result


# A terminal


class Screen:
    """The master side of a terminal of whoever was started on it."""

    def __init__(self, *command: str) -> None:
        self.pid, self.master = pty.fork()
        if self.pid == 0:
            os.environ["PS1"] = "ready> "
            os.execv(command[0], command)

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def read_until(self, text: bytes, seconds: float = 20) -> bytes:
        got, end = b"", time.monotonic() + seconds
        while text not in got:
            ready, _, _ = select.select([self.master], [], [], max(0, end - time.monotonic()))
            assert ready, f"no {text!r}, only {got!r}"
            got += os.read(self.master, 4096)
        return got

    def works(self) -> None:
        self.type("echo $((6*7))x\n")
        self.read_until(b"42x")

    def close(self) -> None:
        signal_tree(self.pid)
        with contextlib.suppress(OSError):
            os.close(self.master)
        wait_until(lambda: reap_all() or not state(self.pid), "the terminal's job gone")


@pytest.fixture
def screen():
    made = Screen("/bin/bash", "--norc", "-i")
    made.read_until(b"ready>")
    yield made
    made.close()


def test_a_shell_in_its_terminal(screen, tmp_path):
    store = tmp_path / "store"
    snap("take", screen.pid, "--job", "shell", store=store)
    before = started(screen.pid)
    for more in ((), ("--dry-run",), ("--terminal", "null"), ("--detach-from-parent",)):
        error = fails(7, "rollback", "latest", *more, store=store)
        assert [one["code"] for one in error["obstacles"]] == ["terminal_leader"]
        assert error["obstacles"][0]["option"] == "--hang-up"
        assert "/dev/pts/" in error["message"]
        assert "--hang-up" in error["hint"]
    assert started(screen.pid) == before
    screen.works()
    # We keep the other side open, as few do: the shell has its terminal back.
    planned = snap("rollback", "latest", "--hang-up", "--dry-run", store=store)
    with reaping():
        result = snap("rollback", "latest", "--hang-up", store=store)
    assert any("hangs that terminal up" in text for text in result["warnings"])
    assert [text for text in planned["warnings"] if "hangs" in text] == [
        text for text in result["warnings"] if "hangs" in text
    ]
    assert started(screen.pid) != before
    screen.works()


@pytest.mark.requires("program:tmux")
def test_a_pane_of_tmux(nested, tmp_path):
    socket = str(tmp_path / "tmux")
    tmux = ["tmux", "-S", socket, "-f", "/dev/null"]
    subprocess.run(
        [*tmux, "new-session", "-d", f"exec {nested.command}"],
        env=dict(os.environ, SHELL="/bin/sh"),
        check=True,
    )
    server = int(subprocess.run([*tmux, "display", "-p", "#{pid}"], capture_output=True, check=True).stdout)
    nested.outer.append(server)
    nested.await_counter()
    nested.take()
    assert nested.refused() == {"terminal_leader", "supervised"}
    assert nested.refused("--hang-up") == {"supervised"}
    assert nested.refused("--detach-from-parent") == {"terminal_leader"}
    panes = subprocess.run([*tmux, "list-panes", "-F", "#{pane_pid}"], capture_output=True, check=True).stdout
    assert panes.split() == [str(nested.pid).encode()], "the window is still there"
    result = rolled_back(nested, "--hang-up", "--detach-from-parent")
    assert any("/dev/null" in text for text in result["warnings"])


# A parent


def test_a_shell_loop_does_not_start_a_second_one(nested):
    nested.start("bash", "-c", f"while :; do {nested.command}; done")
    nested.await_counter()
    nested.take()
    assert nested.refused() == {"supervised"}
    assert nested.refused("--hang-up") == {"supervised"}
    assert len(tree(nested.outer[0])) == 2
    result = rolled_back(nested, "--detach-from-parent")
    assert any("supervisor" in text for text in result["warnings"])
    # What the option says: the loop goes on.
    wait_until(
        lambda: len(tree(nested.outer[0])) == 2 and nested.pid not in tree(nested.outer[0]), "another one"
    )


def test_a_loop_around_a_pipeline(nested):
    nested.start("bash", "-c", f"while :; do {nested.command} | cat; done")
    nested.await_counter()
    nested.take()
    assert nested.refused() == {"supervised"}


SUPERVISORS = {
    "waits for it": "os.waitpid(child.pid, 0)",
    "handles SIGCHLD": "signal.signal(signal.SIGCHLD, lambda *_: None); time.sleep(1000)",
    "pidfd": "fd = os.pidfd_open(child.pid); select.select([fd], [], [])",
}


@pytest.mark.parametrize("how", SUPERVISORS)
def test_programs_that_are_told(nested, how):
    start = f"import os, select, signal, subprocess, time\nchild = subprocess.Popen({shlex.split(nested.command)!r})\n"
    nested.start(sys.executable, "-c", start + SUPERVISORS[how])
    nested.await_counter()
    nested.take()
    assert nested.refused() == {"supervised"}
    assert how in fails(7, "rollback", "latest", store=nested.store)["message"]


def test_a_parent_that_does_not_reap(nested):
    sleeper = f"import os, subprocess, sys, time\nsubprocess.Popen({shlex.split(nested.command)!r})\n"
    nested.start(sys.executable, "-c", sleeper + "time.sleep(1000)")
    nested.await_counter()
    nested.take()
    assert nested.refused() == {"parent_may_not_reap"}
    os.kill(nested.outer.pop(), signal.SIGKILL)
    reap_all()
    rolled_back(nested)  # the test is its parent now


def test_a_parent_whose_other_child_is_a_zombie(nested):
    sleeper = f"import subprocess, time\nsubprocess.Popen({shlex.split(nested.command)!r})\nkept = subprocess.Popen(['true'])\n"
    nested.start(sys.executable, "-c", sleeper + "time.sleep(1000)")
    nested.await_counter()
    nested.take()
    wait_until(lambda: "Z" in {state(pid) for pid in tree(nested.outer[0])}, "a zombie")
    assert nested.refused() == {"parent_does_not_reap"}
    assert nested.refused("--detach-from-parent") == {"parent_does_not_reap"}, "no option helps"


def test_a_parent_that_is_stopped(nested):
    nested.start("bash", "-c", f"while :; do {nested.command}; done")
    nested.await_counter()
    nested.take()
    os.kill(nested.outer[0], signal.SIGSTOP)
    wait_until(lambda: state(nested.outer[0]) == "T", "stopped")
    assert nested.refused("--detach-from-parent") == {"parent_stopped"}
    assert f"kill -CONT {nested.outer[0]}" in fails(7, "rollback", "latest", store=nested.store)["hint"]


def test_the_main_process_of_a_service(nested):
    nested.start("sh", "-c", f"SYSTEMD_EXEC_PID=$$ exec {nested.command}")
    nested.await_counter()
    nested.take()
    assert nested.refused() == {"service"}
    rolled_back(nested, "--detach-from-parent")


# What stays as simple as it was


def snap_line(nested: Nested, *words: str) -> str:
    return shlex.join([*SNAP, "--store", str(nested.store), *words])


def test_from_the_script_that_started_the_job(nested, tmp_path):
    """The shell is told, and that is all: it runs the rollback itself."""
    script = (
        f"{nested.command} & job=$!\n"
        f"until [ -s {nested.directory}/count ]; do sleep 0.05; done\n"
        f"{snap_line(nested, 'take')} $job --job test && {snap_line(nested, 'rollback', 'latest')}\n"
        f"echo $? >{tmp_path}/status; sleep 1000"
    )
    log = tmp_path / "log"
    with log.open("wb") as out:
        nested.start("bash", "-c", script, stdout=out, stderr=out, env=dict(os.environ, PYTHONPATH=str(ROOT)))
    nested.await_counter()
    wait_until(lambda: (tmp_path / "status").exists() and (tmp_path / "status").read_text(), "the rollback")
    assert (tmp_path / "status").read_text().strip() == "0", log.read_text()
    assert "fg, wait and jobs do not know it" in log.read_text()
    assert nested.pid not in tree(nested.outer[0])
    goes_on(nested)


def test_a_job_in_the_background_of_a_terminal(nested, screen):
    screen.type(f"{nested.command} </dev/null >/dev/null 2>&1 &\n")
    nested.await_counter()
    nested.take()
    result = rolled_back(nested)
    assert any("fg, wait and jobs" in text for text in result["warnings"])
    screen.works()


def test_a_job_in_front_of_a_terminal(nested, screen):
    screen.type(f"{nested.command} </dev/null >/dev/null 2>&1\n")
    nested.await_counter()
    nested.take()
    assert nested.refused() == {"supervised"}


def test_a_dead_root_that_nobody_reaps_keeps_its_children_alive(nested):
    """The children of the job would be killed for a rollback that its own zombie makes impossible."""
    family = (
        f"import os, subprocess, time\nsubprocess.Popen({shlex.split(nested.command)!r})\ntime.sleep(1000)"
    )
    holder = f"import subprocess, sys, time\np = subprocess.Popen([sys.executable, '-c', {family!r}])\nprint(p.pid, flush=True)\ntime.sleep(1000)"
    outer = nested.start(sys.executable, "-c", holder, stdout=subprocess.PIPE)
    assert outer.stdout is not None
    root = int(outer.stdout.readline())
    outer.stdout.close()
    nested.await_counter()
    snap("take", root, "--job", "test", store=nested.store)
    os.kill(root, signal.SIGKILL)
    wait_until(lambda: state(root) == "Z", "a zombie")
    before = started(nested.pid)
    for more in (("--dry-run",), ()):
        error = fails(7, "rollback", "latest", *more, store=nested.store)
        assert f"pid {root} is still held by a zombie" in error["message"]
        assert str(outer.pid) in error["hint"]
    assert started(nested.pid) == before
    goes_on(nested)


def test_a_parent_that_ignores_its_children(nested):
    """The kernel reaps them for it, and it may poll for the pid: nothing shows that it does not."""
    start = f"import signal, subprocess, time\nsignal.signal(signal.SIGCHLD, signal.SIG_IGN)\nsubprocess.Popen({shlex.split(nested.command)!r})\n"
    nested.start(sys.executable, "-c", start + "time.sleep(1000)")
    nested.await_counter()
    nested.take()
    assert nested.refused() == {"supervised"}
    rolled_back(nested, "--detach-from-parent")


def test_a_take_that_kills_says_who_waits_for_the_job(nested):
    nested.start("sh", "-c", f"{nested.command}; exec sleep 60")
    nested.await_counter()
    warnings = snap("take", nested.pid, "--job", "test", "--kill", store=nested.store)["warnings"]
    assert any("waits for it, and goes on when it dies" in text for text in warnings), warnings
