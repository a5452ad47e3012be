"""Many commands at once on a few jobs and one store: take, rollback, list, show, verify, forget and prune, in any order.

Each command must end by itself with a status that its page lists for what may be meanwhile (locked, no such point); in the end the
store has no damage, and each job's latest point brings it back and it says PASS.
"""

from __future__ import annotations

import pathlib
import random
import threading
import time
from collections.abc import Sequence

from tests.account import account
from tests.jobs import PROGRAMS, Job, compile_c, is_running, reaping
from tests.soak.frame import Done, Run, command

_PROGRAMS = ("threads.c", "mem_private.c", "tree.c")
_NR_CLIENTS = 4
_MEANWHILE = {0, 4, 11, 13}
"""Done, the process is gone (somebody rolls it back just now), locked, no such point (somebody forgot it)."""


def run(it: Run) -> None:
    """Clients of their own threads, until there is no more; then the reckoning."""
    jobs = [_start(it.folder, name) for name in _PROGRAMS]
    try:
        for job in jobs:
            _must(it, job.store, "take", str(job.pid), "--job", job.directory.name)
        problems: list[str] = []
        guard = threading.Lock()
        chances = [random.Random(it.seed + number) for number in range(_NR_CLIENTS)]
        with reaping():
            clients = [
                threading.Thread(target=_client, args=(it, jobs, chance, problems, guard))
                for chance in chances
            ]
            for client in clients:
                client.start()
            for client in clients:
                client.join()
            assert not problems, "\n".join(problems)
            for job in jobs:
                _must(it, job.store, "rollback", job.directory.name)
                it.counts["jobs brought back in the end"] += 1
        _must(it, jobs[0].store, "verify")
        _must(it, jobs[0].store, "prune")
        _must(it, jobs[0].store, "verify")
        for job in jobs:
            assert (verdict := job.finish()) == "PASS", f"{job.directory.name}: {verdict}; {job.said()}"
    except Exception:
        print(_report(it, jobs))
        raise
    finally:
        for job in jobs:
            job.destroy()


def _report(it: Run, jobs: Sequence[Job]) -> str:
    """What is needed to find out why: the last commands, and what each task of each job does now, and a second later."""
    lines = ["the last commands, by the second in which each began:", *it.history]
    for when in ("now", "a second later"):
        lines += [f"{job.directory.name} {when}:\n{account(job.pid)}" for job in jobs]
        time.sleep(1.0)
    return "\n".join(lines)


def _start(folder: pathlib.Path, name: str) -> Job:
    program = compile_c(PROGRAMS / name, folder / pathlib.Path(name).stem)
    return Job(folder / f"{program.name}-job", folder / "store").start([program]).wait_ready()


def _must(it: Run, store: pathlib.Path, *line: str) -> Done:
    done = _noted(it, store, *line)
    assert done.status == 0, f"snap {' '.join(line)}: {done.said}"
    return done


def _noted(it: Run, store: pathlib.Path, *line: str) -> Done:
    """A command that is kept in the history, with its beginning, its duration and its status."""
    began = time.monotonic()
    text = f"  {began:.2f} snap {' '.join(line)}"
    try:
        done = command(it.folder, store, *line)
    except BaseException as error:
        it.history.append(f"{text}: {error!r}")
        raise
    it.history.append(f"{text}: status {done.status} after {time.monotonic() - began:.2f} s")
    return done


def _client(
    it: Run, jobs: Sequence[Job], chance: random.Random, problems: list[str], guard: threading.Lock
) -> None:
    def going_on() -> bool:
        with guard:
            return not problems and it.more()

    try:
        while going_on():
            job = chance.choice(jobs)
            line = _line(job, chance)
            done = _noted(it, job.store, *line)
            with guard:
                it.counts[f"{line[0]}: status {done.status}"] += 1
                if line[0] == "take" and done.status == 0:
                    job.points.append(done.answer)
                if done.status not in _MEANWHILE:
                    problems.append(f"snap {' '.join(line)}: status {done.status}: {done.said}")
    except Exception as error:
        with guard:
            problems.append(repr(error))


def _line(job: Job, chance: random.Random) -> list[str]:
    name = job.directory.name
    what = chance.choices(
        ("take", "rollback", "list", "show", "verify", "forget", "keep", "prune"), (30, 8, 8, 8, 4, 12, 4, 4)
    )[0]
    if what == "take":
        return ["take", str(job.pid), "--job", name]
    if what == "list":
        return ["list"]
    if what in {"verify", "prune"}:
        return [what]
    if what == "keep":
        return ["forget", "--keep-last", str(chance.randint(1, 4)), "--job", name]
    ids = [str(point["id"]) for point in job.points]
    if what == "forget" and len(ids) > 1:  # the latest is left for the end
        return ["forget", chance.choice(ids[:-1])]
    if what in {"show", "rollback"} and ids:
        return [what, chance.choice(ids[-6:])]
    return ["list"] if is_running(job.pid) else ["rollback", name]
