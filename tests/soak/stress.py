"""Takes of programs/stress.c under the oracle; every tenth point is rolled back to. The program finds wrong memory by itself, too."""

from __future__ import annotations

import pathlib

from tests.jobs import Job, compile_c, is_running, reaping
from tests.soak.frame import Run, command

PROGRAM = pathlib.Path(__file__).parent / "programs" / "stress.c"
_REFUSED = 5
_TAKES_OF_ONE = 40
_ROLL_BACK_EACH = 10
_TIDY_EACH = 15


def run(it: Run) -> None:
    """One program after the other; each is asked for its verdict in the end."""
    program = compile_c(PROGRAM, it.folder / "stress")
    chance = it.chance()
    number = 0
    going_on = it.more()
    while going_on:
        number += 1
        job = Job(it.folder / f"job{number}", it.folder / "store")
        aio = ["aio"] if number % 2 == 0 else []
        job.start([program, str(chance.choice((1, 3, 6))), str(chance.randrange(1 << 30)), *aio]).wait_ready()
        try:
            for taken in range(1, _TAKES_OF_ONE + 1):
                _take(it, job, f"stress{number}")
                if taken % _ROLL_BACK_EACH == 0:
                    _roll_back(it, job, f"stress{number}")
                if taken % _TIDY_EACH == 0:
                    _tidy(it, f"stress{number}")
                if not (going_on := it.more()):
                    break
            verdict = job.finish()
            assert verdict == "PASS", f"{verdict}; {job.said()}"
            it.counts["programs that passed"] += 1
            it.counts["operations of theirs"] += int((job.directory / "ops").read_text())
        finally:
            job.destroy()
    done = command(it.folder, it.folder / "store", "verify")
    assert done.status == 0, done.said
    it.counts["stores verified"] += 1


def _take(it: Run, job: Job, name: str) -> None:
    done = command(it.folder, job.store, "take", str(job.pid), "--job", name)
    if done.status == _REFUSED and "asynchronous I/O" in done.said:
        it.counts["takes refused while AIO was under way"] += 1
    else:
        assert done.status == 0, done.said
        it.counts["points under the oracle"] += 1
    assert is_running(job.pid), f"the job ended: {job.said()}"


def _roll_back(it: Run, job: Job, name: str) -> None:
    with reaping():
        done = command(it.folder, job.store, "rollback", name)
    assert done.status == 0, done.said
    it.counts["rollbacks of a living job"] += 1


def _tidy(it: Run, name: str) -> None:
    for line in (("forget", "--keep-last", "4", "--job", name), ("prune",)):
        done = command(it.folder, it.folder / "store", *line)
        assert done.status == 0, done.said
    it.counts["forget and prune"] += 1
