"""The command line against fakes: what is printed where, exit status, and what is imported."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys

import pytest

from snapshotter.base.errors import Finding, SnapshotterError
from snapshotter.cli import main, options, output
from snapshotter.manager.config import Config
from snapshotter.manager.session import Session
from store import Store
from store.types import Damage
from tests.fakes import FakeEngine, FakeStore, finding
from tests.jobs import ROOT, SNAP


@pytest.fixture
def fake(tmp_path, monkeypatch):
    store, engine = FakeStore(), FakeEngine()
    settings = Config(store=tmp_path / "store", store_from="test", lock_wait_s=0.0)
    monkeypatch.setattr(
        options,
        "open_session",
        lambda *_flags: Session(settings, open_store=store.opener, open_engine=lambda: engine),
    )
    store.engine = engine
    return store


@pytest.fixture
def run(fake, capsys):
    def call(*args):
        status = main.run([str(arg) for arg in args])
        got = capsys.readouterr()
        return status, got.out, got.err

    return call


def error_of(text):
    return json.loads(text)["error"]


def test_take_json_has_the_documented_fields(run):
    status, out, err = run("take", 7, "--json")
    assert status == 0
    point = json.loads(out)
    assert set(point) >= {
        "id", "parent", "job", "pid", "taken_at", "dump_uptime", "tracker", "nr_tasks", "frozen_us", "duration_us",
        "pages_dirty", "pages_new", "bytes_logical", "bytes_stored", "warnings",
    }  # fmt: skip
    assert point["parent"] is None
    assert point["warnings"] == ["a warning"]
    assert not err
    assert json.loads(run("--json", "take", 7)[1])["parent"] == point["id"]


def test_take_text_and_quiet(run):
    status, out, err = run("take", 7, "--job", "x")
    assert status == 0
    assert "x" in out
    assert "snap: warning: a warning" in err
    status, out, _ = run("take", 7, "--quiet")
    assert len(out.strip()) == 32


@pytest.mark.parametrize(("option", "after"), [((), "run"), (("--stop",), "stop"), (("--kill",), "kill")])
def test_take_after(run, fake, option, after):
    assert run("take", 7, *option)[0] == 0
    assert fake.engine.dumps[-1][2] == after


def test_list(run):
    assert json.loads(run("list", "--json")[1]) == {"points": []}
    assert "no points" in run("list")[1]
    run("take", 7, "--job", "a")
    run("take", 7, "--job", "b")
    assert [point["job"] for point in json.loads(run("list", "--json")[1])["points"]] == ["a", "b"]
    assert [point["job"] for point in json.loads(run("list", "--job", "b", "--json")[1])["points"]] == ["b"]
    lines = run("list")[1].splitlines()
    assert lines[0].startswith("ID")
    assert len(lines) == 3


def test_list_without_a_store(run, fake):
    fake.exists = False
    lines = (("list",), ("rollback", "latest"), ("forget", "a"), ("forget", "--keep-last", 1, "--job", "a"))
    for line in lines:
        status, out, _ = run(*line, "--json")
        assert (status, error_of(out)["code"]) == (10, "no_store"), line


def test_a_job_that_is_not_there(run):
    run("take", 7, "--job", "a")
    for line in (
        ("list", "--job", "b"),
        ("forget", "b", "--yes"),
        ("forget", "--keep-last", 1, "--job", "b"),
    ):
        status, out, _ = run(*line, "--json")
        assert (status, error_of(out)["code"]) == (13, "no_such_point"), line
        assert "'b'" in error_of(out)["message"]


def test_forget_a_whole_job(run, monkeypatch):
    points = [json.loads(run("take", 7, "--job", job, "--json")[1])["id"] for job in ("a", "a", "b", "a")]
    of_a = [points[0], points[1], points[3]]
    for words in (("a",), (f"{points[0]}..{points[3]}",), (points[2], "a")):
        status, out, _ = run("forget", *words, "--json")
        assert (status, error_of(out)["code"]) == (2, "usage")
        assert "3 points of a" in error_of(out)["message"] or "4 points of a, b" in error_of(out)["message"]
        assert "--yes" in error_of(out)["hint"]
    assert json.loads(run("forget", "a", "-n", "--json")[1])["forgotten"] == of_a
    assert json.loads(run("forget", "a", "--yes", "--json")[1])["forgotten"] == of_a
    assert [point["id"] for point in json.loads(run("list", "--json")[1])["points"]] == [points[2]]


@pytest.mark.parametrize(("answer", "status", "left"), [("y", 0, 0), ("n", 1, 2), ("", 1, 2)])
def test_forget_asks_on_a_terminal(run, monkeypatch, answer, status, left):
    run("take", 7, "--job", "a")
    run("take", 7, "--job", "a")
    typed = io.StringIO(answer + "\n")
    monkeypatch.setattr(typed, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("sys.stdin", typed)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    got, _, err = run("forget", "a")
    assert got == status
    assert "2 points of a" in err
    assert "Forget them?" in err
    assert len(json.loads(run("list", "--json")[1])["points"]) == left


def test_verify_a_whole_job(run):
    points = [json.loads(run("take", 7, "--job", job, "--json")[1])["id"] for job in ("a", "b", "a")]
    assert json.loads(run("verify", "a", "--json")[1])["points"] == [points[0], points[2]]


def test_rollback(run):
    point = json.loads(run("take", 7, "--json")[1])
    status, out, _ = run("rollback", point["id"][:6], "--json")
    assert status == 0
    assert set(json.loads(out)) >= {"id", "root_pid", "pids", "duration_us", "pages_written"}
    assert "runs again" in run("rollback", "latest")[1]


@pytest.mark.parametrize(
    ("args", "status", "code"),
    [
        (("take", 8), 4, "target_gone"),
        (("take",), 2, "usage"),
        (("take", "x"), 2, "usage"),
        (("take", 7, "--job", "a/b"), 2, "usage"),
        (("take", 7, "--pidfile", "/x"), 2, "usage"),
        (("take", "--pidfile", "/x"), 2, "usage"),
        (("take", 7, "--keep-last", 3), 2, "usage"),
        (("take", 7, "--stop", "--kill"), 2, "usage"),
        (("take", "--job", "a", "--pidfile", "/nonexistent/pid"), 4, "target_gone"),
        (("rollback", "ffff"), 13, "no_such_point"),
        (("rollback",), 2, "usage"),
        (("verify", "ffff"), 13, "no_such_point"),
        (("show", "ffff"), 13, "no_such_point"),
        (("forget",), 2, "usage"),
        (("forget", "--keep-last", 0, "--job", "a"), 2, "usage"),
        (("forget", "--keep-last", 1), 2, "usage"),
        (("forget", "ffff"), 13, "no_such_point"),
        (("check", 8), 4, "target_gone"),
        (("nonsense",), 2, "usage"),
        (("list", "--nonsense"), 2, "usage"),
    ],
)
def test_errors(run, args, status, code):
    got, out, err = run(*args, "--json")
    assert (got, error_of(out)["code"]) == (status, code)
    assert error_of(out)["message"]
    assert not err
    got, out, err = run(*args)
    assert (got, out) == (status, "")
    assert err.startswith("snap: ")


def test_the_bare_command_shows_its_help(run):
    status, out, err = run()
    assert (status, out) == (2, "")
    assert err.startswith("Usage: snap"), "help is not an error message"
    status, out, err = run("--json")
    assert (status, error_of(out)["code"], err) == (2, "usage", "")


def test_what_concerns_a_task_as_a_whole_names_it_once():
    whole = Finding(7, "task", "is a kernel thread", "take a program")
    assert str(whole) == "task 7: is a kernel thread; take a program"
    assert str(Finding(7, "descriptor 3", "is odd")) == "task 7, descriptor 3: is odd"


def test_locked(run, fake):
    fake.locked.add("a")
    status, out, _ = run("take", 7, "--job", "a", "--json")
    assert (status, error_of(out)["code"]) == (11, "locked")


def test_cron_line(run, fake, tmp_path):
    (tmp_path / "pid").write_text("7")
    line = ("take", "--job", "a", "--pidfile", tmp_path / "pid", "--quiet")
    status, out, _ = run(*line)
    assert status == 0
    assert len(out.split()) == 1
    fake.locked.add("a")
    status, out, err = run(*line)
    assert (status, out) == (0, "")
    assert "skipped" in err
    assert json.loads(run(*line, "--json")[1])["skipped"] == "busy"
    del fake.engine.alive[7]
    status, out, err = run(*line)
    assert (status, out) == (8, "")
    assert "ended" in err
    assert run(*line) == (8, "", ""), "said once"
    assert json.loads(run(*line, "--json")[1])["skipped"] == "ended"


def test_cron_line_with_retention(run, tmp_path):
    (tmp_path / "pid").write_text("7")
    for _ in range(5):
        run("take", "--job", "a", "--pidfile", tmp_path / "pid", "--keep-last", 2)
    assert len(json.loads(run("list", "--json")[1])["points"]) == 2


def test_verify_names_the_hurt(run, fake):
    run("take", 7)
    assert run("verify")[0] == 0
    hurt = json.loads(run("list", "--json")[1])["points"][0]["id"]
    fake.damage = (Damage("pack 1", "frame 3 does not match its digest", (hurt,)),)
    status, out, _ = run("verify", "--json")
    assert status == 12
    assert json.loads(out)["points_hurt"] == [hurt]
    status, out, _ = run("verify")
    assert status == 12
    assert "pack 1: frame 3" in out
    assert hurt[:8] in out


def test_check(run, fake):
    assert run("check", 7)[0] == 0
    fake.engine.findings = (finding(),)
    status, out, _ = run("check", 7, "--json")
    assert status == 5
    assert json.loads(out)["findings"][0]["what"] == "an io_uring"
    assert "io_uring" in run("check", 7)[1]


def test_forget_and_prune(run):
    first = json.loads(run("take", 7, "--json")[1])["id"]
    run("take", 7)
    assert json.loads(run("forget", first[:5], "--dry-run", "--json")[1]) == {
        "forgotten": [first],
        "dry_run": True,
    }
    assert json.loads(run("forget", first[:5], "--json")[1])["forgotten"] == [first]
    assert run("rollback", first)[0] == 13
    assert json.loads(run("prune", "--json")[1])["bytes_freed"] == 4096
    assert "4.0 KiB" in run("prune")[1]


@pytest.mark.parametrize("as_json", [False, True])
def test_interrupt_is_130(run, fake, as_json, monkeypatch):
    import signal

    before = signal.getsignal(signal.SIGINT)

    def interrupt():
        raise KeyboardInterrupt

    fake.engine.during_dump = interrupt
    try:
        status, out, err = run("take", 7, *(["--json"] if as_json else []))
    finally:
        signal.signal(signal.SIGINT, before)
    assert status == 130
    assert "interrupted" in (out if as_json else err)


def test_unforeseen_error_is_a_sentence(run, fake):
    def fail():
        raise ZeroDivisionError("x")

    fake.engine.during_dump = fail
    status, out, _ = run("take", 7, "--json")
    assert status == 1
    assert "internal error" in error_of(out)["message"]


def test_error_text(capsys):
    output.show_error(SnapshotterError("what", where="here", hint="do"), as_json=False)
    assert capsys.readouterr().err == "snap: here: what\nhint: do\n"


def test_doctor_explains_keepers(run):
    (note,) = [
        note for note in json.loads(run("doctor", "--json")[1])["notes"] if note["subject"] == "keepers"
    ]
    assert note["level"] == "ok"
    assert "1 keeper beside 7; a keeper is a small process" in note["text"]


def test_every_command_has_help(run):
    assert set(main.cli.list_commands(None)) == set(main.COMMANDS)
    out = run("--help")[1]
    for name in main.COMMANDS:
        assert name in out
        assert run(name, "--help")[0] == 0


def imported_by(*args, cwd, store="none"):
    """Packages, and modules of packages with their full names."""
    code = (
        "import sys; from snapshotter.cli.main import run; status = run(sys.argv[1:]);"
        "print(sorted({name.split('.')[0] for name in sys.modules} | set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *args], cwd=ROOT, capture_output=True, text=True, check=True,
        env={"SNAP_STORE": str(cwd / store), "HOME": str(cwd), "PATH": "/usr/bin"},
    )  # fmt: skip
    return set(json.loads(done.stderr.strip().splitlines()[-1].replace("'", '"')))


def test_help_and_list_are_light(tmp_path):
    heavy = {"checkpoint", "numpy", "google", "alembic", "cffi"}
    assert not imported_by("--help", cwd=tmp_path) & (heavy | {"sqlalchemy", "store"})
    assert not imported_by("list", cwd=tmp_path) & heavy


def test_a_store_of_today_needs_no_migrations_and_no_orm(tmp_path):
    with Store.open(tmp_path / "store", create=True):
        pass
    heavy = {"checkpoint", "numpy", "google", "alembic", "cffi", "sqlalchemy.orm", "grpc"}
    found = imported_by("list", cwd=tmp_path, store="store")
    assert "sqlalchemy" in found
    assert not found & heavy


@pytest.mark.parametrize("args", [("--version",), ("--help",), ("list",)])
def test_all_output_is_written_before_the_process_ends(tmp_path, args):
    """The command leaves without finalising the interpreter, so nothing may be left in a buffer; errors show."""
    Store.open(tmp_path / "store", create=True).close()
    command = [*SNAP, *args]
    env = {
        "SNAP_STORE": str(tmp_path / "store"),
        "HOME": str(tmp_path),
        "PATH": "/usr/bin",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout.endswith("\n")
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, env=env, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert "No space left" in done.stderr
    assert args != ("list",) or "standard output: the result cannot be printed" in done.stderr


def snap_with(setup, *args, env, **popen):
    """snap in a shell that does something to its descriptors first."""
    return subprocess.run(
        ["sh", "-c", f'{setup}; exec "$@"', "sh", *SNAP, *args],
        env={**env, "PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        **popen,
    )


@pytest.mark.parametrize("closed", ["0<&-", "1>&-", "2>&-", "0<&- 1>&- 2>&-"])
@pytest.mark.parametrize(("args", "status"), [(("list",), 0), (("show", "latest", "--json"), 10)])
def test_closed_descriptors_are_no_error_and_get_nothing(tmp_path, closed, args, status):
    Store.open(tmp_path / "store", create=True).close()
    path = tmp_path / ("store" if status == 0 else "none")
    before = {file: file.read_bytes() for file in (tmp_path / "store").iterdir() if file.is_file()}
    done = snap_with(f"exec {closed}", *args, env={"SNAP_STORE": str(path), "HOME": str(tmp_path)})
    assert done.returncode == status, done
    assert "Traceback" not in done.stderr
    assert {file: file.read_bytes() for file in (tmp_path / "store").iterdir() if file.is_file()} == before


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_has_left_is_told_nothing(tmp_path, unbuffered):
    Store.open(tmp_path / "store", create=True).close()
    read_end, write_end = os.pipe()
    os.close(read_end)
    env = {
        "SNAP_STORE": str(tmp_path / "store"),
        "HOME": str(tmp_path),
        "PATH": "/usr/bin",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [*SNAP, "list"],
        env=env | {"PYTHONUNBUFFERED": unbuffered},
        stdout=write_end,
        stderr=subprocess.PIPE,
        check=False,
    )
    os.close(write_end)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("7", "--max-frozen", "nan"), "not a number of seconds"),
        (("--job", "a", "--pidfile", ""), "the name is empty"),
    ],
)
def test_values_that_make_no_sense_are_wrong_usage(capsys, args, says):
    from snapshotter.cli.main import run as run_line

    assert run_line(["take", *args]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("args", [("doctor",), ("doctor", "--json")])
def test_a_full_output_is_said_once(tmp_path, args):
    env = {"HOME": str(tmp_path), "PYTHONPATH": str(ROOT), "SNAP_STORE": str(tmp_path / "s")}
    command = [sys.executable, "-m", "snapshotter.cli.main", *args]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, env=env, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.count("cannot be printed") == 1
    assert "what was to be done is done" in done.stderr
