"""No job stands still for longer than a limit, whatever happens to snap.

Owns the limit (`--max-frozen`), its two ends and the note of what snap is doing. Whoever holds tasks of a job does so inside
`held()`. When the limit is reached:

1. An alarm (SIGALRM) raises FrozenTooLongError in the main thread, and the job is let go on the way out, as after Ctrl-C.
2. If the job still is held half a second later, another process kills snap (parasite_c/watchdog.c), and the kernel lets
   every task go. That is for a snap that cannot run: it is stopped, starved, or waits in the kernel for something that does not come.

Neither can help where the thread that traces cannot even die: in an uninterruptible wait for a disk or a file server. So that
thread asks no file server anything while it holds tasks; another process does (kernel/distant.py).
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Container, Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

from checkpoint import beside
from snapshotter.base.errors import SnapshotterError

BINARY = Path(__file__).resolve().parents[1] / "parasite_c" / "watchdog.bin"
DEFAULT_S = 5.0
GRACE_S = 0.5
"""How much later than the limit snap is killed."""
_NOTE_BYTES = 512
_NEVER_S = 3600.0


class FrozenTooLongError(SnapshotterError):
    """The job stood still for as long as it may, and was let go."""

    code = "frozen_too_long"


class Watchdog:
    """The process, for as long as the context lasts; meanwhile `held` knows it.

    Args:
        limit_s: how long a job may stand still; 0: as long as it takes, nobody watches.
        avoid: pids that it must not have: those of a job that is not there yet.

    Raises:
        SnapshotterError: it cannot be started; nothing has happened.
    """

    def __init__(self, limit_s: float, avoid: Container[int] = ()) -> None:
        self.limit_s = limit_s
        self.silent = True
        """Whether the alarm would do harm now."""
        self._until = 0.0
        self._holding = False
        self._process: subprocess.Popen[bytes] | None = None
        if limit_s <= 0:
            return
        self._note = os.memfd_create("snap-note", os.MFD_CLOEXEC)
        self._socket, other_end = socket.socketpair()
        pidfd = os.pidfd_open(os.getpid())
        try:
            self._process = beside.start(
                BINARY,
                [str(pidfd), str(self._note)],
                other_end,
                avoid=avoid,
                pass_fds=(pidfd, self._note),
                says=True,
            )
        except SnapshotterError:
            self._socket.close()
            os.close(self._note)
            raise
        finally:
            os.close(pidfd)
            other_end.close()

    def __enter__(self) -> Self:
        _watching.append(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _watching.remove(self)
        if self._process is not None:
            self._socket.close()
            self._process.wait()
            os.close(self._note)

    @property
    def left_s(self) -> float:
        """How long the job may still stand; much when none does."""
        return self._until - time.monotonic() if self._holding else _NEVER_S

    def note(self, text: str) -> None:
        """Write down what is being done, for whoever has to say why the job was let go."""
        if self._process is not None:
            os.pwrite(self._note, text.encode(errors="replace")[: _NOTE_BYTES - 1] + b"\0", 0)

    def error(self) -> FrozenTooLongError:
        """What to raise at the limit."""
        doing = os.pread(self._note, _NOTE_BYTES, 0).partition(b"\0")[0].decode(errors="replace")
        return FrozenTooLongError(
            f"the job stood still for {self.limit_s:g} s, so it was let go and goes on"
            + (f"; snap was {doing}" if doing else ""),
            hint="try again, or allow more with --max-frozen SECONDS",
        )

    def begin(self) -> bool:
        """A job is held from now on. False: it is already, or nobody watches."""
        if self._process is None or self._holding:
            return False
        self.note("")
        self.tell(self.limit_s + GRACE_S)
        self._until = time.monotonic() + self.limit_s
        self._holding, self.silent = True, False
        return True

    def end(self) -> None:
        """It is not any more, or need not be let go again."""
        self._holding, self.silent = False, True
        self.tell(0)

    def tell(self, seconds: float) -> None:
        """Have snap killed in so many seconds; 0: not at all."""
        milliseconds = min(int(seconds * 1000), 0xFFFFFFFF)
        try:
            self._socket.sendall(struct.pack("=I", milliseconds))
        except OSError as error:
            if seconds:
                raise SnapshotterError(
                    "the watchdog has ended, so the job is not touched",
                    hint="was it killed? Run the command again",
                ) from error


_watching: list[Watchdog] = []
"""That of this process, as signal handlers are: there is one alarm, and one snap to kill."""


def note(text: str) -> None:
    """See Watchdog.note; does nothing where nobody watches."""
    for one in _watching:
        one.note(text)


def left_s() -> float:
    """How long the job may still stand still; an hour when it does not."""
    return min((one.left_s for one in _watching), default=_NEVER_S)


def lifted() -> None:
    """The limit ends here although tasks are held: they are about to be killed or stopped, and nobody waits for them."""
    for one in _watching:
        one.end()


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Tasks of a job are held, or about to be, for as long as the context lasts, and let go at its end; the outermost counts.

    Raises:
        FrozenTooLongError: at the limit, from whatever the main thread does then; not after `letting_go`.
        SnapshotterError: nobody watches any more.
    """
    one = _watching[-1] if _watching else None
    if one is None or not one.begin():
        yield
        return
    try:
        with _alarm(one):
            yield
    finally:
        one.end()


def letting_go() -> None:
    """From here on the alarm is silent: what is raised while tasks are let go would keep some of them. The other process is not."""
    for one in _watching:
        one.silent = True


@contextlib.contextmanager
def _alarm(one: Watchdog) -> Iterator[None]:
    """Only the main thread can have it; any other is left to the process that watches."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(signo: int, frame: FrameType | None) -> None:
        if not one.silent:
            raise one.error()

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(one.left_s, 0.001))
    try:
        yield
    finally:
        one.silent = True
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
