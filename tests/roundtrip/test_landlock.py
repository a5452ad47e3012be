"""Landlock domains are found out by a take and refused; the job goes on as it was, still confined."""

from __future__ import annotations

import pathlib

import pytest

from checkpoint.resources import landlock
from snapshotter.base.errors import UnsupportedError
from tests import memory_store
from tests.jobs import SnapFailedError, is_running, snap, state, wait_until

pytestmark = pytest.mark.requires("root", "landlock")

JOB = """
import ctypes, os, struct, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
def confine():
    rules = struct.pack("Q", 1 << 1 | 1 << 2)  # LANDLOCK_ACCESS_FS_WRITE_FILE, READ_FILE: nothing is allowed
    fd = libc.syscall(444, rules, len(rules), 0)
    libc.prctl(38, 1, 0, 0, 0)
    assert libc.syscall(446, fd, 0) == 0
    os.close(fd)
def thread_ids():
    for number in (119, 117):  # setresgid, setresuid: of this thread alone
        assert libc.syscall(number, 65534, 65534, 65534) == 0
def run(*steps):
    for step in steps: step()
    barrier.wait()
    try: open("/etc/hostname"); seen = "open"
    except PermissionError: seen = "denied"
    os.write(said, f"{seen}\\n".encode())
    while True: time.sleep(0.01)
kind = sys.argv[1]
said = os.open("said", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
steps = {"free": [[], []], "process": [[], []], "thread": [[], [confine]], "ids": [[], [thread_ids]], "both": [[], [thread_ids, confine]]}[kind]
if kind == "process": confine()
barrier = threading.Barrier(2)
threading.Thread(target=run, args=steps[1]).start()
run(*steps[0])
"""


@pytest.fixture
def started(start, tmp_path):
    """A job of that kind, in which all threads have said what they may do."""
    tmp_path.chmod(0o777)

    def run(kind: str, **ids) -> int:
        said = tmp_path / "said"
        said.unlink(missing_ok=True)
        pid = start("/usr/bin/python3", "-c", JOB, kind, **ids)
        wait_until(lambda: said.exists() and len(said.read_text().split()) == 2, f"the {kind} job is ready")
        return pid

    return run


NOBODY = {"user": 65534, "group": 65534, "extra_groups": []}


@pytest.mark.parametrize(
    ("kind", "where", "ids"),
    [
        ("process", "task {0}: ", {}),
        ("process", "task {0}: ", NOBODY),
        ("thread", "thread", {}),
        ("thread", "thread", NOBODY),
        ("both", "thread", {}),
    ],
    ids=["root", "nobody", "thread of root", "thread of nobody", "thread with ids of its own"],
)
def test_a_domain_is_refused_by_name(started, kind, where, ids):
    pid = started(kind, **ids)
    with pytest.raises(UnsupportedError, match="is confined by Landlock") as error:
        memory_store.take(pid)
    assert where.format(pid) in str(error.value)
    assert error.value.findings
    assert is_running(pid)
    assert state(pid) != "T"
    assert "TracerPid:\t0" in pathlib.Path(f"/proc/{pid}/status").read_text()


@pytest.mark.parametrize(("kind", "ids"), [("free", {}), ("free", NOBODY), ("ids", {})])
def test_what_has_no_domain_is_taken_without_a_word(started, kind, ids):
    """A thread with ids of its own may not look at the bystander of its process, and yet is not confined."""
    point = memory_store.take(started(kind, **ids))
    assert not [text for text in point.result.warnings if "Landlock" in text]


def test_root_without_rights_is_taken(start, tmp_path):
    """Root that has dropped its capabilities may look at nobody who has some: the bystander has none."""
    drop = (
        "import ctypes,struct,time;"
        "libc=ctypes.CDLL(None);libc.capset(struct.pack('Ii',0x20080522,0),struct.pack('6I',*[0]*6));"
        "open('ready','w').close();time.sleep(1000)"
    )
    pid = start("/usr/bin/python3", "-c", drop)
    wait_until((tmp_path / "ready").exists, "without capabilities")
    memory_store.take(pid)


def test_ids_that_snap_may_not_have_are_a_warning(started, monkeypatch):
    monkeypatch.setattr(landlock, "_start", lambda _: None)
    point = memory_store.take(started("process", **NOBODY))
    assert [text for text in point.result.warnings if "cannot be told whether Landlock confines it" in text]


def test_check_says_what_only_a_take_can_see(started, tmp_path_factory):
    pid = started("process", **NOBODY)
    store = tmp_path_factory.mktemp("store")
    said = snap("check", pid, store=store)
    assert said["ok"]
    assert any("Landlock" in text for text in said["unseen"])
    with pytest.raises(SnapFailedError) as error:
        snap("take", pid, store=store)
    assert error.value.status == 5
    assert "Landlock" in error.value.error["message"]
