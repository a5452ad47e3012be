"""Whatever a job is called, what is printed are our own lines: no control character, no line of the job's making."""

import contextlib
import dataclasses
import io
import json
import os
import sys
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from snapshotter.base.errors import Finding, SnapshotterError, UnsupportedError
from snapshotter.base.text import bounded, visible, whole
from snapshotter.cli import main, options, output
from snapshotter.manager import listing
from snapshotter.manager.config import Config
from snapshotter.manager.ports import Restored
from snapshotter.manager.session import Session
from store import FileRecord
from store.types import Damage, PruneReport
from tests.fakes import FakeEngine, FakeStore

NASTY = ["\x1b[2J", "\x1b]0;x\x07", "\n", "\r", "\r\nsnap: all is well", "\x7f", "\x9b31m", "\u202e", "\u2028", "\x85",
         "\udcff", "\ud800", "\U000e0041", "\0", "\t", "\b", "\u200b", "\xad", "é", "名", "\\n"]  # fmt: skip
hostile = st.lists(
    st.one_of(st.sampled_from(NASTY), st.characters(exclude_categories=[])), min_size=1, max_size=8
).map("".join)
COMMANDS = {
    "take": ("take", "7", "--job", "sim"),
    "cron": ("take", "--job", "sim", "--pidfile", "TEXT"),
    "list": ("list",),
    "list of a job": ("list", "--job", "TEXT"),
    "show": ("show", "latest"),
    "rollback": ("rollback", "latest"),
    "plan": ("rollback", "latest", "--dry-run"),
    "verify": ("verify",),
    "check": ("check", "7"),
    "doctor": ("doctor",),
    "forget": ("forget", "latest", "--dry-run"),
    "prune": ("prune",),
    "no such point": ("rollback", "TEXT~"),
    "no such command": ("TEXT",),
    "no such option": ("list", "--TEXT"),
    "no number": ("take", "TEXT"),
    "refused": ("take", "8", "--other-program"),
    "failed": ("take", "9", "--other-program"),
    "bug": ("take", "10", "--other-program"),
}


class Engine(FakeEngine):
    """Says what a hostile job is called wherever an engine can say it."""

    def __init__(self, text):
        super().__init__()
        self.text = text
        self.late_warnings = [text]
        self.alive |= {8: 100, 9: 100, 10: 100}
        self.findings = (
            Finding(7, f"descriptor {text}", text, text),
            Finding(7, "task", f"is {text}", f"end {text}"),
        )

    def dump(self, pid, sink, parent, after, commit):
        if pid == 8:
            raise UnsupportedError.of(self.findings, pid)
        if pid == 9:
            raise SnapshotterError(self.text, where=self.text, hint=self.text)
        if pid == 10:
            raise ZeroDivisionError(self.text)
        return super().dump(
            pid, sink, parent, after, lambda made: commit(dataclasses.replace(made, warnings=[self.text]))
        )

    def restore(self, reader, known_tasks, **_options):
        plan = "\n".join(("restore task 7", f"kill {visible(self.text)}"))
        return Restored(7, (7,), 10, 2, (self.text,), {7: 101}, plan_text=plan)

    def features(self):
        return [{"name": "kcmp", "ok": False, "errno": 1, "note": self.text}]


class HostileStore(FakeStore):
    def __init__(self, text):
        super().__init__()
        self.text = text
        self.damage = (Damage(f"pack {text}", text, ()),)

    def points(self, job=None):
        return [
            dataclasses.replace(point, job=f"sim{self.text}", tracker=self.text, warnings=(self.text,))
            for point in self.saved.values()
            if job is None or not job.startswith("sim-") or job == point.job
        ]

    def resolve(self, text):
        found = super().resolve(text)
        return dataclasses.replace(found, job=f"sim{self.text}", tracker=self.text)

    def prune(self, *, dry_run=False, wait_s=10.0):
        return PruneReport(1, 0, 0, 4096, 8192, dry_run, (self.text,))

    def stats(self):
        raise SnapshotterError(self.text, where=self.text, hint=self.text)


def details(text):
    def show(session, _name):
        point = session.store().points()[-1]
        process = {"pid": 7, "ppid": 1, "sid": 7, "threads": [{"tid": 7, "comm": text}]}
        record = FileRecord(text, 1, 2, 3, 4, "")
        return listing.Details(point, {"exe": text}, [process], {f"mm/{text}": {}}, {text: {}}, (record,), ())

    return show


@contextlib.contextmanager
def printed():
    """Both streams, as the bytes that a terminal would get."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding="utf-8", newline="") for _ in range(2)]
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = streams
    result = []
    try:
        yield result
    finally:
        sys.stdout, sys.stderr = before
        for stream in streams:
            stream.flush()
            result.append(stream.buffer.getvalue().decode())


def as_word(text):
    """As a word of a command line, which holds bytes but no NUL. It is not an option, and no number."""
    return "x" + os.fsdecode(text.replace("\0", "").encode("utf-8", "surrogatepass"))


def run(text, words, folder, *more):
    store, engine = HostileStore(text), Engine(text)
    (folder / "store" / "packs").mkdir(parents=True, exist_ok=True)  # so that a store is there
    config = Config(store=folder / "store", store_from=f"test{text}", lock_wait_s=0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            options,
            "open_session",
            lambda *_flags: Session(config, open_store=store.opener, open_engine=lambda: engine),
        )
        with printed():
            assert main.run(["take", "7", "--job", "sim"]) == 0
        patch.setattr(listing, "show", details(text))
        with printed() as streams:
            main.run([*(word.replace("TEXT", as_word(text)) for word in words), *more])
    return streams


@pytest.mark.parametrize("name", COMMANDS)
@given(text=hostile)
@settings(max_examples=40, deadline=None)
def test_only_our_own_lines_are_printed(tmp_path_factory, name, text):
    folder = tmp_path_factory.getbasetemp() / "hostile"
    lines = []
    for called in ("x", text):
        streams = run(called, COMMANDS[name], folder)
        assert any(streams)
        for stream in streams:
            assert all(char == "\n" or char.isprintable() for char in stream), ascii(stream)
        lines.append([stream.count("\n") for stream in streams])
    assert lines[0] == lines[1], (ascii(streams[0]), ascii(streams[1]))


@pytest.mark.parametrize("name", COMMANDS)
@given(text=hostile)
@settings(max_examples=20, deadline=None)
def test_json_stays_json(tmp_path_factory, name, text):
    out, err = run(text, COMMANDS[name], tmp_path_factory.getbasetemp() / "hostile", "--json")
    assert not err
    assert out.isascii()
    assert out.count("\n") == 1
    assert out[:-1].isprintable()
    json.dumps(json.loads(out), ensure_ascii=False).encode()  # no lone surrogates


def test_what_a_job_said_can_be_read_in_json():
    said = "a\n\x1b\x7f\u202e é"
    assert json.loads(output.to_json({"said": said, said: (said,)})) == {"said": said, said: [said]}
    assert json.loads(output.to_json({"said": "a\udcff"}))["said"] == "a\\xff"


@given(hostile)
def test_visible(text):
    seen = visible(text)
    assert seen.isprintable()
    assert visible(seen) == seen
    assert whole(text).encode()


def test_a_flood_of_warnings_is_cut_and_counted():
    many = [f"file {number} changed" for number in range(8000)]
    told = bounded(many)
    assert told[:-1] == many[:50]
    assert told[-1] == "7950 more warnings like these are left out"
    assert bounded(many[:50]) == many[:50]


def test_readable_names_stay_as_they_are():
    assert visible("Prüfung 名前 a\\b 'c'") == "Prüfung 名前 a\\b 'c'"
    assert visible("a\n\x1b\x9b\udcff\u202e") == r"a\n\x1b\x9b\xff\u202e"


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "utf-8"])
def test_what_the_terminal_cannot_show_is_escaped(monkeypatch, encoding):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    output.write("名\x1b")
    output.flush()
    assert b"\x1b" not in raw.getvalue()
    assert raw.getvalue().endswith(b"\\x1b\n")


def test_tracebacks_go_through_the_door(monkeypatch):
    for hook in ("excepthook", "unraisablehook"):
        monkeypatch.setattr(sys, hook, getattr(sys, hook))
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    output.guard_tracebacks()

    class Dying:
        def __del__(self):
            raise ValueError("\x1b[2J\nsnap: done")

    def fail():
        raise ValueError("\x1b[2J\nsnap: done")

    with printed() as streams:
        thread = threading.Thread(target=fail)
        thread.start()
        thread.join()
        Dying()
    err = streams[1]
    assert "ValueError" in err
    assert "Dying" not in err or "__del__" in err
    assert all(line.startswith("| ") for line in err.splitlines())
    assert "\x1b" not in err


def test_debug_tracebacks_too(monkeypatch, tmp_path):
    monkeypatch.setenv("SNAP_DEBUG", "1")
    err = run("\x1b[2J\nsnap: done", COMMANDS["bug"], tmp_path)[1]
    assert "ZeroDivisionError" in err
    assert "\nsnap: done" not in err
    assert "\x1b" not in err
