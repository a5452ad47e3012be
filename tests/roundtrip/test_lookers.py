"""Descriptors that show a process: a rollback shows no memory that the job's own rights could not obtain.

A job of nobody has descriptors of its child's /proc files, in its table or in flight in a socket. The child executes a program
that gives it more rights, before the look or between look and freeze. Without snap they show nothing from then on.
"""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import signal
import subprocess

import pytest

from checkpoint import dump
from checkpoint.check import check
from checkpoint.model.access import Subject, may_look
from checkpoint.resources.files import lookers
from snapshotter.base import faults
from snapshotter.base.errors import RestoreConflictError, UnsupportedError
from tests import memory_store
from tests.jobs import is_running, state, wait_until
from tests.roundtrip.engine_jobs import kill

pytestmark = pytest.mark.requires("root")

NOBODY = {"user": 65534, "group": 65534, "extra_groups": []}
MEMORY = ["mem", "maps", "environ", "pagemap", "smaps", "smaps_rollup"]
OTHERS = ["auxv", "syscall", "stack", "io", "fd"]
JOB = """
import array, json, os, signal, socket, sys, time
where, program, *names = sys.argv[1:]
here = socket.socketpair()
child = os.fork()
if child == 0:
    for end in here: end.close()
    signal.signal(signal.SIGUSR2, lambda *_: os.execv(program, [program, "1000"]))
    open("child", "w").close()
    while True: time.sleep(0.01)
while not os.path.exists("child"): time.sleep(0.01)
fds = [os.open(f"/proc/{child}/{name}", os.O_RDONLY) for name in names]
if where == "flight":
    socket.send_fds(here[0], [b"x"], fds)
    for fd in fds: os.close(fd)
def look(fd, name):
    try:
        if name == "fd": return len(os.listdir(fd))
        at = 0
        if name in ("mem", "pagemap"):
            if not shared: at = int(open(f"/proc/{child}/stat").read().rpartition(")")[2].split()[25])
            at = at & -16 if name == "mem" else at // 4096 * 8
        return len(os.pread(fd, 256, at))
    except OSError as error:
        return error.strerror
shared = False
def tell(*_):
    global fds
    if where == "flight": fds = socket.recv_fds(here[1], 1, len(names))[1]
    seen = {name: look(fd, name) for fd, name in zip(fds, names)}
    with open("seen.new", "w") as file: json.dump(seen, file)
    os.rename("seen.new", "seen")
signal.signal(signal.SIGUSR1, tell)
with open("ready.new", "w") as file: file.write(str(child))
os.rename("ready.new", "ready")
while True: time.sleep(0.01)
"""
GAINS = ["set-uid", "set-gid", "file capability"]


@pytest.fixture
def programs(tmp_path):
    """sleep(1), plain and with each way to more rights."""
    for folder in tmp_path.parents:
        if folder.stat().st_mode & 0o005 != 0o005 and folder != pathlib.Path("/"):
            folder.chmod(folder.stat().st_mode | 0o005)
    folder = tmp_path / "programs"
    folder.mkdir()
    found = {}
    for kind in ["plain", *GAINS]:
        found[kind] = folder / kind.replace(" ", "-")
        shutil.copy(shutil.which("sleep"), found[kind])
    found["set-uid"].chmod(0o4755)
    found["set-gid"].chmod(0o2755)
    # Version 2, effective, permitted: CAP_NET_RAW.
    os.setxattr(
        found["file capability"],
        "security.capability",
        bytes.fromhex("0100000200200000000000000000000000000000"),
    )
    return found


def executes(pid: int) -> str:
    """What a process runs; "" when it has ended."""
    try:
        return os.readlink(f"/proc/{pid}/exe")
    except FileNotFoundError:
        return ""


@pytest.fixture
def started(start, programs, tmp_path):
    """The job, ready: (pid, pid of its child, what has the child execute its program)."""
    tmp_path.chmod(0o777)

    def run(where, kind, names):
        pid = start("/usr/bin/python3", "-c", JOB, where, str(programs[kind]), *names, **NOBODY)
        wait_until((tmp_path / "ready").exists, "the job is ready")
        child = int((tmp_path / "ready").read_text())

        def execute() -> None:
            os.kill(child, signal.SIGUSR2)
            wait_until(lambda: executes(child) in {str(programs[kind]), ""}, "it has executed it")
            assert executes(child), (tmp_path / "out").read_text()

        return pid, child, execute

    return run


@pytest.fixture
def after_the_look(monkeypatch):
    def do(what) -> None:
        real = faults.point

        def point(name: str) -> None:
            real(name)
            if name == "dump.looked":
                what()

        monkeypatch.setattr(dump.faults, "point", point)

    return do


def seen_after_rollback(pid, point, tmp_path) -> dict[str, object]:
    kill(pid)
    memory_store.rollback(point)
    os.kill(pid, signal.SIGUSR1)
    wait_until((tmp_path / "seen").exists, "it has looked")
    return json.loads((tmp_path / "seen").read_text())


@pytest.mark.parametrize("where", ["table", "flight"])
@pytest.mark.parametrize("when", ["before", "between"])
@pytest.mark.parametrize("kind", ["plain", *GAINS])
def test_memory_of_before_an_exec_comes_back_as_nothing(started, tmp_path, after_the_look, where, when, kind):
    pid, _, execute = started(where, kind, MEMORY)
    if when == "before":
        execute()
    else:
        after_the_look(execute)
    point = memory_store.take(pid)
    assert any(
        "shows nothing since its process has executed another program" in one for one in point.result.warnings
    )
    for name, seen in seen_after_rollback(pid, point, tmp_path).items():
        assert seen in {0, "No such process"}, (name, seen)


@pytest.mark.parametrize("where", ["table", "flight"])
def test_memory_that_is_there_still_is_shown(started, tmp_path, where):
    pid, _, _ = started(where, "plain", [*MEMORY, *OTHERS[:1], "io"])
    point = memory_store.take(pid)
    for name, seen in seen_after_rollback(pid, point, tmp_path).items():
        assert isinstance(seen, int) and seen > 0, (name, seen)


@pytest.mark.parametrize("where", ["table", "flight"])
@pytest.mark.parametrize("kind", GAINS)
@pytest.mark.parametrize("name", OTHERS)
def test_what_could_not_be_opened_now_is_refused(started, where, kind, name):
    """Files that are not bound to the memory: they go on being about the process, which has more rights by now."""
    pid, child, execute = started(where, kind, [name])
    execute()
    with pytest.raises(
        UnsupportedError, match=rf"is about process {child}|before it executed another"
    ) as error:
        memory_store.take(pid)
    assert is_running(pid)
    if where == "table":
        assert [str(one) for one in check(pid).findings] == [str(one) for one in error.value.findings]


def test_what_root_handed_down_is_refused(start, programs, tmp_path):
    """The memory of a set-uid program, which nobody could not have opened himself."""
    tmp_path.chmod(0o777)
    holder = (
        "import os,subprocess,sys,time;"
        "s=subprocess.Popen([sys.argv[1],'1000'],user=65534,group=65534,extra_groups=[]);"
        "m=os.open(f'/proc/{s.pid}/maps',os.O_RDONLY);"
        "n=subprocess.Popen(['sleep','1000'],user=65534,group=65534,extra_groups=[],pass_fds=[m]);"
        "open('ready','w').close();time.sleep(1000)"
    )
    pid = start("/usr/bin/python3", "-c", holder, str(programs["set-uid"]))
    wait_until((tmp_path / "ready").exists, "handed down")
    with pytest.raises(UnsupportedError, match=r"user 65534\) may not look into"):
        memory_store.take(pid)


@pytest.mark.parametrize(
    ("path", "mine"), [("/proc/vmallocinfo", False), ("/proc/loadavg", True), ("/proc/self/stat", True)]
)
def test_a_file_of_the_system_that_root_handed_down(start, path, mine):
    """nobody could not open it by himself."""
    text = "import os,subprocess,sys;os.execvp(sys.argv[2],sys.argv[2:])"
    with open(path, "rb") as file:
        pid = start("/usr/bin/python3", "-c", text, "-", "sleep", "1000", pass_fds=[file.fileno()], **NOBODY)
        wait_until(lambda: executes(pid).endswith("sleep"), "it sleeps")
        found = check(pid).findings
        if path == "/proc/self/stat":  # of the test itself, which is outside; anybody may read it
            assert not found
        elif mine:
            assert not found
            memory_store.take(pid)
        else:
            with pytest.raises(UnsupportedError, match=r"may not open by its own rights") as error:
                memory_store.take(pid)
            assert [str(one) for one in error.value.findings] == [str(one) for one in found]


def test_no_more_is_shown_than_to_who_opened_it(start, tmp_path):
    """Numbers of page frames, which the kernel shows to a file that root has opened."""
    tmp_path.chmod(0o777)
    job = """
import os, signal, struct, time
fd = os.open("/proc/self/pagemap", os.O_RDONLY)
symbols = os.open("/proc/kallsyms", os.O_RDONLY)
def tell(*_):
    at = int(open("/proc/self/stat").read().rpartition(")")[2].split()[25]) // 4096 * 8
    frame = struct.unpack("Q", os.pread(fd, 8, at))[0] & (1 << 55) - 1
    with open("seen.new", "w") as file: file.write(f"{frame} {int(os.pread(symbols, 16, 0), 16)}")
    os.rename("seen.new", "seen")
signal.signal(signal.SIGUSR1, tell)
open("ready", "w").close()
while True: time.sleep(0.01)
"""
    pid = start("/usr/bin/python3", "-c", job, **NOBODY)
    wait_until((tmp_path / "ready").exists, "ready")
    point = memory_store.take(pid)
    kill(pid)
    memory_store.rollback(point)
    os.kill(pid, signal.SIGUSR1)
    wait_until((tmp_path / "seen").exists, "it has looked")
    assert (tmp_path / "seen").read_text() == "0 0"


def test_a_process_outside_is_judged_again_at_the_rollback(start, programs, tmp_path):
    tmp_path.chmod(0o777)
    outside = subprocess.Popen(
        [
            "/usr/bin/python3",
            "-c",
            f"import os; input(); os.execv({str(programs['set-uid'])!r}, ['s', '1000'])",
        ],
        stdin=subprocess.PIPE,
        **NOBODY,
    )
    with outside:
        try:
            job = "import os,sys,time;f=os.open(f'/proc/{sys.argv[1]}/io',os.O_RDONLY);open('ready','w').close();time.sleep(1000)"
            pid = start("/usr/bin/python3", "-c", job, str(outside.pid), **NOBODY)
            wait_until((tmp_path / "ready").exists, "ready")
            point = memory_store.take(pid)
            outside.stdin.write(b"\n")
            outside.stdin.flush()
            wait_until(lambda: os.stat(f"/proc/{outside.pid}/maps").st_uid == 0, "it has more rights")
            with pytest.raises(RestoreConflictError, match="may not look into now"):
                memory_store.rollback(point)
            assert is_running(pid)
        finally:
            outside.kill()


def test_a_working_directory_in_proc_that_was_entered_after_the_look(start, tmp_path, after_the_look):
    job = "import os,signal,time;signal.signal(signal.SIGUSR1,lambda *_:os.chdir(f'/proc/{os.getpid()}'));open('ready','w').close()\nwhile True: time.sleep(.01)"
    pid = start("/usr/bin/python3", "-c", job)
    wait_until((tmp_path / "ready").exists, "ready")

    def enter() -> None:
        os.kill(pid, signal.SIGUSR1)
        wait_until(lambda: os.readlink(f"/proc/{pid}/cwd") == f"/proc/{pid}", "it has changed its directory")

    after_the_look(enter)
    with pytest.raises(UnsupportedError, match="its working directory is one of a process"):
        memory_store.take(pid)
    assert is_running(pid)
    assert check(pid).findings


@pytest.mark.parametrize("name", ["mem", "maps", "smaps", "environ", "auxv"])
def test_an_address_space_that_is_alive_and_another(start, name):
    """What is left of one that others share, when its process has executed a program. Seen here: that of another process."""
    first = start("sleep", "1000", env={"A": "1"})
    second = start("/usr/bin/python3", "-c", "import time; time.sleep(1000)", env={"B": "2"})
    for pid in (first, second):
        wait_until(lambda pid=pid: state(pid) == "S", "it sleeps")
    with open(f"/proc/{first}/{name}", "rb", buffering=0) as file:
        assert lookers.shows(file.fileno(), first, name.encode()) == "same"
        # What is not mapped there cannot be read there: nothing, and that is what comes back.
        assert lookers.shows(file.fileno(), second, name.encode()) in {"other", "nothing"}
        assert name == "mem" or lookers.shows(file.fileno(), second, name.encode()) == "other"


USER = Subject(1, (9, 9, 9, 9), (9, 9, 9, 9), 0, 0, dumpable=True)
ROOT = Subject(2, (0, 0, 0, 0), (0, 0, 0, 0), 1 << 21, 1 << 21, dumpable=False)


@pytest.mark.parametrize(
    ("caller", "target", "may"),
    [
        (USER, Subject(3, (9, 9, 9, 9), (9, 9, 9, 9), 0, 0, dumpable=True), True),
        (USER, Subject(3, (9, 9, 9, 9), (9, 9, 9, 9), 0, 0, dumpable=False), False),
        (USER, Subject(3, (9, 0, 9, 9), (9, 9, 9, 9), 0, 0, dumpable=True), False),
        (USER, Subject(3, (9, 9, 9, 9), (9, 5, 5, 5), 0, 0, dumpable=True), False),
        (USER, Subject(3, (9, 9, 9, 9), (9, 9, 9, 9), 1, 1, dumpable=True), False),
        (USER, ROOT, False),
        (ROOT, USER, False),
        (ROOT, ROOT, True),
        (Subject(4, (9, 9, 9, 9), (9, 9, 9, 9), 1 << 19, 1 << 19, dumpable=True), ROOT, True),
    ],
)
def test_the_rule(caller, target, may):
    assert may_look(caller, target) is may
