"""What stands around a job that is going to be killed and built again: one value per thing, with the option that allows it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Obstacle:
    """One reason not to kill a living job for a rollback."""

    code: str
    """Names the kind: `terminal_leader`, `parent_stopped` ... (checkpoint/DESIGN.md, "Before a living job is killed")."""
    pid: int
    """The process of the job that it concerns."""
    what: str
    """What happens when the process is killed, and why."""
    hint: str
    option: str = ""
    """The option that allows it, without its dashes; "": none does, something must be changed first."""

    def as_dict(self) -> dict[str, object]:
        """For --json."""
        return {
            "code": self.code,
            "pid": self.pid,
            "what": self.what,
            "hint": self.hint,
            "option": f"--{self.option}" if self.option else None,
        }

    def __str__(self) -> str:
        return f"task {self.pid}: {self.what}"
