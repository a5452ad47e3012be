"""FrozenTree against living jobs: everything stands, everything goes on, whatever happens to the one who froze it."""

from __future__ import annotations

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from checkpoint import dump, freeze, seizure, transfers
from checkpoint.check import check
from checkpoint.finisher import Finisher
from checkpoint.freeze import CannotStopError, FrozenTree, settled_tree, stopped_process
from checkpoint.kernel import proc, ptrace
from checkpoint.kernel import tasks as listing
from checkpoint.resources import task_look
from snapshotter.base import faults
from snapshotter.base.errors import PermissionDeniedError, TargetGoneError, UnsupportedError
from tests.jobs import reap, state, wait_until
from tests.memory_store import take

pytestmark = pytest.mark.requires("root")

PROGRAMS = pathlib.Path(__file__).parent / "programs"

BUSY = """
import os, subprocess, sys, threading, time
for _ in range(5):
    threading.Thread(target=lambda: [time.sleep(0.001) for _ in iter(int, 1)], daemon=True).start()
subprocess.Popen(["sleep", "1000"])
subprocess.Popen(["sh", "-c", "while :; do /bin/true; done"])
child = os.fork()
if child == 0:
    os._exit(3)
os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)  # it stays a zombie
open(os.path.join(sys.argv[1], "ready"), "w").close()
time.sleep(1000)
"""


def tracer(pid: int) -> int:
    return int(pathlib.Path(f"/proc/{pid}/status").read_text().split("TracerPid:")[1].split()[0])


@pytest.fixture
def busy(job):
    """Threads, a sleeper, a shell that forks all the time (by vfork), a zombie."""
    return job.start([sys.executable, "-c", BUSY]).wait_ready()


def test_everything_stands_still_and_goes_on(busy):
    for _ in range(10):
        with FrozenTree(busy.pid) as tree:
            root = tree.processes[busy.pid]
            assert len(root.threads) == 6
            assert root.threads[0] is root.leader
            assert next(iter(tree.processes)) == busy.pid
            assert any(process.is_zombie for process in tree.processes.values())
            for process in tree.processes.values():
                assert all(state(task.tid) == "t" for task in process.threads)
                assert process.pid == busy.pid or process.stat.ppid in tree.processes
        assert tracer(busy.pid) == 0
        assert 0 < tree.frozen_us < 10_000_000


def test_group_stop_stays(busy):
    os.kill(busy.pid, signal.SIGSTOP)
    wait_until(lambda: state(busy.pid) == "T", "stopped")
    with FrozenTree(busy.pid) as tree:
        assert tree.processes[busy.pid].state == "stopped"
        assert tree.processes[busy.pid].stop_signal == signal.SIGSTOP
    wait_until(lambda: state(busy.pid) == "T", "stopped again")
    os.kill(busy.pid, signal.SIGCONT)
    wait_until(lambda: state(busy.pid) in {"S", "R"}, "continued")


@pytest.mark.parametrize("name", ["freeze.seized", "freeze.interrupted", "thaw.begin", "thaw.detached"])
def test_killed_snap_leaves_the_job_running(busy, name):
    child = os.fork()
    if child == 0:
        faults.configure(f"{name}:kill")
        with FrozenTree(busy.pid):
            pass
        os._exit(0)
    assert os.WTERMSIG(reap(child)) == signal.SIGKILL
    wait_until(lambda: tracer(busy.pid) == 0 and state(busy.pid) in {"S", "R"}, "the job goes on")


def test_snap_killed_while_it_waits_for_transfers_leaves_the_job_running(job):
    ready = 'import os, sys; open(os.path.join(sys.argv[1], "ready"), "w").close()'
    job.start([sys.executable, "-c", f"{ready}\nwhile True: pass"]).wait_ready()
    child = os.fork()
    if child == 0:
        faults.configure("transfers.stopped:kill")
        transfers.settle(job.pid, 10.0, pytest.fail)  # who runs may be in anything
        os._exit(0)
    assert os.WTERMSIG(reap(child)) == signal.SIGKILL
    wait_until(lambda: tracer(job.pid) == 0 and state(job.pid) == "R", "the job goes on")


def test_error_inside_thaws(busy):
    with pytest.raises(ZeroDivisionError), FrozenTree(busy.pid):
        raise ZeroDivisionError
    assert tracer(busy.pid) == 0


def test_leave_stopped_and_killed(busy):
    with Finisher() as finisher, FrozenTree(busy.pid) as tree:
        tree.leave("stop", finisher)
    wait_until(lambda: state(busy.pid) == "T", "left stopped")
    with Finisher() as finisher, FrozenTree(busy.pid) as tree:
        tree.leave("kill", finisher)
    wait_until(lambda: state(busy.pid) in {"", "Z"}, "killed")


def test_signal_that_arrives_meanwhile_is_delivered(job, compile_program):
    job.start([compile_program("sleeps.c")]).wait_ready()
    with FrozenTree(job.pid):
        os.kill(job.pid, signal.SIGTERM)
    wait_until((job.directory / "out").exists, "SIGTERM arrived after the thaw")


HEEDS = """
import os, signal, sys
signal.signal(signal.SIGTERM, lambda *_: open(os.path.join(sys.argv[1], "out"), "w").close())
open(os.path.join(sys.argv[1], "ready"), "w").close()
while True:
    signal.pause()
"""


def seized_on_the_way_of_a_signal(pid):
    """SIGTERM has come after the seizure: the task has stopped for it, and not yet for the interrupt."""
    seized = seizure.Seizure()
    assert seized.seize(pid, pid)
    os.kill(pid, signal.SIGTERM)
    wait_until(lambda: state(pid) == "t", "stopped for SIGTERM")
    return seized


def test_a_signal_on_its_way_outlives_a_freeze_that_is_given_up(job):
    job.start([sys.executable, "-c", HEEDS]).wait_ready()
    assert seized_on_the_way_of_a_signal(job.pid).let_go(killed=False) is None
    wait_until((job.directory / "out").exists, "SIGTERM arrived")


def test_a_signal_on_its_way_outlives_a_snap_that_is_killed(job):
    job.start([sys.executable, "-c", HEEDS]).wait_ready()
    child = os.fork()
    if child == 0:
        faults.configure("freeze.signal:kill")
        seized_on_the_way_of_a_signal(job.pid).stop([job.pid], time.monotonic() + 10)
        os._exit(0)
    assert os.WTERMSIG(reap(child)) == signal.SIGKILL
    wait_until((job.directory / "out").exists, "SIGTERM arrived")


CONNECTING = """
import os, socket, struct, sys, threading
listener = socket.socket()
listener.bind(("127.0.0.1", 0))
listener.listen(0)
others = [socket.socket() for _ in range(3)]
for other in others:  # the queue is full then: a further connect waits
    other.setblocking(False)
    other.connect_ex(listener.getsockname())
client = socket.socket()
client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("qq", 100, 0))
out = os.open(os.path.join(sys.argv[1], "result"), os.O_CREAT | os.O_WRONLY)

def connect():
    os.write(out, str(client.connect_ex(listener.getsockname())).encode())

threading.Thread(target=connect).start()
open(os.path.join(sys.argv[1], "ready"), "w").close()
sys.stdin = os.fdopen(os.open(os.path.join(sys.argv[1], "go"), os.O_RDONLY))  # a FIFO
for _ in range(3):
    listener.accept()
"""


def test_connect_with_a_timeout_goes_on(job):
    """It cannot be part of a point, but one may begin after the look, and a refused take must not end it."""
    job.directory.mkdir()
    os.mkfifo(job.directory / "go")
    job.start([sys.executable, "-c", CONNECTING]).wait_ready()
    nr_connect = "42 "

    def connecting():
        return any(
            path.read_text().startswith(nr_connect)
            for path in pathlib.Path(f"/proc/{job.pid}/task").glob("*/syscall")
        )

    wait_until(connecting, "a thread in connect")
    for _ in range(5):
        with FrozenTree(job.pid):
            pass
    wait_until(connecting, "in connect again")
    with open(job.directory / "go", "w"):
        pass
    result = job.directory / "result"
    wait_until(result.read_text, "connected")
    assert result.read_text() == "0"


def test_too_many_tasks(busy):
    with pytest.raises(UnsupportedError, match="more than 3 tasks"), FrozenTree(busy.pid, max_tasks=3):
        pass
    assert tracer(busy.pid) == 0


def test_no_such_process():
    child = os.fork()
    if child == 0:
        os._exit(0)
    reap(child)
    with pytest.raises(TargetGoneError), FrozenTree(child):
        pass


def test_one_process_alone(busy):
    with stopped_process(busy.pid) as process:
        assert len(process.threads) == 6
        sleeper = next(pid for pid in map(int, os.listdir("/proc/self/task")) if pid)
        assert tracer(sleeper) == 0
    assert tracer(busy.pid) == 0


@pytest.fixture
def run(compile_program):
    """run("low_tid.c", ...) -> the running program, its standard output a pipe; killed after the test."""
    running = []

    def start(name, *arguments):
        program = compile_program(str(PROGRAMS / name))
        running.append(
            subprocess.Popen([program, *arguments], stdout=subprocess.PIPE, text=True, start_new_session=True)
        )
        return running[-1]

    yield start
    for process in running:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()


@pytest.mark.requires("clone3_set_tid")
def test_killed_though_a_thread_has_a_lower_tid_than_its_leader(run):
    job = run("low_tid.c")
    tid = int(job.stdout.readline())
    assert 0 < tid < job.pid
    child = os.fork()  # a tracer that hangs can be killed
    if child == 0:
        try:
            with Finisher() as finisher, FrozenTree(job.pid) as tree:
                tree.leave("kill", finisher)
        finally:
            os._exit(0)
    try:
        assert reap(child, 10) == 0
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
            reap(child)
    assert job.wait(10) == -signal.SIGKILL


def test_more_children_than_one_read_tells(job):
    count = 1500
    script = f"import os, signal, sys\nfor _ in range({count}):\n    os.fork() or signal.pause()\n"
    script += "open(os.path.join(sys.argv[1], 'ready'), 'w').close()\nsignal.pause()\n"
    job.start([sys.executable, "-S", "-c", script]).wait_ready()
    assert len(listing.children(job.pid, [job.pid])) == count
    with FrozenTree(job.pid) as tree:
        assert len(tree.processes) == count + 1


def test_one_task_that_cannot_be_cured_keeps_no_other_in(busy, monkeypatch):
    left = []

    def cure(remote):
        left.append(remote.tid)
        real(remote)
        if len(left) == 1:
            raise OSError("told to fail")

    real = freeze.cure
    monkeypatch.setattr(freeze, "cure", cure)
    maps = pathlib.Path(f"/proc/{busy.pid}/maps")
    with pytest.raises(OSError, match="told to fail"), FrozenTree(busy.pid) as tree:
        tasks = list(tree.tasks())
        for task in tasks:
            task.infect().call("getpid")
    assert left == [task.tid for task in reversed(tasks)]
    assert tracer(busy.pid) == 0
    assert maps.exists()


def test_registers_are_not_those_of_a_restartable_sequence(run):
    """The dump of a task that was infected before its registers were written down."""
    job = run("rseq_section.c")
    first, end, abort = (int(word, 16) for word in job.stdout.readline().split())

    def caught():
        with FrozenTree(job.pid) as tree:
            leader = tree.processes[job.pid].leader
            if not first <= leader.regs.rip < end:
                return False
            leader.infect().call("getpid")
            assert leader.regs.rip == abort
            tree.cure()
            assert ptrace.getregs(job.pid).rip == abort
        return True

    wait_until(caught, "stopped inside the section")
    assert job.poll() is None


def test_a_vfork_under_way_is_waited_for(run):
    job = run("slow_vfork.c", "300")
    wait_until(lambda: listing.children(job.pid, [job.pid]), "the child is there")
    report = check(job.pid)
    assert report.ok, [finding.what for finding in report.findings]
    assert len(report.pids) == 2


def test_a_vfork_that_stays_is_refused_by_name(run):
    job = run("slow_vfork.c")
    wait_until(lambda: listing.children(job.pid, [job.pid]), "the child is there")
    began = time.monotonic()
    report = check(job.pid)
    assert time.monotonic() - began < 5
    assert {finding.where for finding in report.findings} == {"address space"}
    assert "vfork" in report.findings[0].what


def test_what_does_not_stop_is_said_and_not_seized_again(run, monkeypatch):
    """It stays seized until we end: another try would be told that somebody traces it already, which is us."""
    job = run("slow_vfork.c")
    wait_until(lambda: listing.children(job.pid, [job.pid]), "the child is there")
    monkeypatch.setattr(seizure, "_LET_GO_S", 0.05)
    child = os.fork()
    if child == 0:
        tried = []
        monkeypatch.setattr(
            freeze, "FrozenTree", lambda *args, **options: tried.append(1) or FrozenTree(*args, **options)
        )
        try:
            with settled_tree(job.pid, timeout_s=0.2, max_tasks=100, unsettled=lambda _: False):
                pass
        except CannotStopError as error:
            os._exit(0 if "does not stop" in str(error) and len(tried) == 1 else 2)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(reap(child)) == 0
    wait_until(lambda: tracer(job.pid) == 0, "let go with its tracer")


def test_a_process_that_is_reaped_while_it_is_looked_at_has_ended(monkeypatch):
    """readlink(2) of /proc/PID/ns/* is refused then, as it is to somebody without the right to look."""
    child = subprocess.Popen(["sleep", "1000"])
    readlink = os.readlink

    def refused(path, **options):
        if "/ns/" not in path or path.startswith("/proc/self"):
            return readlink(path, **options)
        if reaped:
            child.kill()
            child.wait()
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(task_look.os, "readlink", refused)
    try:
        reaped = False
        with pytest.raises(PermissionDeniedError, match=f"task {child.pid}: cannot see its namespaces"):
            task_look.look(child.pid, [])
        reaped = True
        with pytest.raises(TargetGoneError):
            task_look.look(child.pid, [])
    finally:
        child.kill()
        child.wait()


@pytest.mark.parametrize("milliseconds", [30, 0])
def test_a_child_in_the_same_memory_that_appears_before_the_freeze_is_waited_for(
    run, monkeypatch, milliseconds
):
    job = run("shares_memory.c", str(milliseconds))
    wait_until(lambda: proc.read_status(job.pid).sig_caught >> (signal.SIGUSR1 - 1) & 1, "it listens")
    prepare = dump.locks.prepare

    def late(ctx):
        """The last step before the freeze."""
        os.kill(job.pid, signal.SIGUSR1)
        wait_until(lambda: listing.children(job.pid, [job.pid]), "the child is there")
        prepare(ctx)

    monkeypatch.setattr(dump.locks, "prepare", late)
    if milliseconds:
        assert len(take(job.pid).result.tasks) == 2
    else:
        with pytest.raises(UnsupportedError, match="CLONE_VM"):
            take(job.pid)
    assert tracer(job.pid) == 0
