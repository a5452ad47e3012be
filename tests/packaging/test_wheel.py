"""A wheel carries what is compiled and generated, the migrations, and the command; installed, it takes and rolls back."""

import fnmatch
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile

import pytest

from tests.jobs import ROOT, is_running, reap, reaping, state, wait_until

GENERATED = (
    ".git", ".venv", "build", "dist", "*.so", "*.o", "*_pb2.py*", "*.bin", "stub", "_native.c", "__pycache__", ".*_cache",
    ".hypothesis", "*.egg-info", "demo-run",
)  # fmt: skip


def files_below(folder):
    return {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A directory with a wheel in it, built from the sources alone, as a first `pip install .` does."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, folder / "source", ignore=shutil.ignore_patterns(*GENERATED))
    (folder / "before").write_text("\n".join(sorted(map(str, files_below(folder / "source")))))
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
    return folder


@pytest.fixture
def wheel(built):
    with zipfile.ZipFile(next(built.glob("*.whl"))) as archive:
        yield archive


def test_what_is_generated_is_inside(wheel):
    names = set(wheel.namelist())
    protos = [path.stem for path in (ROOT / "images").glob("*.proto")]
    assert {f"images/{name}_pb2.py" for name in protos} <= names
    assert {
        "parasite_c/attendant.bin",
        "parasite_c/blob.bin",
        "parasite_c/bystander.bin",
        "parasite_c/finisher.bin",
        "parasite_c/keeper.bin",
        "parasite_c/stub",
        "parasite_c/watchdog.bin",
    } <= names
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
    """It is a program, no entry point: nothing but that starts Python isolated."""
    name = next(name for name in wheel.namelist() if name.endswith(".data/scripts/snap"))
    assert wheel.read(name).startswith(b"\x7fELF")
    assert wheel.getinfo(name).external_attr >> 16 & 0o111 == 0o111
    assert not [name for name in wheel.namelist() if name.endswith("entry_points.txt")]


def test_every_pattern_of_package_data_matches(wheel):
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    for package, globs in patterns.items():
        for pattern in globs:
            assert fnmatch.filter(wheel.namelist(), f"{package}/{pattern}"), f"{package}: {pattern}"


def test_make_clean_leaves_the_sources(built, tmp_path):
    shutil.copytree(built / "source", tmp_path / "source", symlinks=True)
    subprocess.run(["make", "-s", "clean"], cwd=tmp_path / "source", check=True, capture_output=True)
    before = set(map(pathlib.Path, (built / "before").read_text().splitlines()))
    assert files_below(tmp_path / "source") == before


@pytest.fixture(scope="module")
def snap(built):
    """The command of an installed wheel: snap(ARGS..) -> (status, object). Dependencies are those of this environment."""
    folder = built / "installed"
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    here = next(path for path in map(pathlib.Path, sys.path) if (path / "sqlalchemy").is_dir())
    site = next((folder / "lib").glob("python3*/site-packages"))
    (site / "dependencies.pth").write_text(
        f"{here}\n"
    )  # its own .pth files, this checkout's too, are not followed
    command = [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index"]
    done = subprocess.run(
        [*command, next(built.glob("*.whl"))], capture_output=True, text=True, check=False, cwd=built
    )
    assert done.returncode == 0, done.stderr
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}

    def run(*args):
        done = subprocess.run(
            [folder / "bin" / "snap", *map(str, args), "--json"], env=env, cwd=built, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert "Traceback" not in done.stderr
        return done.returncode, json.loads(done.stdout)

    found = subprocess.run(
        [python, "-c", "import checkpoint, migrations, store; print(checkpoint.__file__, store.__file__)"],
        env=env, cwd=built, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    assert all(path.startswith(str(site)) for path in found), found
    return run


def test_installed_doctor(snap, tmp_path):
    status, report = snap("doctor", "--store", tmp_path / "store")
    assert (status == 0) == report["ok"]
    assert {"pagemap_scan", "clone3_set_tid"} <= {feature["name"] for feature in report["features"]}


def test_installed_elsewhere(built, tmp_path):
    """`pip install --prefix` (and --user) put it beside no Python; isolated Python does not look there by itself."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-index",
        "--ignore-installed",
        "--prefix",
        tmp_path,
    ]
    subprocess.run([*command, next(built.glob("*.whl"))], check=True, capture_output=True, cwd=built)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    system = next(
        (p for p in (f"/usr/bin/{version}", f"/usr/local/bin/{version}") if os.access(p, os.X_OK)), None
    )
    if system is None:
        pytest.skip(f"no {version} of the system")
    here = next(path for path in map(pathlib.Path, sys.path) if (path / "sqlalchemy").is_dir())
    for name in os.listdir(here):  # its dependencies
        if "snap" not in name and name != "distutils-precedence.pth":
            (tmp_path / "lib" / version / "site-packages" / name).symlink_to(here / name)
    done = subprocess.run(
        [tmp_path / "bin" / "snap", "--version"],
        cwd=tmp_path,
        env={},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.requires("root")
def test_installed_take_and_rollback(snap, tmp_path, job):
    job.start(["sh", "-c", "exec sleep 60"])
    wait_until(lambda: state(job.pid) == "S", "a sleeping job")
    for options in ((), ("--kill",)):
        status, point = snap("take", job.pid, "--job", "sleeper", *options, "--store", tmp_path / "store")
        assert status == 0, point
        assert point["nr_tasks"] == 1
    reap(job.pid)
    with reaping():
        status, done = snap("rollback", "sleeper", "--store", tmp_path / "store")
    assert status == 0, done
    assert done["root_pid"] == job.pid
    assert is_running(job.pid)
