"""Bad input through the command line: a clear error (what, where, what to do), its exit status, nothing changed."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest

from tests.counting import COUNTER, count, fails, goes_on
from tests.jobs import ROOT, SNAP, SnapFailedError, is_running, reap, snap, state, wait_until

pytestmark = pytest.mark.requires("root")


def no_points(store) -> bool:
    return not store.exists() or snap("list", store=store)["points"] == []


# The target


def test_no_such_pid(tmp_path):
    child = subprocess.Popen(["true"])
    child.wait()
    for command in ("take", "check"):
        error = fails(4, command, child.pid, store=tmp_path / "s")
        assert str(child.pid) in error["message"]
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("pid", [0, 1 << 30])
def test_no_pid_at_all(pid, tmp_path):
    assert "ps -e" in fails(2, "take", pid, store=tmp_path / "s")["hint"]


def test_a_thread_is_no_process(tmp_path):
    over = threading.Event()
    thread = threading.Thread(target=over.wait)
    thread.start()
    try:
        for command in ("take", "check"):
            error = fails(4, command, thread.native_id, store=tmp_path / "s")
            assert f"thread of process {os.getpid()}" in error["message"]
            assert str(os.getpid()) in error["hint"]
    finally:
        over.set()
        thread.join()
    assert not (tmp_path / "s").exists()


def test_kernel_thread(tmp_path):
    if pathlib.Path("/proc/2/comm").exists() and pathlib.Path("/proc/2/comm").read_text() == "kthreadd\n":
        error = fails(5, "take", 2, store=tmp_path / "s")
        assert error["message"] == "task 2: is a kernel thread"
        assert not (tmp_path / "s").exists()
    else:
        pytest.skip("no kernel threads are visible in this pid namespace")


def test_itself_and_ancestors(tmp_path):
    error = fails(5, "take", os.getpid(), store=tmp_path / "s")
    assert "ancestor of snap" in error["message"]
    assert "outside" in error["hint"]
    # Itself: the shell becomes snap, so that its pid is known beforehand.
    command = f'exec "$0" -m snapshotter.cli.main --store {tmp_path}/s take $$ --json'
    done = subprocess.run(
        ["sh", "-c", command, sys.executable],
        env=dict(os.environ, PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 5, done.stdout + done.stderr
    assert "snap itself" in done.stdout
    assert not (tmp_path / "s").exists()


def test_zombie(tmp_path):
    child = subprocess.Popen(["true"])
    wait_until(lambda: state(child.pid) == "Z", "a zombie")
    error = fails(4, "take", child.pid, store=tmp_path / "s")
    assert "zombie" in error["message"]
    assert str(os.getpid()) in error["hint"]
    child.wait()


TRACE = """
syscall(101, 16, $ARGV[0] + 0, 0, 0) == 0 or die;  # PTRACE_ATTACH
waitpid($ARGV[0], 0x40000000);
syscall(101, 7, $ARGV[0] + 0, 0, 0);  # PTRACE_CONT
$| = 1;
print "ok\\n";
sleep 60;
"""


def test_already_traced(counter, tmp_path):
    tracer = subprocess.Popen(["perl", "-e", TRACE, str(counter.pid)], stdout=subprocess.PIPE)
    try:
        assert tracer.stdout.readline() == b"ok\n"
        error = fails(5, "take", counter.pid, store=tmp_path / "s")
        assert f"traced by task {tracer.pid} (perl)" in error["message"]
        assert "detach" in error["hint"]
        assert not (tmp_path / "s").exists()
    finally:
        tracer.kill()
        tracer.wait()
        tracer.stdout.close()
    goes_on(counter)


def test_32_bit_task(tmp_path):
    source = tmp_path / "a.c"
    source.write_text('void _start(void) { for (;;) __asm__ volatile("int $0x80" :: "a"(29)); }\n')
    made = subprocess.run(
        ["gcc", "-m32", "-static", "-nostdlib", "-o", tmp_path / "a", source],
        capture_output=True,
        check=False,
    )
    if made.returncode:
        pytest.skip("gcc cannot make 32-bit programs here")
    try:
        child = subprocess.Popen([tmp_path / "a"])
    except OSError:
        pytest.skip("this kernel does not run 32-bit programs")
    try:
        if (status := child.poll()) is not None:
            pytest.skip(f"this kernel does not run 32-bit programs (status {status})")
        error = fails(5, "take", child.pid, store=tmp_path / "s")
        assert "32-bit" in error["message"]
        assert str(child.pid) in error["message"]
        assert "64-bit" in error["hint"]
        assert child.poll() is None
        assert not (tmp_path / "s").exists()
    finally:
        child.kill()
        child.wait()


def as_nobody(*args, store) -> subprocess.CompletedProcess[str]:
    """snap as a user who may read files (this checkout and its python may lie where only root looks) and nothing else."""
    user = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    may_read = ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]
    return subprocess.run(
        [*user, *may_read, *SNAP, "--store", store, *map(str, args), "--json"],
        env=dict(os.environ, PYTHONPATH=str(ROOT), HOME="/nonexistent"),
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.requires("program:setpriv")
def test_no_permission(counter, tmp_path):
    folder = tmp_path / "s"
    folder.mkdir(mode=0o700)
    os.chown(folder, 65534, 65534)
    for command in ("take", "check"):
        done = as_nobody(command, counter.pid, store=folder)
        assert done.returncode == 6, done.stdout + done.stderr
        error = json.loads(done.stdout)["error"]
        assert error["code"] == "permission"
        assert f"task {counter.pid}" in error["message"]
        assert "root" in error["hint"]
    assert not list(folder.iterdir())
    goes_on(counter)


@pytest.mark.requires("program:setpriv")
def test_somebody_elses_store(counter, tmp_path):
    snap("take", counter.pid, store=tmp_path / "s")
    for line in (["take", counter.pid], ["list"], ["verify"], ["prune"], ["rollback", "latest"]):
        done = as_nobody(*line, store=tmp_path / "s")
        assert done.returncode == 6, done.stdout + done.stderr
        error = json.loads(done.stdout)["error"]
        assert "belongs to uid 0" in error["message"] or f"task {counter.pid}" in error["message"]
        assert error["hint"]
    assert len(snap("list", store=tmp_path / "s")["points"]) == 1
    goes_on(counter)


def test_ends_during_the_take(tmp_path):
    """Killed at many instants of a take: a point, or a clean "it is gone"; never anything else."""
    statuses = set()
    for number in range(12):
        child = subprocess.Popen(
            [sys.executable, "-c", "import time; x = bytearray(1 << 24); time.sleep(60)"]
        )
        take = subprocess.Popen(
            [*SNAP, "--store", tmp_path / "s", "take", str(child.pid), "--json"],
            env=dict(os.environ, PYTHONPATH=str(ROOT)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        with contextlib.suppress(subprocess.TimeoutExpired):
            take.wait(0.15 + number * 0.04)
        child.kill()
        out, err = take.communicate(timeout=60)
        child.wait()
        # 5: it became a zombie between two looks of the engine.
        assert take.returncode in {0, 4, 5}, out + err
        statuses.add(take.returncode)
    assert statuses


def test_forks_as_fast_as_it_can(job):
    job.start(["bash", "-c", "while :; do (:) & (:) & wait; done"])
    for _ in range(3):
        try:
            job.take()
        except SnapFailedError as error:
            # A child that came and went may be refused, never half dumped.
            assert error.status in {1, 4, 5}, error
    assert is_running(job.pid)


# Names of points, stores


def test_unknown_and_ambiguous_ids(counter):
    counter.take()
    for text in ("ffffffff", "nojob", "latest~7", "test~9"):
        assert text.split("~")[0] in fails(13, "rollback", text, store=counter.store)["message"]
        fails(13, "show", text, store=counter.store)
        fails(13, "forget", text, store=counter.store)
        fails(13, "verify", text, store=counter.store)
    fails(13, "show", counter.points[0]["id"][:3], store=counter.store)
    goes_on(counter)


def test_no_store(tmp_path):
    for command in (
        ["list"],
        ["rollback", "latest"],
        ["verify"],
        ["prune"],
        ["forget", "abcd"],
        ["show", "latest"],
    ):
        error = fails(10, *command, store=tmp_path / "none")
        assert str(tmp_path / "none") in error["message"]
    assert not (tmp_path / "none").exists()


def test_a_directory_that_is_no_store(counter, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("mine")
    fails(10, "take", counter.pid, store=tmp_path / "other")
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["file"]
    goes_on(counter)


def test_a_file_is_no_store(counter, tmp_path):
    (tmp_path / "plain").write_text("")
    lines = (
        ["take", counter.pid], ["list"], ["show", "latest"], ["verify"], ["prune"], ["rollback", "latest"],
        ["forget", "abcd"],
    )  # fmt: skip
    for line in lines:
        for store in (tmp_path / "plain", tmp_path / "plain" / "below"):
            error = fails(10, *line, store=store)
            assert str(tmp_path / "plain") in error["message"]
    assert (tmp_path / "plain").read_text() == ""
    goes_on(counter)


def test_read_only_store(counter, tmp_path):
    mount = tmp_path / "mount"
    mount.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", mount], capture_output=True, check=False).returncode:
        pytest.skip("cannot mount here")
    try:
        snap("take", counter.pid, store=mount / "s")
        subprocess.run(["mount", "-o", "remount,ro", mount], check=True)
        error = fails(1, "take", counter.pid, store=mount / "s")
        assert "read-only" in (error["message"] + error["hint"]).lower()
        assert len(snap("list", store=mount / "s")["points"]) == 1
    finally:
        subprocess.run(["umount", "-l", mount], check=True)
    goes_on(counter)


def test_full_disk(counter, tmp_path):
    mount = tmp_path / "mount"
    mount.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", mount], capture_output=True, check=False
    )
    if made.returncode:
        pytest.skip("cannot mount here")
    try:
        error = fails(1, "take", counter.pid, store=mount / "s")
        assert "space" in error["message"].lower()
        subprocess.run(["mount", "-o", "remount,size=200m", mount], check=True)
        snap("take", counter.pid, store=mount / "s")
        assert snap("verify", store=mount / "s")["ok"]
    finally:
        subprocess.run(["umount", "-l", mount], check=True)
    goes_on(counter)


def packs(store) -> list[pathlib.Path]:
    return sorted(
        (path for path in pathlib.Path(store).rglob("*") if path.suffix == ".pack"),
        key=os.path.getmtime,
    )


def damaged(counter, harm) -> None:
    """Harm what only the second point needs: it is named, the first one still restores."""
    counter.take()
    first = set(packs(counter.store))
    os.kill(counter.pid, signal.SIGUSR1)
    wait_until((counter.directory / "grown").exists, "new memory")
    counter.take()
    new = [path for path in packs(counter.store) if path not in first]
    assert new, "the second point made no pack of its own"
    for path in new:
        harm(path)
    with pytest.raises(SnapFailedError) as caught:
        snap("verify", store=counter.store)
    assert caught.value.status == 12
    assert counter.points[1]["id"] in caught.value.stderr
    assert counter.points[0]["id"] not in caught.value.stderr.split('"points_hurt"')[1].split("]")[0]
    pid = counter.pid
    fails(12, "rollback", counter.points[1]["id"], store=counter.store)
    assert is_running(pid), "the living job was touched before the point was checked"
    counter.rollback(counter.points[0]["id"])
    goes_on(counter)


GROWER = (
    """
import os, signal, sys, time
kept = []
def grow(*_):
    kept.append(os.urandom(1 << 20))
    open(sys.argv[1] + "/grown", "w").close()
signal.signal(signal.SIGUSR1, grow)
"""
    + COUNTER
)


@pytest.fixture
def grower(job):
    job.start([sys.executable, "-c", GROWER])
    wait_until(lambda: count(job) > 3, "the counter counting")
    return job


def flip(path: pathlib.Path) -> None:
    data = bytearray(path.read_bytes())
    for at in range(0, len(data), 512):
        data[at] ^= 0x55
    path.chmod(0o600)
    path.write_bytes(data)


def cut(path: pathlib.Path) -> None:
    path.chmod(0o600)
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("harm", [flip, cut, pathlib.Path.unlink], ids=["corrupt", "truncated", "missing"])
def test_damaged_pack(grower, harm):
    damaged(grower, harm)


# Rollback


def test_pid_taken_by_something_else(counter):
    """Cannot be arranged without a race by plain fork: ns_last_pid makes the next fork get the pid."""
    counter.take("--kill")
    pid = counter.pid
    try:
        pathlib.Path("/proc/sys/kernel/ns_last_pid").write_text(str(pid - 1))
    except OSError:
        pytest.skip("cannot set ns_last_pid")
    squatter = subprocess.Popen(["sleep", "60"])
    try:
        if squatter.pid != pid:
            pytest.skip("another fork got the pid")
        error = fails(7, "rollback", "latest", store=counter.store)
        assert str(pid) in error["message"]
        assert "sleep" in error["message"] + error["hint"]
        assert squatter.poll() is None
    finally:
        squatter.kill()
        squatter.wait()
    counter.rollback()
    goes_on(counter)


def test_pid_held_by_an_unreaped_zombie(counter):
    counter.take()
    os.kill(counter.pid, signal.SIGKILL)
    wait_until(lambda: state(counter.pid) == "Z", "a zombie of ours")
    error = fails(7, "rollback", "latest", store=counter.store)
    assert str(os.getpid()) in error["message"] + error["hint"]
    reap(counter.pid)
    counter.rollback()
    goes_on(counter)


def test_changed_and_missing_executable(job, compile_program, tmp_path):
    program = tmp_path / "program"
    shutil.copy(compile_program("nothing.c"), program)
    job.start([program]).wait_ready()
    job.take("--kill")
    kept = program.rename(tmp_path / "kept")
    error = fails(7, "rollback", "latest", store=job.store)
    assert str(program) in error["message"] + error["hint"]
    shutil.copy(kept, program)
    with program.open("ab") as file:
        file.write(b"x")
    error = fails(7, "rollback", "latest", store=job.store)
    assert str(program) in error["message"] + error["hint"]
    program.unlink()
    kept.rename(program)
    job.rollback()
    assert job.finish() == "PASS"


def test_missing_open_file(job):
    (job.directory).mkdir()
    target = job.directory / "data"
    target.write_text("x" * 100)
    program = f"import time\nheld = open({str(target)!r})\nheld.read(10)\n" + COUNTER
    job.start([sys.executable, "-c", program])
    wait_until(lambda: count(job) > 3, "the counter counting")
    job.take("--kill")
    target.rename(job.directory / "moved")
    error = fails(7, "rollback", "latest", store=job.store)
    assert str(target) in error["message"] + error["hint"]
    (job.directory / "moved").rename(target)
    target.write_text("y" * 200)
    result = job.rollback()
    assert any(str(target) in text for text in result["warnings"]), result
    goes_on(job)


# Two at once, interruptions


def test_two_takes_of_one_job_at_once(counter):
    env = dict(os.environ, PYTHONPATH=str(ROOT), SNAP_FAULT="dump.looked:stop")
    command = [*SNAP, "--store", str(counter.store), "take", str(counter.pid), "--job", "test", "--json"]
    slow = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_until(lambda: state(slow.pid) == "T", "a take stopped half way")
    try:
        error = fails(11, "take", counter.pid, "--job", "test", store=counter.store)
        assert "test" in error["message"]
        pidfile = counter.store.parent / "pid"  # the job's directory is open to all: refused
        pidfile.write_text(str(counter.pid))
        line = ["take", "--job", "test", "--pidfile", str(pidfile), "--quiet"]
        assert snap(*line, store=counter.store)["skipped"] == "busy"
        goes_on(counter)
    finally:
        slow.send_signal(signal.SIGCONT)
        slow.communicate(timeout=60)
    assert slow.returncode == 0
    assert len(snap("list", store=counter.store)["points"]) == 1


def test_nobodys_pid_file_does_not_kill_roots_process(counter):
    """A daemon that dropped its rights writes its own pid file; one that writes another's process there has no say."""
    folder = counter.store.parent / "run"
    folder.mkdir()
    os.chown(folder, 65534, 65534)
    (folder / "pid").write_text(str(counter.pid))
    os.chown(folder / "pid", 65534, 65534)
    line = ["take", "--job", "test", "--pidfile", str(folder / "pid")]
    for options in ((), ("--kill",), ("--stop",)):
        error = fails(6, *line, *options, store=counter.store)
        assert "may only name that user's processes" in error["message"]
        goes_on(counter)
    os.chown(folder, 0, 0)
    os.chown(folder / "pid", 0, 0)
    assert snap(*line, store=counter.store)["pid"] == counter.pid


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_at_any_stage(counter, signum):
    statuses = []
    for number in range(10):
        command = [*SNAP, "--store", str(counter.store), "take", str(counter.pid), "--job", "test", "--json"]
        env = dict(os.environ, PYTHONPATH=str(ROOT))
        take = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        time.sleep(0.1 + number * 0.05)
        take.send_signal(signum)
        out, err = take.communicate(timeout=60)
        statuses.append(take.returncode)
        # Before main() runs there is nobody who could turn the signal into a status.
        assert take.returncode in {0, 130, -signum} or number < 3, out + err
    assert 130 in statuses or 0 in statuses
    goes_on(counter)
    if not no_points(counter.store):
        assert snap("verify", store=counter.store)["ok"]
