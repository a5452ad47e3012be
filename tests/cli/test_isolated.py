"""The installed command obeys nothing that a user's environment or current directory holds."""

import json
import pathlib
import resource
import shutil
import subprocess
import sys

import pytest

from store import Store
from tests.jobs import ROOT, is_running, state, wait_until

SNAP = pathlib.Path(sys.executable).parent / "snap"
MODULES = ("store", "images", "snapshotter", "checkpoint", "click", "json", "sqlalchemy", "numpy",
           "sitecustomize", "usercustomize", "start")  # fmt: skip


@pytest.fixture
def trap(tmp_path):
    """A directory full of modules that say so when they are run, and what was run."""
    folder, ran = tmp_path / "trap", tmp_path / "ran"
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    for place in (
        folder,
        folder / "lib" / version,
        folder / ".local" / "lib" / version / "site-packages",
        folder / "home" / ".local" / "lib" / version / "site-packages",
    ):
        for name in MODULES:
            (place / name).mkdir(parents=True)
            text = f"open({str(ran)!r}, 'a').write({f'{place}/{name}'!r} + '\\n')\n"
            (place / name / "__init__.py").write_text(text)
            (place / f"{name}.py").write_text(text)
    (folder / "startup.py").write_text(f"open({str(ran)!r}, 'a').write('startup')\n")
    return folder, ran


@pytest.fixture
def run(trap, tmp_path):
    """run(ENV, WORDS..) -> (status, stdout, stderr) in the middle of the trap."""
    Store.open(tmp_path / "store", create=True).close()

    def call(env, *words, **popen):
        done = subprocess.run(
            [SNAP, *words, "--store", tmp_path / "store"], env={"PATH": "/usr/bin:/bin"} | env, cwd=trap[0],
            capture_output=True, text=True, check=False, **popen,
        )  # fmt: skip
        return done.returncode, done.stdout, done.stderr

    return call


@pytest.fixture(scope="module")
def preload(tmp_path_factory):
    """A library that says so when it is loaded."""
    folder = tmp_path_factory.mktemp("preload")
    source = folder / "evil.c"
    source.write_text(
        "#include <fcntl.h>\n#include <stdlib.h>\n"
        '__attribute__((constructor)) static void run(void) { creat(getenv("TRAP_RAN"), 0600); }\n'
    )
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", folder / "evil.so", source], check=True)
    return folder / "evil.so"


def environments(folder, preload, ran):
    return {
        "nothing": {},
        "PYTHONPATH": {"PYTHONPATH": str(folder)},
        "PYTHONPATH empty part": {"PYTHONPATH": ":/nowhere"},
        "PYTHONHOME": {"PYTHONHOME": str(folder)},
        "PYTHONPLATLIBDIR": {"PYTHONPLATLIBDIR": "nowhere"},
        "startup": {"PYTHONSTARTUP": f"{folder}/startup.py", "PYTHONINSPECT": "1"},
        "PYTHONUSERBASE": {"PYTHONUSERBASE": f"{folder}/.local"},
        "HOME": {"HOME": f"{folder}/home"},
        "warnings": {"PYTHONWARNINGS": "error", "PYTHONDEVMODE": "1", "PYTHONOPTIMIZE": "2"},
        "encoding": {"PYTHONIOENCODING": "utf-16", "PYTHONUTF8": "0", "LC_ALL": "C"},
        "locale": {"LC_ALL": "xx_XX.NOTHING", "LANG": "C", "LOCPATH": str(folder), "GCONV_PATH": str(folder)},
        "LD_PRELOAD": {"LD_PRELOAD": str(preload), "TRAP_RAN": str(ran)},
        "LD_AUDIT": {"LD_AUDIT": str(preload), "TRAP_RAN": str(ran)},
        "LD_LIBRARY_PATH": {"LD_LIBRARY_PATH": str(folder)},
        "shell": {"ENV": f"{folder}/startup.py", "BASH_ENV": f"{folder}/startup.py", "SHELLOPTS": "xtrace"},
        "OPENSSL_CONF": {"OPENSSL_CONF": f"{folder}/startup.py"},
        "protobuf": {"PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION": "nonsense"},
        "TMPDIR": {"TMPDIR": "/nowhere"},
        "COLUMNS": {"COLUMNS": "wide", "LINES": "-1", "TERM": "\x1b"},
    }


@pytest.fixture
def strangers_venv(tmp_path, trap):
    """The path of an interpreter in a virtual environment whose packages run code when Python starts."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    home = tmp_path / "venv"
    packages = home / "lib" / version / "site-packages"
    packages.mkdir(parents=True)
    (home / "bin").mkdir()
    (home / "bin" / "python").touch()
    (home / "pyvenv.cfg").write_text(
        f"home = /usr/bin\ninclude-system-site-packages = false\nversion = {sys.version}\n"
    )
    (packages / "evil.pth").write_text(f"import sys; open({str(trap[1])!r}, 'a').write('venv')\n")
    return home / "bin" / "python"


def test_another_interpreters_packages_are_not_found(run, trap, strangers_venv):
    """Python takes the packages beside the path in __PYVENV_LAUNCHER__, even with -I (Modules/getpath.py)."""
    env = {"__PYVENV_LAUNCHER__": str(strangers_venv)}
    subprocess.run([sys.executable, "-I", "-c", ""], env=env, capture_output=True, check=False)
    assert trap[1].exists(), "an ordinary Python falls into it"
    trap[1].unlink()
    assert run(env, "list") == (0, f"no points in {trap[0].parent}/store\n", "")
    assert not trap[1].exists()


PRINT_ENVIRONMENT = "#!/bin/sh\nexec /usr/bin/env\n"


def environment_behind(tmp_path, env):
    """What the launcher passes on: it is copied beside a false Python that prints its environment."""
    (tmp_path / "bin").mkdir(exist_ok=True)
    copied = tmp_path / "bin" / "snap"
    shutil.copy(SNAP, copied)
    python = tmp_path / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}"
    python.write_text(PRINT_ENVIRONMENT)
    python.chmod(0o755)
    done = subprocess.run([copied], env=env, capture_output=True, text=True, check=True)
    return dict(line.split("=", 1) for line in done.stdout.splitlines()) | {"_": "", "PWD": ""}


def test_only_the_variables_that_snap_reads_are_passed_on(tmp_path):
    kept = {
        "SNAP_STORE": "/s", "HOME": "/h", "XDG_CONFIG_HOME": "/c", "XDG_DATA_HOME": "/d", "XDG_RUNTIME_DIR": "/r",
        "LANG": "C", "LC_ALL": "C.UTF-8", "TZ": "Europe/Berlin", "TERM": "vt100", "COLUMNS": "90", "NO_COLOR": "1",
        "_SNAP_COMPLETE": "bash_complete", "COMP_WORDS": "snap ta", "COMP_CWORD": "1",
    }  # fmt: skip
    dropped = dict.fromkeys(("__PYVENV_LAUNCHER__", "PYTHONHOME", "LOCPATH", "TMPDIR", "SNAP", "HOMEX", "ANYTHING", "TZDIR"), "/x")  # fmt: skip
    expected = kept | {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "_": "", "PWD": ""}
    assert environment_behind(tmp_path, kept | dropped | {"PATH": "/evil"}) == expected


@pytest.mark.parametrize("zone", ["/etc/shadow", ":/etc/shadow", "../../../etc/shadow"])
def test_a_time_zone_is_no_path(tmp_path, zone):
    assert "TZ" not in environment_behind(tmp_path, {"TZ": zone})


NAMES = list(environments("", "", ""))


@pytest.mark.parametrize("name", NAMES)
def test_the_environment_leads_nowhere(run, trap, preload, name):
    folder, ran = trap
    (folder / "libm.so.6").write_bytes(b"no library")
    env = environments(folder, preload, ran)[name]
    status, out, err = run(env, "doctor", "--json")
    assert (status, err) == run({}, "doctor", "--json")[::2]
    assert json.loads(out)["features"]
    assert run(env, "list") == (0, f"no points in {folder.parent}/store\n", "")
    assert not ran.exists(), ran.read_text()


def test_the_trap_works(trap, run, preload):
    """What the tests above rely on: an ordinary Python falls into it."""
    folder, ran = trap
    (folder / "libm.so.6").write_bytes(b"no library")
    command = [sys.executable, "-c", "import store"]
    for env in (environments(folder, preload, ran)[name] for name in ("PYTHONPATH", "LD_PRELOAD", "HOME")):
        subprocess.run(command, env=env, cwd=folder, capture_output=True, check=False)
        assert ran.exists(), env
        ran.unlink()


def test_a_link_to_the_command(tmp_path, trap):
    (tmp_path / "snap").symlink_to(SNAP)
    done = subprocess.run(
        [tmp_path / "snap", "--version"], cwd=trap[0], env={}, capture_output=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, b"")


LITTLE_KIB = (1000, 10000, 66000, 80000, 120000, 165000, 200000, 300000)


def within(kib):
    """For preexec_fn: with so much address space."""
    return lambda: resource.setrlimit(resource.RLIMIT_AS, (kib << 10, kib << 10))


def is_said_in_a_sentence(status, err):
    assert "Traceback" not in err
    assert "internal error" not in err
    assert all(line.startswith(("snap: ", "hint: ", "  ")) for line in err.splitlines()), err
    assert status == 0 or "memory" in err or "thread" in err, err


@pytest.mark.parametrize("kib", LITTLE_KIB)
@pytest.mark.parametrize("words", [("list",), ("doctor",), ("verify",), ("prune",)])
def test_little_memory_is_said_in_a_sentence(run, kib, words):
    status, _, err = run({}, *words, preexec_fn=within(kib))
    is_said_in_a_sentence(status, err)


@pytest.mark.parametrize("number", [4, 8, 12, 16, 20, 24, 40])
@pytest.mark.parametrize("words", [("list",), ("doctor",), ("verify",), ("prune",), ("take", "1")])
def test_few_descriptors_are_said_in_a_sentence(run, number, words):
    limit = (number, number)
    status, _, err = run({}, *words, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, limit))
    assert "Traceback" not in err
    assert "internal error" not in err
    assert all(line.startswith(("snap: ", "hint: ", "  ")) for line in err.splitlines()), err
    assert number > 18 or (status == 1 and "ulimit -n" in err)


@pytest.mark.requires("root")
def test_little_memory_for_a_take(run, job):
    job.start(["sh", "-c", "exec sleep 60"])
    wait_until(lambda: state(job.pid) == "S", "a sleeping job")
    for kib in LITTLE_KIB:
        status, _, err = run({}, "take", str(job.pid), preexec_fn=within(kib))
        is_said_in_a_sentence(status, err)
        assert is_running(job.pid)
    assert run({}, "take", str(job.pid))[0] == 0


def test_the_checkout_is_what_runs():
    done = subprocess.run(
        [SNAP.parent / "python", "-I", "-c", "import snapshotter.start as s; print(s.__file__)"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert pathlib.Path(done.stdout.strip()) == ROOT / "snapshotter" / "start.py"
