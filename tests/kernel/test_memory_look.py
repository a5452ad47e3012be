"""The memory resource against living processes: what it reads, plans and refuses. Nothing is stopped or injected."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest

from checkpoint.context import DumpContext, DumpOptions
from checkpoint.kernel import pagemap as pagemap_module
from checkpoint.kernel.pagemap import PageMap
from checkpoint.model import pageplan
from checkpoint.model import vma as model
from checkpoint.resources import memory
from checkpoint.resources.memory import identity, shmem, vdso
from checkpoint.restore_context import RestoreContext, RestoreOptions
from images import codec, manifest_pb2, mm_pb2
from snapshotter.base.errors import RestoreConflictError, UnsupportedError
from snapshotter.base.pages import PAGE_SIZE

pytestmark = pytest.mark.requires("root")
libc = ctypes.CDLL(None, use_errno=True)


class Sink:
    def __init__(self):
        self.spaces: dict[str, dict[int, bytes]] = {}
        self.final: dict[str, set[int]] = {}

    def expect(self, nr_pages):
        pass

    def put(self, space, runs, reader):
        buffer = bytearray(sum(run[1] for run in runs) * PAGE_SIZE)
        reader.read_into(runs, memoryview(buffer))
        numbers = [first + i for first, nr in runs for i in range(nr)]
        self.spaces.setdefault(space, {}).update(
            {
                number: bytes(buffer[at * PAGE_SIZE : (at + 1) * PAGE_SIZE])
                for at, number in enumerate(numbers)
            }
        )

    def drain(self):
        pass

    def close_space(self, space, present):
        self.final[space] = {first + i for first, nr in present for i in range(nr)}

    def runs(self, space):
        return pageplan.to_list(pageplan.from_list([(n, 1) for n in sorted(self.final.get(space, ()))]))

    def fill(self, space, write, only=None):
        wanted = only and {first + i for first, nr in only for i in range(nr)}
        pages = {
            n: d for n, d in self.spaces.get(space, {}).items() if any(d) and (only is None or n in wanted)
        }
        for number, data in pages.items():
            write([(number, 1)], memoryview(data))
        return len(pages)


@pytest.fixture
def ctx():
    found = DumpContext(root_pid=os.getpid(), sink=Sink(), parent=None, options=DumpOptions())
    yield found
    shmem.registry(found).close()


def area(nr_pages, flags=mmap.MAP_PRIVATE):
    found = mmap.mmap(-1, nr_pages * PAGE_SIZE, flags | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        found.madvise(mmap.MADV_NOHUGEPAGE)
    return found, ctypes.addressof(ctypes.c_char.from_buffer(found)) // PAGE_SIZE


@pytest.mark.parametrize("how", ["scan", "entries", "hidden frames"])
def test_content_is_what_was_written(monkeypatch, how):
    if how != "scan":
        monkeypatch.setattr(pagemap_module._Support, "scan", False)
    if how == "hidden frames":
        monkeypatch.setattr(pagemap_module, "_zero_frames", tuple)
    found, first = area(4096)
    numpy_view = np.frombuffer(found, dtype="u1")
    wanted = [*range(0, 100, 7), *range(1000, 1100), 4095]
    for page in wanted:
        numpy_view[page * PAGE_SIZE] = 1
    numpy_view[2000 * PAGE_SIZE :: PAGE_SIZE][:50].sum()  # zero pages
    with PageMap(os.getpid()) as pagemap:
        content = pagemap.content(np.asarray([[first, first + 4096]], dtype=np.int64))
    pages = {page - first for a, b in content.present.tolist() for page in range(a, b)}
    doubtful = {page - first for a, b in content.doubtful.tolist() for page in range(a, b)}
    assert doubtful == (set(range(2000, 2050)) if how == "hidden frames" else set())
    assert pages == set(wanted) | doubtful


@pytest.mark.parametrize("change", ["nothing", "touched", "dropped"])
def test_content_is_looked_at_again_only_when_something_came_or_went(change):
    found, first = area(64)
    found[: 32 * PAGE_SIZE] = b"x" * (32 * PAGE_SIZE)
    table = np.asarray([[first, first + 64]], dtype=np.int64)
    with PageMap(os.getpid()) as pagemap:
        before = pagemap.content(table)
        found[PAGE_SIZE] = 1  # its content is no matter
        if change == "touched":
            found[40 * PAGE_SIZE] = 1
        elif change == "dropped":
            found.madvise(mmap.MADV_DONTNEED, 3 * PAGE_SIZE, PAGE_SIZE)
        after = pagemap.content(table, before=before)
    wanted = set(range(32)) | {40} if change == "touched" else set(range(32))
    wanted -= {3} if change == "dropped" else set()
    assert {page - first for a, b in after.present.tolist() for page in range(a, b)} == wanted
    if change != "nothing":
        assert after is not before


def test_guard_pages_are_no_content():
    found, first = area(64)
    found[:] = b"x" * len(found)
    if libc.madvise(ctypes.c_void_p((first + 8) * PAGE_SIZE), 3 * PAGE_SIZE, 102) != 0:
        pytest.skip("this kernel has no guard pages (MADV_GUARD_INSTALL)")
    with PageMap(os.getpid()) as pagemap:
        content = pagemap.content(np.asarray([[first, first + 64]], dtype=np.int64))
    assert content.guard.tolist() == [[first + 8, first + 11]]
    assert pageplan.count(content.present) == 61


def test_space_of_a_running_python(ctx):
    child = subprocess.Popen([sys.executable, "-c", "print(1, flush=True); input()"], stdin=-1, stdout=-1)
    try:
        child.stdout.readline()
        space = memory.address_space(ctx, child.pid)
        plan = memory.page_plan(ctx, space)
        kinds = {vma.kind for vma in space.vmas}
        assert {model.ANON_PRIVATE, model.FILE_PRIVATE, model.VDSO} <= kinds
        assert plan.nr_present == plan.nr_to_read > 100
        exe = os.path.realpath(sys.executable).encode()
        assert exe in {file.path for file in space.files}
        libc_file = next(file for file in space.files if b"libc.so" in file.path)
        assert len(libc_file.build_id) == 20
        os.close(identity.open_same(libc_file, "is mapped and"))
        report = []
        memory.look(child.pid, report)
        assert report == []
        mm = mm_pb2.Mm(vmas=space.vmas)
        mm.files.extend(space.files)
        codec.parse("mm/1", codec.serialise("mm/1", memory_image(mm)))
        base = vdso.base_address(mm)
        assert base
        address = memory.arena_hole([mm], 1 << 20)
        assert all(vma.end <= address or vma.start >= address + (1 << 20) for vma in space.vmas)
    finally:
        child.stdin.close()
        child.wait()


def memory_image(mm):
    mm.format_version = 1
    mm.exe.path = b"/bin/true"
    mm.exe.mode = 0o100755
    return mm


def in_child(prepare):
    """A forked child that called `prepare` and sleeps; returns its pid."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            kept = prepare()
            os.write(write, b"k")
            signal.pause()
            del kept
        finally:
            os._exit(1)
    os.close(write)
    assert os.read(read, 1) == b"k"
    os.close(read)
    return pid


@pytest.fixture
def children():
    pids = []
    yield pids
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


CHANGER = """
import mmap, os, pathlib, sys
path = pathlib.Path(sys.argv[1])
def over(name):
    with open(name, "r+b") as file:
        return mmap.mmap(file.fileno(), 16384, mmap.MAP_PRIVATE, mmap.PROT_READ)
pages, kept = mmap.mmap(-1, 8 * 4096, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), over(path)
print("ready", flush=True)
change = sys.stdin.readline().strip()
if change == "mapped": more = over(path.with_name("other"))
elif change == "unmapped": kept.close()
elif change == "advised": pages.madvise(mmap.MADV_DONTFORK, 0, 4096)
elif change == "written": path.write_bytes(b"y" * 20000)
elif change == "renamed": os.replace(path.with_name("other"), path)
elif change == "deleted": path.unlink()
print("done", flush=True)
sys.stdin.readline()
"""


@pytest.mark.parametrize(
    "change", ["nothing", "mapped", "unmapped", "advised", "written", "renamed", "deleted"]
)
def test_a_space_that_is_brought_up_to_date_is_the_one_that_is_read_anew(ctx, tmp_path, change):
    for name in ("file", "other"):
        (tmp_path / name).write_bytes(b"x" * 16384)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", CHANGER, str(tmp_path / "file")], **pipes) as child:
        assert child.stdout.readline() == "ready\n"
        before = memory.address_space(ctx, child.pid, frozen=False).prepare()
        child.stdin.write(f"{change}\n")
        child.stdin.flush()
        assert child.stdout.readline() == "done\n"
        backings: memory.Backings = {}
        found = memory.address_space(ctx, child.pid, before=before, backings=backings)
        wanted = memory.address_space(ctx, child.pid)
        child.stdin.close()
    assert (found is before) == (change in {"nothing", "written"})
    assert found.vmas == wanted.vmas
    assert found.files == wanted.files
    assert found.mappings == wanted.mappings
    assert found.text == wanted.text
    assert (found.private == wanted.private).all()
    assert {key: b.stat.st_mtime_ns for key, b in found.backings.items()} == {
        key: b.stat.st_mtime_ns for key, b in wanted.backings.items()
    }


def test_a_mount_over_a_mapped_file_is_seen_when_a_space_is_brought_up_to_date(ctx, tmp_path):
    """The lines of maps stay the same, and so does the file; only its path leads elsewhere."""
    mapped, other = tmp_path / "file", tmp_path / "other"
    for path in (mapped, other):
        path.write_bytes(b"x" * 16384)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", CHANGER, str(mapped)], **pipes) as child:
        assert child.stdout.readline() == "ready\n"
        before = memory.address_space(ctx, child.pid, frozen=False).prepare()
        lines = pathlib.Path(f"/proc/{child.pid}/maps").read_bytes()
        subprocess.run(["mount", "--bind", other, mapped], check=True)
        try:
            assert pathlib.Path(f"/proc/{child.pid}/maps").read_bytes() == lines
            found = _outcome(lambda: memory.address_space(ctx, child.pid, before=before, backings={}))
            wanted = _outcome(lambda: memory.address_space(ctx, child.pid))
        finally:
            subprocess.run(["umount", mapped], check=True)
        child.stdin.close()
    assert found == wanted
    assert found != _outcome(lambda: before)


def _outcome(read):
    """The files of a space, or why it cannot be read."""
    try:
        space = read()
    except UnsupportedError as error:
        return str(error)
    return [file.SerializeToString() for file in space.files]


def test_a_ring_of_io_uring_without_a_descriptor_is_refused_by_name(children):
    def prepare():
        params = ctypes.create_string_buffer(120)
        fd = libc.syscall(425, 4, params)
        assert fd >= 0
        size, protection = ctypes.c_size_t(4096), mmap.PROT_READ | mmap.PROT_WRITE
        assert libc.mmap(None, size, protection, mmap.MAP_SHARED, fd, ctypes.c_long(0)) != -1
        os.close(fd)

    read = ctypes.create_string_buffer(120)
    fd = libc.syscall(425, 4, read)
    if fd < 0:
        pytest.skip("no io_uring here")
    os.close(fd)
    children.append(in_child(prepare))
    report = []
    memory.look(children[0], report)
    assert any("io_uring" in finding.what for finding in report)


def test_aio_is_refused_by_name(children):
    def prepare():
        context = ctypes.c_ulong(0)
        assert libc.syscall(206, 8, ctypes.byref(context)) == 0
        return context

    children.append(in_child(prepare))
    report = []
    memory.look(children[0], report)
    assert any("asynchronous" in finding.what for finding in report)


def test_shared_memory_object_goes_round(ctx, tmp_path):
    """Registered once for two mappings and a descriptor; rebuilt with holes, size, seals, mode."""
    fd = os.memfd_create("thing", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 100 * PAGE_SIZE + 17)
    os.pwrite(fd, b"A" * 5000, 10 * PAGE_SIZE)
    os.pwrite(fd, b"end", 100 * PAGE_SIZE + 14)
    os.fchmod(fd, 0o640)
    import fcntl

    fcntl.fcntl(fd, 1033, 0x2 | 0x4)
    name = shmem.for_fd(ctx, os.getpid(), fd, os.fstat(fd))
    assert shmem.for_fd(ctx, os.getpid(), os.dup(fd), os.fstat(fd)) == name
    assert shmem.put_all(ctx) == 3
    shmem.close_all(ctx)
    images = {name: codec.serialise(name, ctx.images[name])}
    back = RestoreContext(
        load=images.__getitem__,
        source=ctx.sink,
        options=RestoreOptions(),
        manifest=manifest_pb2.Manifest(),
        processes={},
    )
    rebuilt = shmem.open_shared(back, name)
    assert shmem.open_shared(back, name) == rebuilt
    assert os.fstat(rebuilt).st_size == 100 * PAGE_SIZE + 17
    assert os.fstat(rebuilt).st_mode & 0o777 == 0o640
    assert os.pread(rebuilt, 1 << 20, 0) == os.pread(fd, 1 << 20, 0)
    assert os.fstat(rebuilt).st_blocks == os.fstat(fd).st_blocks
    assert fcntl.fcntl(rebuilt, 1034) == 0x2 | 0x4
    assert os.readlink(f"/proc/self/fd/{rebuilt}") == "/memfd:thing (deleted)"
    shmem.seal_late(back)
    shmem.release(back)
    os.close(fd)


def test_shared_anonymous_memory_looks_the_same(ctx):
    found, first = area(10, mmap.MAP_SHARED)
    found[5 * PAGE_SIZE : 5 * PAGE_SIZE + 5] = b"hello"
    space = memory.address_space(ctx, os.getpid())
    vma = next(vma for vma in space.vmas if vma.start == first * PAGE_SIZE)
    assert vma.kind == model.ANON_SHARED
    shmem.put_all(ctx)
    shmem.close_all(ctx)
    name = vma.shmem
    images = {name: codec.serialise(name, ctx.images[name])}
    back = RestoreContext(
        load=images.__getitem__,
        source=ctx.sink,
        options=RestoreOptions(),
        manifest=manifest_pb2.Manifest(),
        processes={},
    )
    fd = shmem.open_shared(back, name)
    assert os.readlink(f"/proc/self/fd/{fd}") == "/dev/zero (deleted)"
    assert os.pread(fd, 5, 5 * PAGE_SIZE) == b"hello"
    shmem.release(back)


def test_changed_file_is_named(tmp_path: pathlib.Path):
    path = tmp_path / "library"
    path.write_bytes(b"some content")
    wanted = identity.make(os.fsencode(path), path.stat())
    os.close(identity.open_same(wanted, "is mapped and"))
    path.write_bytes(b"some other content")
    with pytest.raises(RestoreConflictError, match="18 bytes, not 12"):
        os.close(identity.open_same(wanted, "is mapped and"))
    path.unlink()
    with pytest.raises(RestoreConflictError, match="cannot be found"):
        os.close(identity.open_same(wanted, "is mapped and"))


def test_copied_elf_file_is_the_same_build(tmp_path):
    binary = pathlib.Path(os.path.realpath(sys.executable))
    wanted = identity.make(os.fsencode(binary), binary.stat())
    if not wanted.build_id:
        pytest.skip("this python has no build id")
    copy = tmp_path / "python"
    copy.write_bytes(binary.read_bytes())
    wanted.path = os.fsencode(copy)
    os.close(identity.open_same(wanted, "is mapped and"))
