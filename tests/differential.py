"""A random program of system calls whose every result is written down: with and without takes in between, they must be the same.

    python -m tests.differential SEED STEPS LOG

Everything is made deterministic by the seed: no addresses, pids or times are written down, only results, errnos, data and digests. Left
out, because a take is known to show there: mremap(2) of a range of which a part was mapped after a take (EFAULT: registered and
new mappings do not merge).
"""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
import random
import select
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any


class Program:
    """One run. Each step is a method `do_...` that returns what is written down."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.signals = 0
        signal.signal(signal.SIGUSR1, self._caught)
        self.pipe = os.pipe2(os.O_NONBLOCK)
        self.blocking = os.pipe()
        self.one, self.two = socket.socketpair()
        self.one.setblocking(False)
        self.two.setblocking(False)
        self.event = os.eventfd(0, os.EFD_NONBLOCK)
        self.file = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the program runs
        self.maps: list[mmap.mmap] = []
        self.steps: list[Callable[[], Any]] = [
            getattr(self, name) for name in sorted(dir(self)) if name.startswith("do_")
        ]

    def _caught(self, *_: object) -> None:
        self.signals += 1

    def step(self) -> str:
        """Do one thing. Returns what it was and what came of it."""
        chosen = self.random.choice(self.steps)
        try:
            result = chosen()
        except OSError as error:
            result = errno.errorcode.get(error.errno or 0, "?")
        return f"{chosen.__name__} {result}"

    def data(self, most: int) -> bytes:
        return self.random.randbytes(self.random.randrange(1, most))

    def do_pipe_write(self) -> int:
        return os.write(self.pipe[1], self.data(30000))

    def do_pipe_read(self) -> str:
        return digest(os.read(self.pipe[0], self.random.randrange(1, 40000)))

    def do_blocking_read(self) -> str:
        """Of what a child writes a moment later."""
        data = self.data(200)
        child = os.fork()
        if not child:
            time.sleep(0.002)
            os.write(self.blocking[1], data)
            os._exit(0)
        got = os.read(self.blocking[0], 1000)
        return f"{digest(got)} {os.waitpid(child, 0)[1]}"

    def do_large_write(self) -> str:
        """More than a pipe holds: it blocks until a child has read, and is written whole."""
        data = self.random.randbytes(200_000)
        child = os.fork()
        if not child:
            left = len(data)
            while left:
                time.sleep(0.0005)
                left -= len(os.read(self.blocking[0], min(left, 30_000)))
            os._exit(0)
        return f"{os.write(self.blocking[1], data)} {os.waitpid(child, 0)[1]}"

    def do_socket_send(self) -> int:
        return self.one.send(self.data(5000))

    def do_socket_receive(self) -> str:
        return digest(self.two.recv(self.random.randrange(1, 9000)))

    def do_event(self) -> Any:
        return (
            os.eventfd_write(self.event, self.random.randrange(9))
            if self.random.random() < 0.5
            else os.eventfd_read(self.event)
        )

    def do_poll(self) -> list[int]:
        poll = select.poll()
        for fd in (self.pipe[0], self.pipe[1], self.event, self.two.fileno()):
            poll.register(fd)
        return [what for _, what in poll.poll(0)]

    def do_wait_in_vain(self) -> bool:
        """Whether a timeout was kept, neither early nor ended by anything."""
        began = time.monotonic()
        found = select.select([self.blocking[0]], [], [], 0.003)[0]
        return not found and time.monotonic() - began >= 0.003

    def do_file(self) -> str:
        os.lseek(self.file.fileno(), self.random.randrange(9000), os.SEEK_SET)
        os.write(self.file.fileno(), self.data(500))
        return (
            f"{os.lseek(self.file.fileno(), 0, os.SEEK_CUR)} {digest(os.pread(self.file.fileno(), 20000, 0))}"
        )

    def do_dup(self) -> int:
        fd = os.dup(self.pipe[0])
        os.close(fd)
        return fd

    def do_fork(self) -> int:
        code = self.random.randrange(200)
        child = os.fork()
        if not child:
            os._exit(code)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    def do_signal(self) -> int:
        os.kill(os.getpid(), signal.SIGUSR1)
        return self.signals

    def do_map(self) -> int:
        self.maps.append(
            mmap.mmap(
                -1, self.random.randrange(1, 40) * mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            )
        )
        return len(self.maps)

    def do_unmap(self) -> int:
        if self.maps:
            self.maps.pop(self.random.randrange(len(self.maps))).close()
        return len(self.maps)

    def do_touch(self) -> str:
        if not self.maps:
            return ""
        memory = self.random.choice(self.maps)
        at = self.random.randrange(len(memory))
        memory[at] = self.random.randrange(256)
        return digest(memory[:])

    def do_advise(self) -> str:
        if not self.maps:
            return ""
        memory = self.random.choice(self.maps)
        memory.madvise(mmap.MADV_DONTNEED, 0, mmap.PAGESIZE)
        return digest(memory[:])


def digest(data: bytes) -> str:
    """Short."""
    return f"{len(data)}:{hashlib.blake2b(data, digest_size=6).hexdigest()}"


def main() -> None:
    """Run the program and write its log."""
    program = Program(int(sys.argv[1]))
    with open(sys.argv[3], "w", encoding="ascii", buffering=1) as log:
        log.writelines(program.step() + "\n" for _ in range(int(sys.argv[2])))
        log.write("end\n")


if __name__ == "__main__":
    main()
