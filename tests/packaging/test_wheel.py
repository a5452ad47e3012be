"""A wheel carries what is compiled and generated, the migrations, and the command."""

import shutil
import subprocess
import sys
import zipfile

import pytest

from tests.jobs import ROOT

LEFT_OUT = shutil.ignore_patterns(
    ".git", ".venv", "build", "dist", "*.so", "*_pb2.py*", "*.bin", "__pycache__", ".*_cache"
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from the sources alone, as a first `pip install .` does."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, folder / "source", ignore=LEFT_OUT)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-build-isolation",
        "--no-deps",
        "-w",
        folder,
        ".",
    ]
    done = subprocess.run(command, cwd=folder / "source", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as archive:
        yield archive


def test_what_is_generated_is_inside(wheel):
    names = set(wheel.namelist())
    protos = [path.stem for path in (ROOT / "images").glob("*.proto")]
    assert {f"images/{name}_pb2.py" for name in protos} <= names
    assert {"parasite_c/blob.bin", "parasite_c/keeper.bin", "parasite_c/stub"} <= names
    assert any(name.startswith("parasite_c/_native") and name.endswith(".so") for name in names)


def test_what_is_loaded_by_path_is_inside(wheel):
    names = set(wheel.namelist())
    revisions = {path.name for path in (ROOT / "migrations" / "versions").glob("*.py")}
    assert revisions
    assert {f"migrations/versions/{name}" for name in revisions} <= names


def test_the_programs_keep_their_mode(wheel):
    assert wheel.getinfo("parasite_c/stub").external_attr >> 16 & 0o111


def test_tests_are_not_inside(wheel):
    assert not [name for name in wheel.namelist() if name.startswith("tests/")]


def test_the_command_is_installed(wheel):
    entry = next(name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    assert "snap = snapshotter.cli.main:main" in wheel.read(entry).decode()
