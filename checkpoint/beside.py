"""Starting the small programs that run beside snap (finisher, watchdog)."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Container, Sequence
from pathlib import Path

from snapshotter.base.errors import SnapshotterError


def start(
    binary: Path,
    arguments: Sequence[str],
    stdin: socket.socket,
    *,
    avoid: Container[int] = (),
    pass_fds: Sequence[int] = (),
    says: bool = False,
) -> subprocess.Popen[bytes]:
    """Start a program of parasite_c/ in a session of its own.

    Args:
        binary: the program.
        arguments: its arguments.
        stdin: its standard input.
        avoid: pids that it must not have: those of a job that is not there yet.
        pass_fds: descriptors that it gets under their numbers.
        says: whether it has our standard error.

    Raises:
        SnapshotterError: it cannot be started.
    """
    unlucky: list[subprocess.Popen[bytes]] = []

    def once() -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [str(binary), *arguments],
            stdin=stdin.fileno(),
            stdout=subprocess.DEVNULL,
            stderr=None if says else subprocess.DEVNULL,
            pass_fds=pass_fds,
            start_new_session=True,  # neither the terminal's signals nor a kill of our group reach it
            cwd="/",
            env={},
        )

    try:
        process = once()
        while process.pid in avoid:
            unlucky.append(process)  # keeps its pid until another is found
            process = once()
    except OSError as error:
        raise SnapshotterError(
            f"cannot start the {binary.stem}: {error}", where=str(binary), hint="run `make build`"
        ) from error
    finally:
        for one in unlucky:
            one.kill()
            one.wait()
    return process
