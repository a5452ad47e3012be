"""`snap show POINT`: what a point holds."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import click

from snapshotter.base.units import format_bytes, format_us, plural
from snapshotter.cli.options import App, common
from snapshotter.cli.output import local, point_json, short, table

if TYPE_CHECKING:
    from snapshotter.manager.listing import Details


@click.command("show")
@click.argument("point", metavar="POINT")
@click.option("--image", metavar="NAME", help="Print one image (process/PID, mm/PID, files ...) as JSON.")
@common
def command(app: App, point: str, image: str | None) -> int:
    """Show what POINT holds: tasks, memory, files, and the files outside of it that a rollback needs."""
    from snapshotter.manager.listing import image_json, show

    with app.session() as session:
        if image is not None:
            import json

            decoded = image_json(session, point, image)
            app.out.result(decoded, json.dumps(decoded, indent=2).split("\n"))
            return 0
        details = show(session, point)
    data = point_json(details.point) | {
        "children": list(details.children),
        "manifest": details.manifest,
        "tasks": [_process_json(process) for process in details.processes],
        "memory": {name: _memory_json(mm) for name, mm in details.memory.items()},
        "files": details.files,
        "file_identities": [dataclasses.asdict(record) for record in details.file_identities],
    }
    app.out.result(data, _text(details), brief=details.point.id)
    return 0


def _process_json(process: dict[str, Any]) -> dict[str, Any]:
    return {
        "pid": process.get("pid"),
        "ppid": process.get("ppid", 0),
        "pgid": process.get("pgid"),
        "sid": process.get("sid"),
        "state": process.get("state", "RUNNING"),
        "comm": _comm(process),
        "threads": [thread.get("tid") for thread in process.get("threads", [])],
    }


def _comm(process: dict[str, Any]) -> str:
    threads = process.get("threads") or [{}]
    return str(threads[0].get("comm", ""))


def _memory_json(memory: dict[str, Any]) -> dict[str, Any]:
    """An address space without its hundreds of VMAs; `--image mm/PID` has them."""
    vmas = memory.get("vmas", [])
    return {
        "nr_vmas": len(vmas),
        "bytes_mapped": sum(int(vma["end"], 16) - int(vma["start"], 16) for vma in vmas if "start" in vma),
        "size_bytes": memory.get("size_bytes", 0),
    }


def _text(details: Details) -> list[str]:
    point = details.point
    pages = f"{plural(point.pages_dirty, 'page')} read, {point.pages_new} new, {format_bytes(point.bytes_stored)} stored"
    lines = [
        f"point    {point.id}",
        f"parent   {point.parent or 'none: first of its chain'}",
        f"job      {point.job}, pid {point.pid}, {plural(point.nr_tasks, 'task')}",
        f"taken    {local(point.taken_at)}, frozen {format_us(point.frozen_us)} of {format_us(point.duration_us)}",
        f"memory   {format_bytes(point.bytes_logical)}; {pages}",
        f"tracker  {point.tracker}",
    ]
    if details.children:
        lines.append(f"children {' '.join(short(child) for child in details.children)}")
    if details.file_identities:
        size_bytes = sum(record.size_bytes for record in details.file_identities)
        needed = plural(len(details.file_identities), "file")
        lines.append(f"needs    {needed} outside the store, {format_bytes(size_bytes)} (--json names each)")
    lines += [f"warning  {text}" for text in point.warnings]
    rows = [
        (str(p["pid"]), str(p["ppid"]), str(p["sid"]), p["state"].lower(), str(len(p["threads"])), p["comm"])
        for p in map(_process_json, details.processes)
    ]
    lines += ["", *table(("PID", "PPID", "SID", "STATE", "THREADS", "COMMAND"), rows, right=(0, 1, 2, 4))]
    memory = [
        (name, str(facts["nr_vmas"]), format_bytes(facts["bytes_mapped"] or facts["size_bytes"]))
        for name, facts in ((name, _memory_json(mm)) for name, mm in details.memory.items())
    ]
    lines += ["", *table(("SPACE", "VMAS", "MAPPED"), memory, right=(1, 2))]
    return lines
