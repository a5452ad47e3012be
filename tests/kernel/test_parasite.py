"""The parasite in living processes: what it runs, what it leaves, what it refuses."""

import contextlib
import ctypes
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
from parasite_c._native import lib

from checkpoint.freeze import stopped_process
from checkpoint.kernel import proc, ptrace, tasks
from checkpoint.kernel import sys as sys_kernel
from checkpoint.parasite import Parasite, RemoteCallError, infect, spawn_root_stub, visits
from checkpoint.parasite import remote as remote_module
from checkpoint.parasite.infection import cure
from snapshotter.base.errors import RestoreConflictError, TargetGoneError, UnsupportedError

pytestmark = pytest.mark.requires("root", "rseq_configuration")

PROGRAMS = pathlib.Path(__file__).parent / "programs"


def until(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "deadline passed"
        time.sleep(0.002)
    return value


@contextlib.contextmanager
def running(*command, **options):
    job = subprocess.Popen(command, **options)
    try:
        yield job
    finally:
        job.kill()
        job.wait(30)  # one that a failed test still traces does not end


def counted(calls, function):
    """`function`, whose second arguments are noted."""

    def call(task, until):
        calls.append(until)
        return function(task, until)

    return call


@pytest.fixture
def sleeper():
    with running("sleep", "1000") as job:
        # Not merely asleep: it may be waiting for a page of its program.
        until(lambda: b"sleep" in proc.comm(job.pid) and system_call(job.pid) in SLEEPS)
        yield job


SLEEPS = {"230", "219", "35"}
"""clock_nanosleep, restart_syscall, nanosleep."""


def system_call(pid):
    return pathlib.Path(f"/proc/{pid}/syscall").read_text().split()[0]


def facts(pid):
    status = proc.read_status(pid)
    return (
        pathlib.Path(f"/proc/{pid}/maps").read_text(),
        sorted(os.listdir(f"/proc/{pid}/fd")),
        status.sig_blocked,
        status.sig_pending,
        status.shared_pending,
        status.tracer_pid,
    )


def test_call_runs_in_the_target(sleeper):
    before = facts(sleeper.pid)
    with Parasite(sleeper.pid) as task:
        assert task.call("getpid") == sleeper.pid
        assert task.call("getppid") == os.getpid()
    assert facts(sleeper.pid) == before
    until(lambda: proc.read_stat(sleeper.pid).state == "S")
    assert system_call(sleeper.pid) in SLEEPS


def test_batch_passes_results_buffers_and_bytes(sleeper):
    with Parasite(sleeper.pid) as task:
        batch = task.batch()
        fds = batch.buffer(8)
        batch.call("pipe2", fds, os.O_CLOEXEC)
        put = batch.call("write", fds.i32(4), b"hello", 5)
        back = batch.buffer(16)
        got = batch.call("read", fds.i32(0), back.at(3), 16 - 3)
        closed = [batch.call("close", fds.i32(0)), batch.call("close", fds.i32(4))]
        opened = batch.call("open", b"/etc/passwd\0", os.O_RDONLY | os.O_CLOEXEC)
        where = batch.call("lseek", opened, 7, 0)
        batch.call("close", opened)
        results = task.run(batch)
        assert (results[put], results[got], results[where]) == (5, 5, 7)
        assert results.bytes(back)[:8] == b"\0\0\0hello"
        assert all(results[ref] == 0 for ref in closed)


def test_failures_are_named_tolerated_or_collected(sleeper):
    with Parasite(sleeper.pid) as task:
        with pytest.raises(RemoteCallError) as caught:
            task.call("close", 999)
        assert caught.value.errno == 9
        assert caught.value.name == "close"
        assert str(sleeper.pid) in str(caught.value)
        batch = task.batch()
        tolerated = batch.call("close", 999, ok={9})
        collected = batch.call("close", 998, check=False)
        after = batch.call("getpid")
        results = task.run(batch)
        assert results[tolerated] == results[collected] == -9
        assert results.error(tolerated) == 9
        assert results[after] == sleeper.pid
        batch = task.batch()
        batch.call("close", 999)
        batch.call("chdir", b"/proc\0")
        with pytest.raises(RemoteCallError):
            task.run(batch)
    assert os.readlink(f"/proc/{sleeper.pid}/cwd") != "/proc"


def test_batch_larger_than_the_area_is_cut_into_pieces(sleeper):
    with Parasite(sleeper.pid) as task:
        batch = task.batch()
        opened = batch.call("open", b"/etc/passwd\0", os.O_RDONLY | os.O_CLOEXEC)
        for _ in range(9000):
            batch.call("getuid")
        last = batch.call("lseek", opened, 11, 0)
        batch.call("close", opened)
        assert task.run(batch)[last] == 11


def test_child_of_a_batch_stays_in_the_blob(sleeper):
    with Parasite(sleeper.pid) as task:
        batch = task.batch()
        fds = batch.buffer(8)
        batch.call("pipe2", fds, os.O_CLOEXEC)
        args = batch.data(sys_kernel.clone_args())  # plain fork: a copy of everything, its stack too

        def child(inner):
            inner.call("write", fds.i32(4), b"child", 5)

        made = batch.clone(args, child)
        reaped = batch.call("wait4", made, 0, 0x40000000, 0)
        back = batch.buffer(8)
        batch.call("read", fds.i32(0), back, 8)
        batch.call("close", fds.i32(0))
        batch.call("close", fds.i32(4))
        results = task.run(batch)
        assert results[made] > 0
        assert results[reaped] == results[made]
        assert results.bytes(back)[:5] == b"child"
    assert tasks.children(sleeper.pid, proc.threads(sleeper.pid)) == []


def test_group_stopped_job_stays_stopped(sleeper):
    os.kill(sleeper.pid, signal.SIGSTOP)
    until(lambda: proc.read_stat(sleeper.pid).state == "T")
    with Parasite(sleeper.pid) as task:
        assert task.call("getpid") == sleeper.pid
    until(lambda: proc.read_stat(sleeper.pid).state == "T")
    os.kill(sleeper.pid, signal.SIGCONT)
    until(lambda: proc.read_stat(sleeper.pid).state == "S")


def test_signals_wait_until_the_parasite_has_left(tmp_path):
    caught = str(tmp_path / "caught")
    script = f"import signal,time\nsignal.signal(signal.SIGUSR1, lambda *a: open({caught!r}, 'w').write('caught'))\n"
    script += f"open({str(tmp_path / 'ready')!r}, 'w').close()\nwhile True: time.sleep(10)\n"
    with running(sys.executable, "-c", script) as job:
        until((tmp_path / "ready").exists)
        with Parasite(job.pid) as task:
            task.call("getpid")
            os.kill(job.pid, signal.SIGUSR1)
            assert task.call("getpid") == job.pid
            assert not (tmp_path / "caught").exists()
        until((tmp_path / "caught").exists)


def test_every_thread_of_a_process_runs_batches():
    script = "import threading,time\n[threading.Thread(target=time.sleep,args=(1000,)).start() for _ in range(3)]\n"
    with running(sys.executable, "-c", script) as job:
        until(lambda: proc.read_status(job.pid).threads == 4)
        until(lambda: all(proc.wchan(job.pid, tid) not in {"0", ""} for tid in proc.threads(job.pid)))
        time.sleep(0.1)  # the interpreter maps arenas while its threads start
        before = facts(job.pid)[0]
        tids = proc.threads(job.pid)
        targets = []
        for tid in tids:
            ptrace.seize(tid)
            ptrace.interrupt(tid)
            assert ptrace.wait(tid).event == ptrace.EVENT_STOP

            class Target:
                pass

            target = Target()
            target.tid, target.pid, target.places, target.facts = tid, job.pid, [], None
            target.regs, target.sigmask = ptrace.getregs(tid), ptrace.get_sigmask(tid)
            targets.append(target)
        remotes = [infect(target) for target in targets]
        for _ in range(2):
            assert [remote.call("gettid") for remote in remotes] == tids
        for remote in remotes:
            cure(remote)
        for target in targets:
            assert bytes(ptrace.getregs(target.tid)) == bytes(target.regs)
            assert ptrace.get_sigmask(target.tid) == target.sigmask
            ptrace.detach(target.tid)
        assert facts(job.pid)[0] == before


BLOCKS_ALL = """
import signal
signal.pthread_sigmask(signal.SIG_SETMASK, set(range(1, 65)) - {32, 33})
print(flush=True)
got = signal.sigwait({signal.SIGUSR1})
print(*sorted(int(sig) for sig in signal.sigpending()), flush=True)
"""


@pytest.mark.parametrize("way", ["one", "visits"])
@pytest.mark.parametrize("sent", [0, signal.SIGURG, signal.SIGWINCH])
def test_a_task_that_blocks_every_signal_keeps_those_that_come_meanwhile(monkeypatch, way, sent):
    slow = []
    monkeypatch.setattr(remote_module.RemoteTask, "_drive", counted(slow, remote_module.RemoteTask._drive))
    with running(sys.executable, "-c", BLOCKS_ALL, stdout=subprocess.PIPE, text=True) as job:
        job.stdout.readline()
        until(lambda: system_call(job.pid) == "128")  # rt_sigtimedwait
        before = proc.read_status(job.pid).sig_blocked
        assert before >> (signal.SIGURG - 1) & 1
        with stopped_process(job.pid) as process:
            batch = process.parasite.batch()
            if sent:
                batch.call("kill", job.pid, sent)
            pid = batch.call("getpid")
            if way == "one":
                results = process.parasite.run(batch)
            else:
                process.parasite.park()
                (results,) = visits.visit(process.parasite, [process.leader], batch)
            assert results[pid] == job.pid
            # Mapping takes two calls through a gadget; the batch itself is one stop.
            assert [until for until in slow if until == lib.SNAP_SENTINEL] == []
            assert process.parasite.call("getpid") == job.pid
        until(lambda: system_call(job.pid) == "128")
        assert proc.read_status(job.pid).sig_blocked == before
        os.kill(job.pid, signal.SIGUSR1)
        assert job.stdout.readline().split() == ([str(int(sent))] if sent else [])


def test_seccomp_filter_is_suspended():
    # A filter that kills for getpid: the parasite may call it, the job lives on
    script = (
        "import ctypes,struct,time\nlibc=ctypes.CDLL(None)\nlibc.prctl(38,1,0,0,0)\n"
        "prog=b''.join(struct.pack('<HBBI',*i) for i in [(0x20,0,0,0),(0x15,0,1,39),(6,0,0,0x80000000),(6,0,0,0x7fff0000)])\n"
        "buf=ctypes.create_string_buffer(prog)\n"
        "fprog=ctypes.create_string_buffer(struct.pack('<H6xQ',4,ctypes.addressof(buf)))\n"
        "assert libc.prctl(22,2,fprog)==0\n"
        "while True: time.sleep(0.01)\n"
    )
    with running(sys.executable, "-c", script) as job:
        until(lambda: proc.read_status(job.pid).seccomp == 2)
        before = facts(job.pid)[0]
        with Parasite(job.pid) as task:
            batch = task.batch()
            pid = batch.call("getpid")
            batch.call("getuid")
            assert task.run(batch)[pid] == job.pid
        assert facts(job.pid)[0] == before
        time.sleep(0.05)
        assert job.poll() is None


def test_a_vfork_parent_is_refused_by_name(monkeypatch, tmp_path):
    from checkpoint.parasite import infection

    monkeypatch.setattr(infection, "_STOP_TIMEOUT_S", 0.2)
    source = tmp_path / "vfork.c"
    source.write_text(
        "#define _GNU_SOURCE\n#include <unistd.h>\nint main(){ if(!vfork()) { for(;;) pause(); } }\n"
    )
    subprocess.run(["gcc", "-o", tmp_path / "vfork", source], check=True)
    with running(tmp_path / "vfork") as job:
        child = until(lambda: tasks.children(job.pid, proc.threads(job.pid)))[0]
        with pytest.raises(UnsupportedError, match="vfork"), Parasite(job.pid):
            pass
        os.kill(child, signal.SIGKILL)


def test_a_process_that_is_gone_is_target_gone():
    job = subprocess.Popen(["true"])
    job.wait()
    with pytest.raises(TargetGoneError), Parasite(job.pid):
        pass


def test_a_target_that_dies_meanwhile_is_target_gone(sleeper):
    with Parasite(sleeper.pid) as task:
        task.call("getpid")
        os.kill(sleeper.pid, signal.SIGKILL)
        with pytest.raises(TargetGoneError):
            task.call("getpid")


# -- stubs ---------------------------------------------------------------------------------------------------------


def free_pid():
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    return child


PAUSE = b"\xb8\x22\0\0\0\x0f\x05\xeb\xf7"


@pytest.mark.requires("clone3_set_tid")
def test_stub_tree_gets_its_pids_and_runs_alone():
    pid = free_pid()
    stub = spawn_root_stub(pid)
    made = [stub]
    try:
        stub.map_arena(0x10000000, 1 << 20)
        stub.unmap_all_but_arena()
        names = [entry.path for entry in proc.read_maps(pid)]
        assert set(names) <= {"", "[vsyscall]"}
        child_pid = free_pid()
        child = stub.fork_child(child_pid)
        made.append(child)
        assert (child.call("getpid"), child.call("getppid")) == (child_pid, pid)
        tid = free_pid()
        thread = child.clone_thread(tid)
        assert (thread.call("gettid"), thread.call("getpid"), child.call("gettid")) == (
            tid,
            child_pid,
            child_pid,
        )
        child.call("mmap", 0x400000, 4096, 5, 0x32, -1, 0)
        child.mem.write(0x400000, PAUSE)
        for task, last in ((thread, False), (child, True)):
            regs = ptrace.getregs(task.tid)
            regs.rip, regs.orig_rax = 0x400000, ptrace.NOT_IN_SYSCALL
            task.finish(regs, unmap_arena=last)
        thread.detach()
        child.detach()
        assert next(entry.start for entry in proc.read_maps(child_pid)) == 0x400000
        until(
            lambda: proc.wchan(child_pid).endswith("pause") and proc.wchan(child_pid, tid).endswith("pause")
        )
    finally:
        for task in reversed(made):
            task.kill()
    until(lambda: not os.path.exists(f"/proc/{child_pid}") or proc.read_stat(child_pid).is_zombie)


@pytest.mark.requires("clone3_set_tid")
def test_a_taken_pid_is_a_conflict(sleeper):
    with pytest.raises(RestoreConflictError, match="taken"):
        spawn_root_stub(sleeper.pid)
    stub = spawn_root_stub()
    try:
        stub.map_arena(0x10000000, 1 << 20)
        with pytest.raises(RestoreConflictError, match="taken"):
            stub.fork_child(sleeper.pid)
    finally:
        stub.kill()


@pytest.mark.requires("clone3_set_tid")
def test_stubs_die_with_their_tracer(tmp_path):
    script = (
        "import os\nfrom checkpoint.parasite import spawn_root_stub\n"
        "s=spawn_root_stub()\ns.map_arena(0x10000000,1<<20)\n"
        "child=os.fork()\n"
        "if child==0: os._exit(0)\n"
        "os.waitpid(child,0)\n"
        "c=s.fork_child(child)\nprint(s.pid,c.pid,flush=True)\nos.kill(os.getpid(),9)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    pids = [int(word) for word in done.stdout.split()]
    assert len(pids) == 2, done.stderr
    until(lambda: all(not os.path.exists(f"/proc/{pid}") or proc.read_stat(pid).is_zombie for pid in pids))


def test_layouts_are_the_compilers():
    assert ctypes.sizeof(ptrace.Regs) == 216


@pytest.mark.requires("clone3_set_tid")
def test_a_stub_loads_extended_state_by_itself():
    """How AMX state, which ptrace does not take before its first use, gets into a stub; here with SSE and x87."""
    stub = spawn_root_stub()
    try:
        stub.map_arena(0x10000000, 1 << 20)
        stub.unmap_all_but_arena()
        xstate = bytearray(ptrace.get_xstate(stub.tid))
        in_use = int.from_bytes(xstate[512:520], "little") | 0b11
        xstate[512:520] = in_use.to_bytes(8, "little")
        xstate[160:416] = bytes(range(256))
        stub.load_xstate(bytes(xstate))
        assert ptrace.get_xstate(stub.tid)[160:416] == bytes(range(256))
        assert stub.call("getpid") == stub.pid
    finally:
        stub.kill()
