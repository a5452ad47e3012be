"""Short stretches that a signal must not cut in two: letting a job go, killing one.

Owns holding Ctrl-C, SIGTERM and SIGHUP back. SIGKILL cannot be: what it leaves is each caller's to think of.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def signals_wait() -> Iterator[None]:
    """Those that come meanwhile arrive at the end.

    Blocking is not enough: another thread would take them, and Python runs their handlers in the main thread at its
    next instruction.
    """
    came: list[int] = []
    before = {}
    if threading.current_thread() is threading.main_thread():
        for signo in _ENDING:
            if signal.getsignal(signo) is not None:  # None: somebody's C code has it
                before[signo] = signal.signal(signo, lambda number, _: came.append(number))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
    try:
        yield
    finally:
        # Those that were blocked arrive now, while `came` still takes them.
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for signo, handler in before.items():
            signal.signal(signo, handler)
        for number in came:
            signal.raise_signal(number)
