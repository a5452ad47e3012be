"""images/codec.py, validate.py and show.py on messages made here."""

import dataclasses
import json

import pytest

from images import codec, files_pb2, manifest_pb2, mm_pb2, task_pb2
from images.codec import KINDS, kind_of, parse, parse_as, serialise
from images.show import show
from snapshotter.base.errors import UnsupportedError, VerificationError


def a_process(pid: int = 42) -> task_pb2.Process:
    process = task_pb2.Process(pid=pid, ppid=1, pgid=pid, sid=pid, umask=0o22, mm=f"mm/{pid}")
    process.threads.add(tid=pid, comm=b"worker", regs=bytes(216), sigmask=1 << 14)
    return process


def an_mm() -> mm_pb2.Mm:
    mm = mm_pb2.Mm()
    mm.vmas.add(start=0x1000, end=0x3000, kind=mm_pb2.Vma.ANON_PRIVATE)
    mm.vmas.add(start=0x3000, end=0x4000, kind=mm_pb2.Vma.FILE_PRIVATE, file=0)
    mm.files.add(path=b"/bin/true")
    return mm


def test_every_kind_goes_there_and_back():
    made = {
        "manifest": manifest_pb2.Manifest(root_pid=42, pids=[42, 43]),
        "process/42": a_process(),
        "mm/42": an_mm(),
        "shmem/1": mm_pb2.Shmem(size_bytes=8192),
        "files": files_pb2.Files(),
        "fdtable/42": files_pb2.FdTable(entries=[files_pb2.FdEntry(fd=0, description=1)]),
    }
    assert len(made) == len(KINDS)
    for name, message in made.items():
        data = serialise(name, message)
        again = parse(name, data)
        assert again == message
        assert serialise(name, again) == data
        assert json.loads(json.dumps(show(name, data)))["format_version"] == 1


@pytest.mark.parametrize(
    "name",
    [
        "",
        "Manifest",
        "process",
        "process/",
        "process/-1",
        "process/1/2",
        "mm/x",
        "mm/01",
        "files/1",
        "é",
        "mm/1\n",
    ],
)
def test_unknown_names_are_refused(name):
    with pytest.raises(VerificationError, match="unknown kind"):
        kind_of(name)


@pytest.mark.parametrize("version", [0, 3, 99, 2**32 - 1])
def test_other_versions_are_refused(version):
    process = a_process()
    process.format_version = version
    with pytest.raises(VerificationError, match="format version"):
        parse("process/42", process.SerializeToString())


def test_a_message_of_another_kind_is_not_written():
    with pytest.raises(VerificationError, match="holds a Process"):
        serialise("process/42", mm_pb2.Mm())


def test_parse_as_checks_the_type():
    data = serialise("process/42", a_process())
    assert parse_as("process/42", data, task_pb2.Process).pid == 42
    with pytest.raises(VerificationError, match="wanted a Mm"):
        parse_as("process/42", data, mm_pb2.Mm)


def test_size_is_checked_before_parsing():
    kind = kind_of("shmem/1")
    with pytest.raises(VerificationError, match="limit of a shmem image"):
        parse("shmem/1", bytes(kind.max_bytes + 1))


def test_more_state_than_an_image_may_hold_is_refused_and_no_damage(monkeypatch):
    message = mm_pb2.Shmem(size_bytes=4096)
    whole = len(serialise("shmem/1", message))
    kind = dataclasses.replace(kind_of("shmem/1"), max_bytes=whole - 1)
    monkeypatch.setattr(codec, "kind_of", lambda _: kind)
    with pytest.raises(UnsupportedError, match=f"has {whole} bytes, more than snap keeps"):
        serialise("shmem/1", message)


def change_vmas(**fields):
    def change(mm):
        for key, value in fields.items():
            setattr(mm.vmas[1], key, value)

    return change


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (change_vmas(start=0x2000), "overlaps"),
        (change_vmas(end=0x3000), "ends before"),
        (change_vmas(end=0x4001), "whole pages"),
        (change_vmas(end=1 << 60), "outside user memory"),
        (change_vmas(file=7), "of file 7 of 1"),
        (change_vmas(offset=5), "offset of 5"),
        (change_vmas(guard_pages=None), ""),
    ],
)
def test_bad_mappings_are_refused(change, what):
    mm = an_mm()
    if not what:
        mm.vmas[1].guard_pages.append(1)
    else:
        change(mm)
    mm.format_version = 1
    with pytest.raises(VerificationError, match=what or "guard pages"):
        parse("mm/42", mm.SerializeToString())


@pytest.mark.parametrize(
    ("field", "value", "what"),
    [
        ("pid", 0, "no pid"),
        ("pid", 43, "leader"),
        ("umask", 0o7777, "umask"),
        ("oom_score_adj", 2000, "oom_score_adj"),
    ],
)
def test_bad_processes_are_refused(field, value, what):
    process = a_process()
    setattr(process, field, value)
    process.format_version = 1
    with pytest.raises(VerificationError, match=what):
        parse("process/42", process.SerializeToString())


def test_an_image_under_another_process_name_is_refused():
    data = serialise("process/42", a_process())
    with pytest.raises(VerificationError, match="it is of process 42"):
        parse("process/43", data)


def test_bad_registers_and_siginfo_are_refused():
    process = a_process()
    process.threads[0].regs = bytes(100)
    with pytest.raises(VerificationError, match="100 bytes of registers"):
        serialise("process/42", process)
    process = a_process()
    process.shared_pending.add(siginfo=b"x")
    with pytest.raises(VerificationError, match="siginfo"):
        serialise("process/42", process)


def test_files_refer_only_to_what_is_there():
    files = files_pb2.Files()
    files.descriptions.add(id=1, pipe=files_pb2.Pipe(id=3, read_end=True))
    with pytest.raises(VerificationError, match="unknown pipe"):
        serialise("files", files)
    files.pipes.add(id=3)
    serialise("files", files)
    files.descriptions.add(id=1)
    with pytest.raises(VerificationError, match="listed twice"):
        serialise("files", files)


def test_show_is_readable():
    process = a_process()
    process.threads[0].xstate = bytes(2696)
    shown = show("process/42", serialise("process/42", process))
    assert shown["threads"][0]["comm"] == "worker"
    assert shown["threads"][0]["sigmask"] == "0x4000"
    assert shown["umask"] == "0o22"
    assert shown["threads"][0]["xstate"].endswith("(2696 bytes)")
    assert show("mm/42", serialise("mm/42", an_mm()))["vmas"][1]["kind"] == "FILE_PRIVATE"


@pytest.mark.parametrize("kind", ["unix", "inet"])
@pytest.mark.parametrize("field", ["uid", "gid"])
def test_a_socket_that_belongs_to_no_id_is_refused(kind, field):
    files = files_pb2.Files()
    owner = getattr(files.descriptions.add(id=1), kind).owner
    owner.uid = owner.gid = 0
    parse("files", serialise("files", files))
    setattr(owner, field, 0xFFFFFFFF)
    with pytest.raises(VerificationError, match="user or group -1"):
        parse("files", serialise("files", files))
