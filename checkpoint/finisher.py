"""Steps that take a system call per process, for all processes of a job or for none, even if snap is killed in between.

Owns the other end of parasite_c/finisher.c, a process that sends the signal to all of them when snap ends before it has said
that the step is done. What remains is whatever kills both in the same instant (the whole machine, or a cgroup).
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
from collections.abc import Container, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from checkpoint import beside
from checkpoint.kernel import sys as ksys
from snapshotter.base import faults
from snapshotter.base.errors import SnapshotterError

BINARY = Path(__file__).resolve().parents[1] / "parasite_c" / "finisher.bin"
_ANSWER_S = 10.0


class Finisher:
    """The process, for as long as the context lasts.

    Args:
        avoid: pids that it must not have: those of a job that is not there yet.

    Raises:
        SnapshotterError: it cannot be started; nothing has happened.
    """

    def __init__(self, avoid: Container[int] = ()) -> None:
        ksys.allow_descriptors()  # it takes one per process
        self._socket, other_end = socket.socketpair()
        self._socket.settimeout(_ANSWER_S)
        try:
            self._process = beside.start(BINARY, [], other_end, avoid=avoid)
        except SnapshotterError:
            self._socket.close()
            raise
        finally:
            other_end.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End it. A step that was begun and not ended is finished by it first."""
        self._socket.close()
        self._process.wait()

    @contextlib.contextmanager
    def sure(self, pids: Sequence[int], signo: int = signal.SIGKILL) -> Iterator[None]:
        """While the context lasts all of them get the signal if we end; if it raises, when the finisher is closed.

        Args:
            pids: of processes that are held, so that their pids are theirs; zombies may be among them.
            signo: the signal.

        Raises:
            SnapshotterError: the finisher does not answer; nothing has begun.
        """
        if not self._tell(signo, pids):
            raise SnapshotterError("the finisher has ended", hint="was it killed? Run the command again")
        yield
        self._tell(0, ())  # one that has ended meanwhile finishes nothing: as it should be

    def _tell(self, signo: int, pids: Sequence[int]) -> bool:
        """False: it has ended."""
        try:
            self._socket.sendall(struct.pack(f"=II{len(pids)}I", signo, len(pids), *pids))
            return self._socket.recv(1) == b"k"
        except ConnectionError:
            return False
        except OSError as error:
            raise SnapshotterError(f"the finisher does not answer: {error}") from error


def signal_all(finisher: Finisher, pids: Sequence[int], signo: int) -> None:
    """Send a signal to all processes of a job that is held, or to none.

    If snap dies in between, those that are left must not go on with what they see of the others' end: for
    SIGKILL all of them are told to stop first.
    """
    with finisher.sure(pids, signo):
        for step in dict.fromkeys((signal.SIGSTOP, signo)):
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, step)
                faults.point("finish.signalled")
