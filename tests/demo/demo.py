"""`make demo`: two real jobs, taken every second in a chain, killed, rolled back to a middle point, seen to go on.

Uses nothing of the project but the `snap` command, as a user would. Every command it runs is printed with its
output; what is claimed is checked, and the exit status says whether it held.
"""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

HERE = pathlib.Path(__file__).resolve().parent
SNAP = pathlib.Path(sys.executable).with_name("snap")
PIPELINE = """
i=0
while true; do i=$((i+1)); echo "line $i"; sleep 0.05; done | sed -u 's/line/number/' | while read -r word n; do
    sum=$(( (sum * 31 + n) % 1000003 )); echo "$n $sum"
done >>"$1"
"""
POINTS = 5
MIDDLE = 3


def run(*args: str, env: dict[str, str]) -> dict[str, Any]:
    """Run `snap ARGS`, show it, and return its JSON."""
    print(f"$ snap {' '.join(args)}", flush=True)
    done = subprocess.run([SNAP, *args, "--json"], env=env, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"demo: status {done.returncode}: {done.stdout}{done.stderr}")
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def show(*args: str, env: dict[str, str]) -> None:
    """Run `snap ARGS` for the reader only."""
    print(f"$ snap {' '.join(args)}", flush=True)
    subprocess.run([SNAP, *args], env=env, check=True)


def wait(condition: Callable[[], bool], what: str, seconds: float = 60) -> None:
    """Until it is so, or the demo has failed."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            sys.exit(f"demo: {what}: not within {seconds:g} s")
        time.sleep(0.02)


def lines(path: pathlib.Path, start: int = 0) -> list[str]:
    """Complete lines of a log from byte `start` on."""
    return path.read_bytes()[start:].decode().split("\n")[:-1] if path.exists() else []


def kill(pid: int) -> None:
    """The whole session, then reap what is ours."""
    listing = subprocess.run(
        ["ps", "-o", "pid=", "-s", str(pid)], capture_output=True, text=True, check=False
    )
    for word in listing.stdout.split():
        try:
            os.kill(int(word), signal.SIGKILL)
        except ProcessLookupError:
            pass
    try:
        os.waitpid(pid, 0)
    except ChildProcessError:
        pass
    wait(lambda: not pathlib.Path(f"/proc/{pid}").exists(), f"process {pid} gone")


def key(line: str) -> int:
    """The step that a line of either log speaks of."""
    words = line.split()
    return int(words[1] if words[0] == "step" else words[0])


def demo(name: str, command: list[str], folder: pathlib.Path, env: dict[str, str]) -> None:
    """One job from start to end."""
    log = folder / f"{name}.log"
    print(f"\n== {name}: {' '.join(command[:2])} ...", flush=True)
    with open(folder / f"{name}.err", "wb") as errors:
        job = subprocess.Popen(
            [*command, str(log)],
            stdin=subprocess.DEVNULL,
            stdout=errors,
            stderr=errors,
            start_new_session=True,
            cwd=folder,
        )
    job.returncode = 0  # we reap it ourselves
    try:
        follow(name, job.pid, log, env)
    finally:
        kill(job.pid)


def follow(name: str, pid: int, log: pathlib.Path, env: dict[str, str]) -> None:
    """Points, the kill, the rollback, and what the log says of them."""
    wait(lambda: len(lines(log)) > 3, "the job's first lines")
    at_point = []
    for _ in range(POINTS):
        at_point.append(key(lines(log)[-1]))
        run("take", str(pid), "--job", name, env=env)
        time.sleep(1)
    show("list", "--job", name, env=env)
    before = {key(line): line for line in lines(log)}
    last = max(before)
    kill(pid)
    print(f"killed at {before[last]!r}; rolling back to point {MIDDLE} of {POINTS}", flush=True)
    middle = f"{name}~{POINTS - MIDDLE}"
    end = log.stat().st_size
    result = run("rollback", middle, env=env)
    if result["root_pid"] != pid:
        sys.exit("demo: the job came back under another pid")
    wait(
        lambda: any(key(line) > last for line in lines(log, end)),
        "the job passing the step it was killed at",
        240,
    )
    after = {key(line): line for line in lines(log, end)}
    first = min(after)
    # The point is a little younger than the last line seen before it was taken.
    if not at_point[MIDDLE - 1] < first <= at_point[MIDDLE]:
        sys.exit(f"demo: it went on at step {first}, the point was taken at step {at_point[MIDDLE - 1]}")
    different = [step for step in after if step in before and after[step] != before[step]]
    if different:
        sys.exit(
            f"demo: step {different[0]} came out differently: {before[different[0]]} / {after[different[0]]}"
        )
    same = sum(step in before for step in after)
    print(
        f"it went on at {after[first]!r}; {same} steps done again, every one with the same result", flush=True
    )
    run("take", str(pid), "--job", name, env=env)


def main() -> None:
    """Both jobs, then upkeep of the store."""
    folder = pathlib.Path(tempfile.mkdtemp(prefix="snap-demo-"))
    env = dict(os.environ, SNAP_STORE=str(folder / "store"))
    try:
        demo("simulation", [sys.executable, str(HERE / "simulation.py")], folder, env)
        demo("pipeline", ["bash", "-c", PIPELINE, "pipeline"], folder, env)
        print("\n== the store", flush=True)
        show("verify", env=env)
        show("forget", "--keep-last", "2", "--job", "simulation", env=env)
        show("prune", env=env)
        show("list", env=env)
    finally:
        shutil.rmtree(folder)
    print("\ndemo: all held", flush=True)


if __name__ == "__main__":
    main()
