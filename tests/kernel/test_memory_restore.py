"""What must hold before a restore touches anything: files as they were, pages inside VMAs, the kernel's vdso."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess

import pytest

from checkpoint.resources.memory import vdso
from images import codec
from snapshotter.base.errors import RestoreConflictError, SnapshotterError, VerificationError
from tests import memory_store

pytestmark = pytest.mark.requires("root")


@pytest.fixture
def taken(tmp_path):
    """A running copy of sleep, a point of it, and its executable."""
    program = tmp_path / "napper"
    shutil.copy("/bin/sleep", program)
    child = subprocess.Popen([program, "1000"], stdin=-3, stdout=-3, stderr=-3, start_new_session=True)
    try:
        yield child, memory_store.take(child.pid), program
    finally:
        child.kill()
        child.wait()


def is_unharmed(child) -> bool:
    return child.poll() is None and os.readlink(f"/proc/{child.pid}/exe").endswith(
        ("napper", "napper (deleted)")
    )


def test_replaced_executable_is_a_conflict(taken):
    child, point, program = taken
    other = program.with_suffix(".new")
    other.write_bytes(program.read_bytes() + b"more")
    other.chmod(0o755)
    other.replace(program)
    with pytest.raises(RestoreConflictError, match="napper"):
        memory_store.rollback(point)
    assert is_unharmed(child)


def test_executable_installed_again_is_no_conflict(taken):
    child, point, program = taken
    other = program.with_suffix(".new")
    shutil.copy(program, other)
    other.replace(program)
    memory_store.rollback(point)
    assert os.readlink(f"/proc/{child.pid}/exe") == str(program)
    os.kill(child.pid, signal.SIGKILL)


def test_missing_executable_is_a_conflict(taken):
    child, point, program = taken
    program.unlink()
    with pytest.raises(RestoreConflictError, match="cannot be found"):
        memory_store.rollback(point)
    assert is_unharmed(child)


def test_another_kernels_vdso_is_a_conflict(taken, monkeypatch):
    child, point, _ = taken
    layout = vdso.own_layout()
    assert layout is not None
    monkeypatch.setattr(vdso, "_own", [vdso.Layout(layout.parts, b"\x12" * 20)])
    with pytest.raises(RestoreConflictError, match="vdso"):
        memory_store.rollback(point)
    assert is_unharmed(child)


def test_stray_page_is_a_damaged_point(taken):
    child, point, _ = taken
    name = f"mm/{child.pid}"
    mm = codec.parse(name, point.image(name))
    point.runs = lambda _: [(mm.vmas[0].start // 4096 - 5, 1)]
    with pytest.raises((VerificationError, SnapshotterError), match="outside all VMAs"):
        memory_store.rollback(point)
    assert is_unharmed(child)
