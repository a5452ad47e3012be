"""Images as hostile input: any bytes give a message or VerificationError, nothing else."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from images import files_pb2, mm_pb2, task_pb2
from images.codec import parse, serialise
from images.show import show
from snapshotter.base.errors import VerificationError

NAMES = ["manifest", "process/42", "mm/42", "shmem/1", "files", "fdtable/42"]


def samples() -> dict[str, bytes]:
    process = task_pb2.Process(pid=42, ppid=1, umask=0o22)
    process.threads.add(tid=42, comm=b"worker", regs=bytes(range(216)), xstate=bytes(600))
    process.shared_pending.add(siginfo=bytes(128))
    process.cwd.path = b"/tmp"
    mm = mm_pb2.Mm(auxv=bytes(64))
    for i in range(20):
        mm.vmas.add(start=0x1000 * i, end=0x1000 * (i + 1), prot=3, anon_name=b"heap")
    files = files_pb2.Files()
    files.pipes.add(id=1, data=b"left in the pipe")
    files.descriptions.add(id=1, pipe=files_pb2.Pipe(id=1, read_end=True))
    made = {"process/42": process, "mm/42": mm, "files": files}
    return {name: serialise(name, message) for name, message in made.items()}


SAMPLES = samples()


def parses_or_is_refused(name: str, data: bytes) -> None:
    try:
        message = parse(name, data)
    except VerificationError as error:
        assert name in str(error)
        return
    # What parses can be shown and written again.
    json.dumps(show(name, data))
    serialise(name, message)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(NAMES), st.binary(max_size=300))
def test_any_bytes(name, data):
    parses_or_is_refused(name, data)


@pytest.mark.parametrize("name", sorted(SAMPLES))
def test_every_truncation(name):
    data = SAMPLES[name]
    for size in range(len(data)):
        parses_or_is_refused(name, data[:size])


@settings(max_examples=500, deadline=None)
@given(st.sampled_from(sorted(SAMPLES)), st.data())
def test_changed_bytes(name, data):
    sample = bytearray(SAMPLES[name])
    for _ in range(data.draw(st.integers(1, 4))):
        sample[data.draw(st.integers(0, len(sample) - 1))] = data.draw(st.integers(0, 255))
    parses_or_is_refused(name, bytes(sample))


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=40))
def test_any_name(name):
    if name in NAMES:
        return
    try:
        parse(name, b"")
    except VerificationError:
        return
    raise AssertionError(f"an empty image {name!r} was parsed")
