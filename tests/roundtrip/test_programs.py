"""Every self-checking program: start, take, kill, roll back, let it check itself; plain and at the end of a chain."""

from __future__ import annotations

import pathlib

import pytest

from tests.conftest import PROGRAMS, missing_feature
from tests.jobs import SnapFailedError, is_running

pytestmark = pytest.mark.requires("root")


def directives(path: pathlib.Path) -> dict[str, str]:
    """The "// snap-test: WORD REST" lines of a program."""
    found = {}
    for line in path.read_text().splitlines():
        if line.startswith("// snap-test:"):
            word, _, rest = line.removeprefix("// snap-test:").strip().partition(" ")
            found[word] = rest
    return found


def programs(*, refused: bool) -> list[str]:
    found = {path.name: directives(path) for path in PROGRAMS.glob("*.c")}
    return sorted(
        name for name, words in found.items() if ("refused" in words) == refused and "unchecked" not in words
    )


def prepare(name: str, job, compile_program):
    for feature in directives(PROGRAMS / name).get("requires", "").split():
        if (reason := missing_feature(feature)) is not None:
            pytest.skip(reason)
    return job.start([compile_program(name)]).wait_ready()


@pytest.mark.parametrize("name", programs(refused=False))
def test_is_sound(name, job, compile_program):
    """Without snap: a program that fails by itself proves nothing."""
    prepare(name, job, compile_program)
    assert job.finish() == "PASS"


@pytest.mark.parametrize("name", programs(refused=False))
def test_plain(name, job, compile_program):
    prepare(name, job, compile_program)
    job.take("--kill")
    job.rollback()
    assert is_running(job.pid)
    assert job.finish() == "PASS"


@pytest.mark.parametrize("name", programs(refused=False))
def test_three_points(name, job, compile_program):
    prepare(name, job, compile_program)
    job.take()
    job.take()
    job.take("--kill")
    first, second, third = job.points
    assert first["parent"] is None
    assert second["parent"] == first["id"]
    assert third["parent"] == second["id"]
    job.rollback()
    assert job.finish() == "PASS"


@pytest.mark.parametrize("name", programs(refused=True))
def test_refused(name, job, compile_program):
    """Named, exit status 5, and the job none the worse for it."""
    prepare(name, job, compile_program)
    with pytest.raises(SnapFailedError) as caught:
        job.take("--kill")
    assert caught.value.status == 5, str(caught.value)
    assert directives(PROGRAMS / name)["refused"].lower() in str(caught.value).lower()
    assert job.finish() == "PASS"
