"""What every test gets: a clean start, `@requires(...)`, and a failure when it leaves something behind."""

from __future__ import annotations

import contextlib
import os
import pathlib
import signal
import threading
import time

import pytest

from tests.jobs import PROGRAMS, Job, be_subreaper, compile_c, reap_all, tree


def pytest_configure(config):
    """Orphans of jobs become our children; jobs inherit no descriptor of ours."""
    be_subreaper()
    # Whoever started us in the background has SIGINT ignored, and what tests start would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for fd in map(int, os.listdir("/proc/self/fd")):
        if fd > 2:
            with contextlib.suppress(OSError):
                os.set_inheritable(fd, False)


def missing_feature(name: str) -> str | None:
    """Why a feature that a test asks for is missing here; None if it is there."""
    if name == "root":
        return None if os.geteuid() == 0 else "needs root: run the tests with sudo"
    if name.startswith("program:"):
        program = name.removeprefix("program:")
        found = any(os.access(f"{folder}/{program}", os.X_OK) for folder in os.environ["PATH"].split(":"))
        return None if found else f"needs the program {program}: install it"
    if name.startswith("cpu:"):
        flag = name.removeprefix("cpu:")
        flags = pathlib.Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split()
        return None if flag in flags else f"this CPU has no {flag}"
    from checkpoint.kernel.features import probe

    feature = probe(name)
    return None if feature.ok else f"this kernel has no {name}: {feature.note}"


def pytest_runtest_setup(item):
    for marker in item.iter_markers("requires"):
        for name in marker.args:
            reason = missing_feature(name)
            if reason is None:
                continue
            if os.environ.get("SNAP_TEST_REQUIRE") == "all":
                pytest.fail(f"SNAP_TEST_REQUIRE=all: {reason}", pytrace=False)
            pytest.skip(reason)


def our_children() -> set[int]:
    return set(tree(os.getpid())[1:])


def our_mounts() -> set[str]:
    return {line.split()[4] for line in pathlib.Path("/proc/self/mountinfo").read_text().splitlines()}


def our_files() -> set[str]:
    """Names outside the test's own directories that this project makes."""
    found: set[str] = set()
    for folder in ("/dev/shm", "/run", "/tmp"):
        with contextlib.suppress(OSError):
            found |= {
                f"{folder}/{name}" for name in os.listdir(folder) if name.startswith(("snap-", "snap."))
            }
    return found


def our_descriptors() -> dict[int, str]:
    found = {}
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found[int(fd)] = os.readlink(f"/proc/self/fd/{fd}")
    return found


def describe(pid: int) -> str:
    with contextlib.suppress(OSError):
        command = (
            pathlib.Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        )
        return f"{pid} ({command.strip()})"
    return str(pid)


@pytest.fixture(autouse=True)
def _leaves_nothing_behind(request):
    """Fails the test that leaves a process, a mount, a file or a thread of ours."""
    processes, mounts, files = our_children(), our_mounts(), our_files()
    yield
    end = time.monotonic() + 3
    while (left := our_children() - processes) and time.monotonic() < end:
        reap_all()
        time.sleep(0.01)
    problems = []
    if left:
        problems.append("processes " + ", ".join(describe(pid) for pid in sorted(left)))
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        reap_all()
    # Under xdist another worker's mounts and files may appear meanwhile.
    alone = "PYTEST_XDIST_WORKER" not in os.environ
    if alone and (mounted := our_mounts() - mounts):
        problems.append("mounts " + ", ".join(sorted(mounted)))
    if alone and (made := our_files() - files):
        problems.append("files " + ", ".join(sorted(made)))
    if threads := [one.name for one in threading.enumerate() if one.name == "snap-acting"]:
        problems.append(f"{len(threads)} threads that act with the rights of others")
    if problems:
        pytest.fail("the test left behind: " + "; ".join(problems), pytrace=False)


@pytest.fixture(scope="session")
def compile_program(tmp_path_factory):
    """compile_program("signals.c") -> path of the program, compiled once per session."""
    folder = tmp_path_factory.mktemp("programs")
    made: dict[str, pathlib.Path] = {}

    def compile_one(name: str, *options: str) -> pathlib.Path:
        if name not in made:
            target = folder / pathlib.Path(name).stem
            compile_c(PROGRAMS / name, target, *options)
            made[name] = target
        return made[name]

    return compile_one


@pytest.fixture
def job(tmp_path):
    """A Job with a directory and a store of its own; what is left of it is killed after the test."""
    made = Job(directory=tmp_path / "job", store=tmp_path / "store")
    yield made
    made.destroy()
