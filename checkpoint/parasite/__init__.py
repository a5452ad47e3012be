"""Runs batches of system calls inside other processes, so that nothing can hurt them.

    with Parasite(pid) as p:                       # a running process: seized, infected, cured, let go
        print(p.call("getpid"))
        batch = p.batch()
        fds = batch.buffer(8)
        batch.call("pipe2", fds, 0o2000000)
        batch.call("close", fds.i32(0))
        batch.call("close", fds.i32(4))
        p.run(batch)

`infect` and `cure` do the same for tasks that are already stopped (a dump); StubTask and spawn_root_stub make and
drive the processes that a restore fills. No byte of a target's code is ever changed. At every instant a SIGKILL of
the tracer lets the target go on where it was (parasite_c/PROTOCOL.md explains how).
"""

from checkpoint.parasite.batch import Batch, Buffer, Ref, RemoteCallError, Results
from checkpoint.parasite.infection import cure, infect
from checkpoint.parasite.remote import LostTaskError, RemoteTask
from checkpoint.parasite.session import Parasite
from checkpoint.parasite.stub import StubTask, spawn_root_stub
from checkpoint.parasite.visits import visit

__all__ = [
    "Batch",
    "Buffer",
    "LostTaskError",
    "Parasite",
    "Ref",
    "RemoteCallError",
    "RemoteTask",
    "Results",
    "StubTask",
    "cure",
    "infect",
    "spawn_root_stub",
    "visit",
]
