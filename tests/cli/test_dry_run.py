"""`rollback --dry-run`: the documented object, and the warnings of the rollback itself."""

from __future__ import annotations

import re
import sys

import pytest

from checkpoint.model import tree
from tests.counting import goes_on
from tests.jobs import ROOT, reaping, snap, wait_until

pytestmark = pytest.mark.requires("root")

FAMILY = """
import os, sys, threading, time
held = open(sys.argv[1] + "/log", "a")
threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()
if os.fork() == 0:
    os.setsid()
    while True: time.sleep(1)
n = 0
while True:
    n += 1
    open(sys.argv[1] + "/count", "w").write(str(n))
    time.sleep(0.01)
"""


def documented() -> dict[str, str]:
    """Field -> type, of the table in checkpoint/DESIGN.md."""
    text = (
        (ROOT / "checkpoint/DESIGN.md").read_text().partition("### The plan in JSON")[2].partition("\n#")[0]
    )
    return dict(re.findall(r"^\| `([a-z_.]+)` \| ([^|]+) \|", text, re.MULTILINE))


def steps_documented() -> set[str]:
    text = (ROOT / "checkpoint/DESIGN.md").read_text().partition("| `plan.steps` |")[2].partition("\n")[0]
    return set(re.findall(r"`([a-z_]+)`", text.partition("(")[2].partition(")")[0]))


TYPES = {
    "string": str, "true": bool, "number": int, "list": list, "object": dict, "list of numbers": list,
    "list of strings": list,
}  # fmt: skip


def test_the_object_is_the_documented_one(job):
    job.start([sys.executable, "-c", FAMILY])
    goes_on_at_last(job)
    job.take()
    with (job.directory / "log").open("a") as log:
        log.write("more\n")
    planned = snap("rollback", "latest", "--dry-run", store=job.store)
    fields = documented()
    assert {name for name in fields if "." not in name} == set(planned)
    assert {name.removeprefix("plan.") for name in fields if "." in name} == set(planned["plan"])
    for name, kind in fields.items():
        value = planned["plan"][name.removeprefix("plan.")] if "." in name else planned[name]
        assert isinstance(value, TYPES[kind.strip()]), name
    plan = planned["plan"]
    assert (plan["nr_processes"], plan["nr_threads"]) == (2, 3)
    assert [one["pid"] for one in plan["kill"]] == planned["pids"]
    assert plan["steps"][0] == {"do": "spawn_root", "pid": job.pid}
    assert {step["do"] for step in plan["steps"]} <= steps_documented()
    assert [step["do"] for step in plan["threads"]] == ["make_thread"]
    goes_on(job)
    with reaping():
        done = snap("rollback", "latest", store=job.store)
    # A file that the job writes all the time has another size a moment later.
    without = lambda texts: {re.sub(r"\d+ (bytes|now)", "", text) for text in texts}  # noqa: E731
    assert without(planned["warnings"]) == without(done["warnings"])
    assert [text for text in planned["warnings"] if "log" in text], "a changed file is known before"
    goes_on(job)


def goes_on_at_last(job) -> None:
    wait_until((job.directory / "count").exists, "counting")
    goes_on(job)


def test_every_step_of_the_planner_is_documented():
    names = {re.sub(r"(?<!^)(?=[A-Z])", "_", kind.__name__).lower() for kind in tree.Step.__args__}
    assert names == steps_documented()
