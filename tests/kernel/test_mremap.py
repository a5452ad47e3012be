"""What a job sees of the marks that tracking leaves on its mappings: programs/remaps.c, before and after takes.

`SHOWS` is the whole list; checkpoint/tracking.md has it in words.
"""

from __future__ import annotations

import errno
import os
import pathlib

import pytest

from checkpoint.tracking import keeper, write_protect
from tests.jobs import Job, wait_until

pytestmark = pytest.mark.requires("root", "wp_async", "rseq_configuration")

PROGRAM = str(pathlib.Path(__file__).parent / "programs" / "remaps.c")
SHOWS = {
    # mremap(2) of a range of which a part is older than the last take and a part is newer
    "hole_touched": errno.EFAULT,
    "hole_untouched": errno.EFAULT,
    "neighbour": errno.EFAULT,
    "move_hole": errno.EFAULT,
    # the rest
    "own_userfaultfd": errno.EBUSY,
    "flag_in_smaps": 1,
    "mappings_by_brk": 1,
}
"""What differs after a take with write_protect; every other result is as without."""


class Remaps:
    """The program; each round says its results."""

    def __init__(self, job: Job, program: pathlib.Path) -> None:
        self.job = job
        job.directory.mkdir()
        self.fifo = job.directory / "orders"
        os.mkfifo(self.fifo)
        shell = f'exec "{program}" <> "{self.fifo}"'
        job.start(["/bin/sh", "-c", shell])
        self.orders = os.open(self.fifo, os.O_WRONLY)
        self.wait("ready")

    def lines(self) -> list[str]:
        path = self.job.directory / "stdout"
        return path.read_text().splitlines() if path.exists() else []

    def wait(self, word: str) -> None:
        wait_until(lambda: self.lines()[-1:] == [word], f"the program says {word}")

    def order(self, byte: bytes) -> None:
        os.truncate(self.job.directory / "stdout", 0)
        os.write(self.orders, byte)

    def round(self) -> dict[str, int]:
        self.order(b"x")
        self.wait("ready")
        words = (line.split() for line in self.lines() if " " in line)
        return {name: int(result) for name, result in words}


@pytest.fixture
def remaps(job, compile_program, tmp_path, monkeypatch):
    monkeypatch.setenv("SNAP_RUNTIME_DIR", str(tmp_path / "run"))
    made = Remaps(job, compile_program(PROGRAM))
    yield made
    os.close(made.orders)


def test_nothing_shows_without_a_take(remaps):
    assert set(remaps.round().values()) == {0}


def test_what_shows_after_a_take(remaps):
    plain = remaps.round()
    remaps.job.take()
    found = remaps.round()
    assert found.pop("collapse") in {0, errno.EINVAL}, "EINVAL unless khugepaged was there before the take"
    del plain["collapse"]
    assert found == plain | SHOWS


def test_only_the_last_take_counts(remaps):
    """What was mapped after it merges again."""
    plain = remaps.round()
    remaps.job.take()
    remaps.round()
    found = remaps.round()
    assert {name: result for name, result in found.items() if result} == {
        name: result for name, result in SHOWS.items() if name == "flag_in_smaps"
    }, plain


def test_registering_the_newer_part_does_not_help(remaps):
    """A second take registers it as well; but it has an anon_vma of its own since it was touched, so it never merges."""
    remaps.job.take()
    remaps.order(b"r")
    wait_until(lambda: remaps.lines() == ["ready"], "the middle is renewed")
    remaps.job.take()
    os.write(remaps.orders, b"x")
    wait_until(lambda: "end" in remaps.lines(), "the program has moved it")
    assert f"registered_later {errno.EFAULT}" in remaps.lines()


def test_compare_leaves_nothing_behind(remaps):
    plain = remaps.round()
    point = remaps.job.take("--tracker", "compare")
    assert point["tracker"] == "compare"
    assert remaps.round() == plain
    assert not keeper.running()


def test_compare_ends_what_an_earlier_take_has_left(remaps):
    plain = remaps.round()
    remaps.job.take()
    assert keeper.running() == [remaps.job.pid]
    remaps.job.take("--tracker", "compare")
    assert not keeper.running()
    assert remaps.round() == plain
    assert remaps.job.take()["tracker"] == "write_protect"
    assert keeper.running() == [remaps.job.pid]


def test_a_job_that_nears_the_limit_of_mappings_is_not_tracked(remaps, monkeypatch):
    """Newcomers do not merge with what is registered: a heap that grows between takes has a mapping more for each of them."""
    remaps.job.take()
    monkeypatch.setattr(write_protect, "max_mappings", lambda: 8)
    with write_protect.WriteProtectSession(
        remaps.job.pid, {remaps.job.pid: start_time(remaps.job.pid)}, ""
    ) as session:
        assert session.tracks(remaps.job.pid)
        assert session.collect(remaps.job.pid, write_protect.private_ranges(remaps.job.pid)) is None
        assert not session.tracks(remaps.job.pid)
        session.confirm()
    smaps = pathlib.Path(f"/proc/{remaps.job.pid}/smaps")
    wait_until(lambda: " uw" not in smaps.read_text(), "the keeper of before has ended")


def start_time(pid: int) -> int:
    return int(pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19])
