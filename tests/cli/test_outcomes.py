"""Through the command line and the real engine: what a take or rollback leaves, and what it refuses beforehand.

Points that no engine makes (of another boot, of another CPU, with a broken image) are copies of a real one, committed through
the store's own interface.
"""

from __future__ import annotations

import os
import pathlib
import resource
import signal
import sqlite3
import subprocess
import sys
from contextlib import contextmanager

import pytest

from images import codec
from store import PointMeta, Store
from tests.counting import COUNTER, count, fails, goes_on
from tests.jobs import ROOT, SNAP, is_running, reap, reap_all, reaping, snap, state, tree, wait_until

pytestmark = pytest.mark.requires("root")


def started(pid: int) -> str:
    """The start time: it tells one process from another with the same pid."""
    return pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19]


def continues(job) -> None:
    """The job is stopped, and SIGCONT is all that it takes."""
    wait_until(lambda: state(job.pid) == "T", "the job stopped")
    assert "TracerPid:\t0" in pathlib.Path(f"/proc/{job.pid}/status").read_text()
    os.kill(job.pid, signal.SIGCONT)
    goes_on(job)


@contextmanager
def untouched(job):
    """The very process goes on, and was not replaced by another with its pid."""
    before = started(job.pid)
    yield
    assert started(job.pid) == before
    goes_on(job)


class Pages:
    """A PageReader that reads one space of a stored point."""

    def __init__(self, reader, space):
        self.reader, self.space = reader, space

    def read_into(self, runs, buffer):
        buffer[:] = self.reader.read(self.space, runs)


def copy_point(path, original, *, images=None, manifest=None, alone=False, **meta) -> str:
    """Commit a copy of a point with other images, manifest fields or catalog entries; `alone`: the original goes."""
    with Store.open(path) as store:
        point = store.resolve(original)
        reader = store.reader(point)
        copied = {name: reader.image(name) for name in reader.image_names()}
        if manifest is not None:
            message = codec.parse("manifest", copied["manifest"])
            manifest(message)
            copied["manifest"] = codec.serialise("manifest", message)
        copied |= images or {}
        names = (
            "pid", "boot_id", "dump_uptime_ns", "tracker", "nonce", "nr_tasks", "taken_at", "tasks",
        )  # fmt: skip
        values = {name: getattr(point, name) for name in names} | meta
        with store.writer(point.job) as writer:
            for name in copied:
                runs = list(reader.runs(name))
                if runs:
                    writer.put(name, runs, Pages(reader, name))
                    writer.drain()
                    writer.close_space(name, runs)
            writer.add_images(copied)
            made = writer.commit(PointMeta(**values))
        if alone:
            store.forget([point])
        return made.id


# What is left


def test_take_stop(counter):
    point = counter.take("--stop")
    at = count(counter)
    continues(counter)
    assert snap("list", store=counter.store)["points"][0]["id"] == point["id"]
    assert count(counter) > at


def test_rollback_stop(counter):
    counter.take()
    with reaping():
        result = snap("rollback", "latest", "--stop", store=counter.store)
    assert result["root_pid"] == counter.pid
    continues(counter)
    counter.take("--kill")
    counter.rollback("latest", "--stop")
    continues(counter)


def test_rollback_dry_run(counter):
    counter.take()
    with untouched(counter):
        result = snap("rollback", "latest", "--dry-run", store=counter.store)
        assert result["dry_run"] is True
        assert result["root_pid"] == counter.pid
        assert [one["pid"] for one in result["plan"]["kill"]] == [counter.pid]
    counter.take("--kill")
    assert snap("rollback", "latest", "-n", store=counter.store)["pids"] == [counter.pid]
    assert not is_running(counter.pid)
    counter.rollback()
    goes_on(counter)


def test_files_that_a_point_needs(counter):
    counter.take()
    shown = snap("show", "latest", store=counter.store)["file_identities"]
    by_path = {record["path"]: record for record in shown}
    program = os.path.realpath(sys.executable)
    assert by_path[program]["size_bytes"] == os.stat(program).st_size
    assert by_path[program]["ino"] == os.stat(program).st_ino
    assert {str(counter.directory / "stdout"), str(counter.directory / "stderr")} <= by_path.keys()
    text = subprocess.run(
        [*SNAP, "--store", counter.store, "show", "latest"],
        env=dict(os.environ, PYTHONPATH=str(ROOT)), capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert f"needs    {len(shown)} files outside the store" in text


# Names and stores


def test_ambiguous_id(counter):
    counter.take()
    ids = [f"abcd{digit}" + "0" * 27 for digit in "12"]
    for point_id in ids:
        copy_point(counter.store, counter.points[0]["id"], point_id=point_id)
    with untouched(counter):
        for command in ("show", "rollback", "verify", "forget"):
            error = fails(13, command, "abcd", store=counter.store)
            assert all(point_id[:12] in error["message"] for point_id in ids)
            assert "digits" in error["hint"]
    assert snap("show", "abcd1", store=counter.store)["id"] == ids[0]


def test_forget_a_job_and_one_of_its_points(counter):
    ids = [counter.take()["id"] for _ in range(3)]
    name = counter.points[0]["job"]
    assert snap("forget", f"{name}~0", store=counter.store)["forgotten"] == [ids[2]], (
        "one point needs no --yes"
    )
    for words in ((name,), (f"{name}~1..{name}",)):
        assert "--yes" in fails(2, "forget", *words, store=counter.store)["hint"]
    assert len(snap("list", store=counter.store)["points"]) == 2
    assert snap("forget", name, "--yes", store=counter.store)["forgotten"] == ids[:2]
    fails(13, "list", "--job", name, store=counter.store)


def test_a_restart_goes_on_under_the_name_and_another_program_does_not(job):
    script = job.directory / "count.py"
    job.directory.mkdir()
    script.write_text(COUNTER)

    def run(path):
        job.start([sys.executable, path])
        wait_until(lambda: count(job) > 3, "counting")

    run(script)
    first = job.take()
    job.destroy()
    run(script)
    second = job.take()
    assert (second["job"], second["parent"]) == (first["job"], None)
    job.destroy()
    other = job.directory / "other.py"
    other.write_text(COUNTER)
    run(other)
    with untouched(job):
        error = fails(2, "take", job.pid, "--job", first["job"], store=job.store)
    assert error["code"] == "other_program"
    assert str(script) in error["message"]
    assert str(other) in error["message"]
    assert len(snap("list", store=job.store)["points"]) == 2
    assert snap("take", job.pid, "--job", first["job"], "--other-program", store=job.store)["pid"] == job.pid


def set_schema(store, revision) -> pathlib.Path:
    path = store / "catalog.sqlite"
    connection = sqlite3.connect(path)
    with connection:
        connection.execute("UPDATE alembic_version SET version_num = ?", (revision,))
    connection.close()
    return path


def test_store_of_a_newer_snap(counter):
    counter.take()
    set_schema(counter.store, "9999")
    lines = (["take", counter.pid, "--job", "test"], ["list"], ["rollback", "latest"], ["verify"], ["prune"])
    with untouched(counter):
        for line in lines:
            error = fails(10, *line, store=counter.store)
            assert "9999" in error["message"]
            assert "newer" in error["message"] + error["hint"]
    notes = doctor(counter.store)["notes"]
    assert [note["level"] for note in notes if note["subject"] == "store"] == ["problem"]
    set_schema(counter.store, "0001")
    assert len(snap("list", store=counter.store)["points"]) == 1
    mark = counter.store / "STORE"
    mark.write_text(mark.read_text().replace('"format": 1', '"format": 2'))
    assert "format 2" in fails(10, "list", store=counter.store)["message"]


def doctor(store) -> dict:
    import json

    done = subprocess.run(
        [*SNAP, "--store", store, "doctor", "--json"],
        env=dict(os.environ, PYTHONPATH=str(ROOT)), capture_output=True, text=True, check=False,
    )  # fmt: skip
    return json.loads(done.stdout)


def test_doctor_leaves_an_old_store_as_it_is(counter):
    counter.take()
    catalog = set_schema(counter.store, "0000")
    before = catalog.read_bytes(), sorted(counter.store.rglob("*"))
    notes = doctor(counter.store)["notes"]
    assert (catalog.read_bytes(), sorted(counter.store.rglob("*"))) == before
    (note,) = (note for note in notes if note["subject"] == "store")
    assert note["level"] == "ok"
    assert "schema 0000" in note["text"]


# Damage


def test_image_that_cannot_be_understood(counter):
    """Its digest is right, so only reading it tells."""
    counter.take()
    broken = copy_point(
        counter.store, counter.points[0]["id"], images={f"mm/{counter.pid}": b"\xff" * 100}, alone=True
    )
    assert snap("verify", store=counter.store)["ok"]
    with untouched(counter):
        for line in (["rollback", broken], ["rollback", broken, "--dry-run"], ["show", broken]):
            error = fails(12, *line, store=counter.store)
            assert f"mm/{counter.pid}" in error["message"]
    # The next take compares nothing with it, or says that it could not.
    point = counter.take()
    assert point["parent"] in {None, broken}
    counter.rollback(point["id"])
    goes_on(counter)


def flip_packs(store) -> None:
    for path in pathlib.Path(store).rglob("*.pack"):
        data = bytearray(path.read_bytes())
        for at in range(0, len(data), 512):
            data[at] ^= 0x55
        path.chmod(0o600)
        path.write_bytes(data)


def test_damaged_newest_point_does_not_stop_the_takes(counter):
    first = counter.take()
    flip_packs(counter.store)
    second = counter.take()
    assert second["parent"] is None
    assert any("damaged" in text and first["id"][:8] in text for text in second["warnings"])
    assert counter.take()["parent"] == second["id"]
    fails(12, "rollback", first["id"], store=counter.store)
    goes_on(counter)
    counter.rollback(second["id"])
    goes_on(counter)


FAMILY = """
import os, signal, sys, time
child = os.fork()
if child == 0:
    held = os.urandom(1 << 20)
    while True: time.sleep(0.1)
open(sys.argv[1] + "/child", "w").write(str(child))
while True: time.sleep(0.1)
"""


def test_damage_is_found_before_a_child_that_outlived_its_root_is_killed(job):
    job.start([sys.executable, "-c", FAMILY])
    path = job.directory / "child"
    wait_until(lambda: path.exists() and path.read_text(), "a child")
    child = int(path.read_text())
    try:
        point = job.take()
        os.kill(job.pid, signal.SIGKILL)
        reap(job.pid)
        harm_pages(job.store, point["id"], f"mm/{child}")
        before = started(child)
        fails(12, "rollback", "latest", store=job.store)
        assert is_running(child)
        assert started(child) == before
    finally:
        os.kill(child, signal.SIGKILL)
        reap(child)


def harm_pages(path, point_id, space) -> None:
    """Flip a byte in the frame of the last page of a space: everything but pages is still right."""
    with Store.open(path) as store:
        refs = store.blob_refs(store.resolve(point_id).id)
        location = int(store.readers.maps(refs.maps)[space].locs[-1])
        pack, frame = location >> 32, (location & 0xFFFFFFFF) >> 12
        offset = store.readers.get(pack).frame(frame).offset
    file = pathlib.Path(path) / "packs" / f"{pack:08x}.pack"
    data = bytearray(file.read_bytes())
    data[offset + 5] ^= 0xFF
    file.chmod(0o600)
    file.write_bytes(data)


# Another boot, another machine


def test_point_of_another_boot(counter):
    """No page of it is used, and a living process is not its job, whatever its start time is."""
    original = counter.take()
    boot_id = "00000000-1111-2222-3333-444444444444"

    def other(message):
        message.boot_id = boot_id

    older = copy_point(counter.store, original["id"], manifest=other, boot_id=boot_id, alone=True)
    with untouched(counter):
        error = fails(7, "rollback", older, store=counter.store)
        assert str(counter.pid) in error["message"]
        assert "not the job" in error["message"]
    point = counter.take()
    assert point["parent"] is None
    assert point["pages_dirty"] >= original["pages_dirty"] * 0.9, "not everything was read"
    counter.take("--kill")
    counter.rollback(older)
    goes_on(counter)


def more_instructions(message):
    message.cpu_flags.append("avx512_unheard_of")


def more_registers(message):
    message.xfeatures |= 1 << 61


@pytest.mark.parametrize(
    ("change", "name"),
    [(more_instructions, "avx512_unheard_of"), (more_registers, hex(1 << 61))],
    ids=["instructions", "registers"],
)
def test_cpu_that_lacks_something(counter, change, name):
    counter.take()
    foreign = copy_point(counter.store, counter.points[0]["id"], manifest=change)
    with untouched(counter):
        for options in ((), ("--dry-run",)):
            error = fails(7, "rollback", foreign, *options, store=counter.store)
            assert name in error["message"]
            assert "CPU" in error["message"] + error["hint"]
    counter.take("--kill")
    assert name in fails(7, "rollback", foreign, store=counter.store)["message"]
    assert not is_running(counter.pid)
    counter.rollback(counter.points[0]["id"])
    goes_on(counter)


# Ctrl-C


def interrupt_rollback(job, fault: str) -> str:
    """Ctrl-C while a rollback is at a fault point. Returns what was said."""
    env = dict(os.environ, PYTHONPATH=str(ROOT), SNAP_FAULT=f"{fault}:stop")
    command = [*SNAP, "--store", str(job.store), "rollback", "latest"]
    with reaping():
        process = subprocess.Popen(
            command, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )  # fmt: skip
        wait_until(lambda: state(process.pid) == "T", f"the rollback at {fault}")
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGCONT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "interrupted" in err
    assert "Traceback" not in err
    return err


def test_interrupted_before_anything_was_touched(counter):
    counter.take()
    with untouched(counter):
        interrupt_rollback(counter, "restore.planned")
    counter.rollback()
    goes_on(counter)


@pytest.mark.parametrize("fault", ["restore.root_stub", "restore.memory", "restore.state"])
def test_interrupted_half_way(counter, fault):
    counter.take("--kill")
    before = set(tree(os.getpid()))
    interrupt_rollback(counter, fault)
    # A stub that was not yet given its session is of ours, so `reaping` leaves it to us.
    wait_until(lambda: reap_all() or not state(counter.pid), "no half restored job")
    assert not {pid for pid in tree(os.getpid()) if is_running(pid)} - before
    counter.rollback()
    goes_on(counter)


def test_more_processes_than_descriptors_are_allowed(job):
    """The usual limit of a shell is 1024, and each process of a job takes several."""
    nr_processes = 60
    script = f"import os, signal, sys\nfor _ in range({nr_processes - 1}):\n    os.fork() or signal.pause()\n"
    script += "open(os.path.join(sys.argv[1], 'ready'), 'w').close()\nsignal.pause()\n"
    job.start([sys.executable, "-S", "-c", script]).wait_ready()
    before = sorted(tree(job.pid))
    assert len(before) == nr_processes
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]

    def few() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (nr_processes, hard))

    snap("take", job.pid, store=job.store, preexec_fn=few)
    snap("take", job.pid, "--kill", store=job.store, preexec_fn=few)
    job.wait_gone()
    snap("rollback", "latest", store=job.store, preexec_fn=few)
    assert sorted(tree(job.pid)) == before


def test_whatever_snap_inherits(counter, tmp_path):
    """From cron, a service manager, a program with its own ideas: dispositions and masks of signals, a umask, a directory."""
    gone = tmp_path / "gone"
    gone.mkdir()

    def strange() -> None:
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        os.umask(0o777)
        os.chdir(gone)
        gone.rmdir()

    def run(*args):
        gone.mkdir(exist_ok=True)
        return snap(*args, store=counter.store, preexec_fn=strange)

    run("check", counter.pid)
    run("take", counter.pid)
    with reaping():
        run("rollback", "latest")
    goes_on(counter)
    run("take", counter.pid, "--stop")
    continues(counter)
    run("take", counter.pid, "--kill")
    counter.wait_gone()
    run("rollback", "latest")
    goes_on(counter)
    assert run("verify")["damage"] == []
    run("doctor")
