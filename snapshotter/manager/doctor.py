"""What this machine, this user and this store are fit for: `snap doctor`."""

from __future__ import annotations

import errno
import os
import platform
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from snapshotter.base.errors import NoStoreError, OutdatedStoreError, SnapshotterError
from snapshotter.base.units import plural
from snapshotter.manager.session import Session


@dataclass(frozen=True, slots=True)
class Note:
    """One line of the report; `level` is ok, warning or problem."""

    subject: str
    level: str
    text: str
    hint: str = ""

    def as_dict(self) -> dict[str, str]:
        """For --json."""
        return {"subject": self.subject, "level": self.level, "text": self.text, "hint": self.hint}


@dataclass(frozen=True, slots=True)
class DoctorReport:
    """Everything found out."""

    kernel: str
    features: tuple[Mapping[str, object], ...]
    notes: tuple[Note, ...]
    store: Mapping[str, object]

    @property
    def ok(self) -> bool:
        """Whether jobs can be taken here (warnings are fine)."""
        return all(note.level != "problem" for note in self.notes)


def doctor(session: Session) -> DoctorReport:
    """Probe the kernel, the permissions and the store; changes nothing, not even an old schema."""
    features = tuple(session.engine.features())
    store, store_notes = _store(session)
    keepers = _keepers(session.engine.keepers())
    notes = (_machine(), *_permissions(), _tracker(features), keepers, *_needed(features), *store_notes)
    return DoctorReport(kernel=platform.release(), features=features, notes=notes, store=store)


def _machine() -> Note:
    machine = platform.machine()
    if machine == "x86_64":
        return Note("machine", "ok", machine)
    return Note("machine", "problem", f"{machine} is not supported", "x86_64 is")


def _permissions() -> list[Note]:
    notes = []
    caps = effective_capabilities(Path("/proc/self/status").read_bytes())
    wanted = {"CAP_SYS_PTRACE": 19, "CAP_SYS_ADMIN": 21, "CAP_SYS_RESOURCE": 24, "CAP_CHECKPOINT_RESTORE": 40}
    missing = [name for name, bit in wanted.items() if not caps >> bit & 1]
    if missing:
        hint = (
            "run as root to take any job and to restore under the same pids"
            if os.geteuid()
            else "root is denied it here, as in a container; what needs it is refused or named in a warning"
        )
        notes.append(Note("permissions", "warning", f"without {', '.join(missing)}", hint))
    else:
        notes.append(Note("permissions", "ok", "all capabilities that taking and rolling back need"))
    try:
        scope = int(Path("/proc/sys/kernel/yama/ptrace_scope").read_text())
    except (OSError, ValueError):
        scope = 0
    if scope >= 3 or (scope and missing):
        notes.append(
            Note(
                "yama",
                "problem",
                f"kernel.yama.ptrace_scope={scope} forbids tracing",
                "set it to 0 or run as root",
            )
        )
    return notes


def effective_capabilities(status: bytes) -> int:
    """CapEff of a /proc/PID/status."""
    for line in status.splitlines():
        if line.startswith(b"CapEff:"):
            return int(line.split()[1], 16)
    return 0


def _keepers(roots: Sequence[int]) -> Note:
    """What stays running between two takes, so that nobody wonders at it."""
    what = "a keeper is a small process beside a job that was taken: it holds what the kernel knows of written pages, and ends with the job"
    if not roots:
        return Note("keepers", "ok", f"none runs; {what}")
    jobs = ", ".join(map(str, roots[:8])) + (" ..." if len(roots) > 8 else "")
    return Note("keepers", "ok", f"{plural(len(roots), 'keeper')} beside {jobs}; {what}")


def _names(features: tuple[Mapping[str, object], ...]) -> dict[str, bool]:
    return {str(item["name"]): bool(item["ok"]) for item in features}


def _tracker(features: tuple[Mapping[str, object], ...]) -> Note:
    names = _names(features)
    if names.get("wp_async") and names.get("pagemap_scan"):
        return Note(
            "tracker",
            "ok",
            "write_protect: mremap(2) of a range that a job mapped partly before and partly after a take fails with EFAULT",
            "take such a job with --tracker compare",
        )
    if names.get("soft_dirty"):
        return Note("tracker", "ok", "soft_dirty")
    return Note(
        "tracker",
        "warning",
        "compare: every take reads all memory",
        "Linux 6.7 or newer tracks written pages",
    )


def _needed(features: tuple[Mapping[str, object], ...]) -> list[Note]:
    names = _names(features)
    uses = {
        "clone3_set_tid": "restoring under the same pids",
        "kcmp": "finding shared descriptors",
        "pidfd_getfd": "handing descriptors over",
        "map_files": "reading deleted mapped files",
        "set_mm_map": "restoring /proc/PID/exe and cmdline",
    }
    forbidden = {str(item["name"]) for item in features if item.get("errno") in {errno.EPERM, errno.EACCES}}
    return [
        Note(name, "problem", f"this user may not do it: no {use}", "run as root")
        if name in forbidden
        else Note(
            name,
            "problem",
            f"this kernel cannot do it: no {use}",
            "use a newer kernel, or see its configuration",
        )
        for name, use in uses.items()
        if not names.get(name)
    ]


def _store(session: Session) -> tuple[dict[str, object], list[Note]]:
    path = session.store_path
    facts: dict[str, object] = {"path": str(path), "from": session.config.store_from, "exists": path.exists()}
    if not path.exists():
        return facts, [Note("store", "ok", f"{path} is made by the first take")]
    notes = []
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        notes.append(
            Note(
                "store",
                "warning",
                f"{path} has mode {mode:04o}: others may read the jobs' memory",
                f"chmod 700 {path}",
            )
        )
    space = os.statvfs(path)
    facts["bytes_free"] = space.f_bavail * space.f_frsize
    if space.f_bavail * space.f_frsize < 1 << 28:
        notes.append(Note("store", "warning", "less than 256 MiB free", "snap forget, snap prune"))
    try:
        stats = session.store_as_it_is().stats()
    except OutdatedStoreError as error:
        return facts, [*notes, Note("store", "ok", error.what, error.hint)]
    except NoStoreError as error:
        return facts, [*notes, Note("store", "problem", str(error))]
    except SnapshotterError as error:
        return facts, [*notes, Note("store", "problem", error.what, error.hint)]
    for name in ("nr_points", "nr_jobs", "nr_packs", "nr_pages", "bytes_logical", "bytes_on_disk"):
        facts[name] = getattr(stats, name)
    notes.append(Note("store", "ok", f"{stats.nr_points} points of {stats.nr_jobs} jobs in {path}"))
    return facts, notes
