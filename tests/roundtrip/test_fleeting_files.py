"""Temporary files of the job's that a point does not keep: the take and `check` say so; ordinary files are no news."""

from __future__ import annotations

import os
import pathlib
import sys
import tempfile

import pytest

from checkpoint.resources.files import fleeting
from snapshotter.base.errors import RestoreConflictError
from snapshotter.manager.engine import RealEngine
from tests import memory_store
from tests.jobs import reap, wait_until

pytestmark = pytest.mark.requires("root")


@pytest.fixture
def folder():
    """In /var/lib, which is no place for temporary files, unlike pytest's own."""
    with tempfile.TemporaryDirectory(dir="/var/lib", prefix="snap-test-") as made:
        yield pathlib.Path(made)


def running(start, folder, code):
    ready = folder / "ready"
    pid = start(
        sys.executable,
        "-c",
        f"import os, time\nos.chdir({str(folder)!r})\n{code}\nopen({str(ready)!r}, 'w').close()\nwhile True: time.sleep(1)",
    )
    wait_until(ready.exists, "ready")
    return pid


def said(point) -> list[str]:
    return [text for text in point.result.warnings if "temporary file" in text]


def test_a_file_like_rsyncs_that_is_renamed(start, folder):
    pid = running(start, folder, "f = open('.data.bin.Xy12Zw', 'wb'); f.write(b'x' * 100); f.flush()")
    point = memory_store.take(pid, after="kill")
    (text,) = said(point)
    assert str(folder / ".data.bin.Xy12Zw") in text
    reap(pid)
    os.rename(folder / ".data.bin.Xy12Zw", folder / "data.bin")
    with pytest.raises(RestoreConflictError, match="Xy12Zw"):
        memory_store.rollback(point)


def test_a_file_like_ghcs_in_a_directory_of_its_own(start, tmp_path):
    with tempfile.TemporaryDirectory(prefix="snap-test-ghc") as place:
        folder = pathlib.Path(place)
        pid = running(
            start,
            folder,
            "f = open('ghc_2.s', 'w'); g = open('/tmp/snap-test-kept.s', 'w'); os.unlink('/tmp/snap-test-kept.s')",
        )
        assert RealEngine().check(pid).warnings == tuple(said(memory_store.take(pid)))
        (text,) = said(memory_store.take(pid))
        assert str(folder / "ghc_2.s") in text


def test_ordinary_files_are_no_news(start, folder, tmp_path):
    (folder / "old.tmp").write_text("older than the job")
    os.utime(folder / "old.tmp")
    wait_until(lambda: _age_s(folder / "old.tmp") > 2.5, "a file older than the job")
    code = "files = [open('log', 'w'), open('result.dat', 'w'), open('a.tmp', 'a'), open('old.tmp', 'r+'), open('old.tmp')]"
    pid = running(start, folder, code)
    assert said(memory_store.take(pid)) == []
    assert not [text for text in RealEngine().check(pid).warnings if "temporary" in text]


def _age_s(path: pathlib.Path) -> float:
    import time

    return time.time() - path.stat().st_ctime


@pytest.mark.parametrize(
    ("name", "temporary"),
    [
        (b"/x/.data.bin.Xy12Zw", True), (b"/x/tmpab12cd_9", True), (b"/x/a.tmp", True), (b"/x/a.part", True),
        (b"/x/a~", True), (b"/x/.bashrc", False), (b"/x/data.bin", False), (b"/x/tmp", False), (b"/x/template", False),
        (b"/x/.config.backup1", False), (b"/x/log.123456", False),
    ],
)  # fmt: skip
def test_names(name, temporary):
    assert fleeting.has_temporary_name(name) is temporary
