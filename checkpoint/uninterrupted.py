"""Short stretches that a signal must not cut in two: letting a job go, killing one.

Owns holding Ctrl-C, SIGTERM and SIGHUP back, and Ctrl-Z while a job stands still. SIGKILL and SIGSTOP cannot be: what they leave
is each caller's to think of.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterable, Iterator

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_STOPPING = (signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU)


@contextlib.contextmanager
def signals_wait() -> Iterator[None]:
    """Those that come meanwhile arrive at the end.

    Blocking is not enough: another thread would take them, and Python runs their handlers in the main thread at its
    next instruction.
    """
    with _taken_later(_ENDING):
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
        try:
            yield
        finally:
            # Those that were blocked arrive now, while they are still noted.
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@contextlib.contextmanager
def stops_wait() -> Iterator[None]:
    """Ctrl-Z stops snap at the end: a snap that is stopped thaws nobody. Not blocked, so that no child inherits that."""
    with _taken_later(_STOPPING):
        yield


@contextlib.contextmanager
def _taken_later(signals: Iterable[int]) -> Iterator[None]:
    """Those that come meanwhile are noted, and raised again at the end. Only the main thread can see to it."""
    came: list[int] = []
    before = {}
    if threading.current_thread() is threading.main_thread():
        for signo in signals:
            if signal.getsignal(signo) is not None:  # None: somebody's C code has it
                before[signo] = signal.signal(signo, lambda number, _: came.append(number))
    try:
        yield
    finally:
        for signo, handler in before.items():
            signal.signal(signo, handler)
        for number in came:
            signal.raise_signal(number)
