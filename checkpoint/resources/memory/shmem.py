"""Memory objects that live apart from any address space: shared anonymous memory, memfds, deleted files, and
files of a tmpfs that are mapped shared (shm_open).

Owns the registry of one dump (each object once, by device and inode, however many mappings and descriptors
lead to it), the reader of their pages, and making them again at a restore: once, in snap, so that every task
of the job that shared an object gets the same one.

Restore: shared anonymous memory is mapped by snap itself and opened through /proc/self/map_files, so that it
looks the same in /proc/PID/maps afterwards; a memfd is a memfd of the same name; a deleted file is a
nameless file in the same directory (making.py), or a memfd where that cannot be. One that has a path: named.py.

Refused: hugetlb memfds and secret memory (vma.refusal names those that are mapped; for_fd those that are
not).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import stat as stat_module
from dataclasses import dataclass, field

from checkpoint.context import DumpContext
from checkpoint.kernel import distant
from checkpoint.kernel.fdinfo import O_TMPFILE_BIT
from checkpoint.model.vma import DELETED, MAP_NORESERVE
from checkpoint.resources import making, paths, proof
from checkpoint.resources.memory import identity, named
from checkpoint.resources.memory.identity import safe_close
from checkpoint.restore_context import RestoreContext
from images import files_pb2, mm_pb2
from snapshotter.base.errors import RestoreConflictError, UnsupportedError, wrap_os_error
from snapshotter.base.pages import PAGE_SIZE, Run
from snapshotter.base.runs import PageRuns, as_table

FORMAT_VERSION = 1
_KEY = "memory.shmem"

_F_ADD_SEALS, _F_GET_SEALS = 1033, 1034
_SEAL_SEAL, _SEAL_FUTURE_WRITE = 0x1, 0x10
_HANDED = "memory.handed"
_MFD_CLOEXEC, _MFD_ALLOW_SEALING, _MFD_HUGETLB = 1, 2, 4


@dataclass(slots=True, eq=False)
class SharedObject:
    """One object of a dump: its image and a descriptor of snap's that reads it."""

    image_name: str
    image: mm_pb2.Shmem
    fd: int
    present: list[Run] = field(default_factory=list)

    def read_into(self, runs: PageRuns, buffer: memoryview) -> None:
        """PageReader: pages of the object; what lies behind its end reads as zero."""
        position = 0
        for first, nr_pages in as_table(runs).tolist():
            size, offset = nr_pages * PAGE_SIZE, first * PAGE_SIZE
            done = 0
            while done < size:
                part = os.preadv(self.fd, [buffer[position + done : position + size]], offset + done)
                if part == 0:
                    buffer[position + done : position + size] = bytes(size - done)
                    break
                done += part
            position += size


@dataclass(slots=True, eq=False)
class Registry:
    """Every object of one dump."""

    objects: dict[tuple[int, int], SharedObject] = field(default_factory=dict)

    def close(self) -> None:
        """Let go of every object's descriptor."""
        for shared in self.objects.values():
            safe_close(shared.fd)
            shared.fd = -1


def registry(ctx: DumpContext) -> Registry:
    """The dump's registry."""
    found = ctx.resources.setdefault(_KEY, Registry())
    assert isinstance(found, Registry)
    return found


def register(
    ctx: DumpContext,
    open_path: str,
    stat: os.stat_result,
    link: bytes,
    *,
    role: mm_pb2.Shmem.Kind | None = None,
) -> SharedObject:
    """Register an object once; later calls give the same one.

    Args:
        ctx: the dump.
        open_path: a /proc link that opens it (map_files or fd).
        stat: of the object.
        link: what the link reads, such as b"/memfd:name (deleted)".
        role: NAMED or KEPT if it is a file whose path leads to it.

    Raises:
        UnsupportedError: it is of a kind that cannot be rebuilt.
    """
    objects = registry(ctx).objects
    key = (stat.st_dev, stat.st_ino)
    if key not in objects:
        image = describe(stat, link)
        try:
            fd = distant.open_content(open_path, link)
        except OSError as error:
            raise wrap_os_error(error, "cannot open a shared memory object", where=open_path) from error
        if role is not None:
            image.kind, image.name = role, link
            image.origin = proof.origin(open_path, stat)
            image.file.CopyFrom(identity.make(link, stat, open_path=open_path))
        else:
            image.seals = _seals(fd)
            if image.kind == mm_pb2.Shmem.DELETED_FILE:
                image.file.path, image.file.deleted = image.name, True
        name = f"shmem/{len(objects) + 1}"
        objects[key] = SharedObject(name, image, fd)
        ctx.images[name] = image
    return objects[key]


def registered(ctx: DumpContext, dev: int, ino: int) -> str:
    """Image name of an object that was registered already, by its inode; "" if it was not, or is KEPT."""
    found = registry(ctx).objects.get((dev, ino))
    return found.image_name if found is not None and found.image.kind != mm_pb2.Shmem.KEPT else ""


def kept(ctx: DumpContext, dev: int, ino: int) -> str:
    """Image name of a file of a disk whose content was registered as KEPT; "" if there is none."""
    found = registry(ctx).objects.get((dev, ino))
    return found.image_name if found is not None and found.image.kind == mm_pb2.Shmem.KEPT else ""


def keeps_enough(ctx: DumpContext, more_bytes: int) -> bool:
    """Whether the point has the content of as many KEPT files as it may: each costs a descriptor of snap's, and time in
    the frozen window.
    """
    sizes = [
        shared.image.size_bytes
        for shared in registry(ctx).objects.values()
        if shared.image.kind == mm_pb2.Shmem.KEPT
    ]
    return len(sizes) >= named.KEPT_MAX or sum(sizes) + more_bytes > named.KEPT_MAX_BYTES_IN_ALL


def is_made(ctx: RestoreContext, name: str) -> bool:
    """Whether this restore has made the object already."""
    return name in ctx.state.get(_KEY, {})


def for_fd(ctx: DumpContext, pid: int, fd: int, stat: os.stat_result) -> str:
    """Image name of the object behind a descriptor (memfd, or a file that was deleted): RegularFile.shmem."""
    path = f"/proc/{pid}/fd/{fd}"
    return register(ctx, path, stat, os.readlink(os.fsencode(path))).image_name


def describe(stat: os.stat_result, link: bytes) -> mm_pb2.Shmem:
    """The image of an object, without its seals.

    Raises:
        UnsupportedError: hugetlb, secret memory, or not a regular file at all.
    """
    if link.startswith(b"/secretmem") or not stat_module.S_ISREG(stat.st_mode):
        raise UnsupportedError("is no memory that can be read from outside", where=os.fsdecode(link))
    plain = link.removesuffix(DELETED)
    image = mm_pb2.Shmem(
        format_version=FORMAT_VERSION,
        kind=mm_pb2.Shmem.DELETED_FILE,
        name=plain,
        size_bytes=stat.st_size,
        mode=stat_module.S_IMODE(stat.st_mode),
        uid=stat.st_uid,
        gid=stat.st_gid,
        dev=stat.st_dev,
        ino=stat.st_ino,
    )
    if plain.startswith(b"/memfd:"):
        if is_huge_memfd(stat, link):
            raise UnsupportedError(HUGE_MEMFD, where=os.fsdecode(link), hint=HUGE_MEMFD_HINT)
        image.kind, image.name = mm_pb2.Shmem.MEMFD, plain.removeprefix(b"/memfd:")
    elif link == b"/dev/zero (deleted)" and stat.st_dev == _memfd_device():
        image.kind, image.name = mm_pb2.Shmem.ANON, b""
    elif stat.st_dev == _memfd_device():
        image.kind = mm_pb2.Shmem.ANON
    return image


HUGE_MEMFD, HUGE_MEMFD_HINT = "is a memfd of huge pages", "create it without MFD_HUGETLB"


def is_huge_memfd(stat: os.stat_result, link: bytes) -> bool:
    """Whether it was made with MFD_HUGETLB: then it is on another file system than memfds are else."""
    return link.startswith(b"/memfd:") and stat.st_nlink == 0 and stat.st_dev != _memfd_device()


def _memfd_device() -> int:
    """st_dev of the kernel's internal tmpfs, where memfds and shared anonymous memory live."""
    if not _device:
        fd = os.memfd_create("snap")
        _device.append(os.fstat(fd).st_dev)
        os.close(fd)
    return _device[0]


_device: list[int] = []


def _seals(fd: int) -> int:
    try:
        return fcntl.fcntl(fd, _F_GET_SEALS)
    except OSError as error:
        if error.errno == errno.EINVAL:  # not on tmpfs
            return 0
        raise


def data_runs(fd: int, size_bytes: int) -> list[Run]:
    """Pages of an open file that hold data, holes left out (lseek SEEK_DATA)."""
    runs: list[Run] = []
    position = 0
    while position < size_bytes:
        try:
            begin = os.lseek(fd, position, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                break
            raise
        end = min(os.lseek(fd, begin, os.SEEK_HOLE), size_bytes)
        first, last = begin // PAGE_SIZE, (end + PAGE_SIZE - 1) // PAGE_SIZE
        if runs and first < sum(runs[-1]):
            first = sum(runs[-1])
        if last > first:
            runs.append((first, last - first))
        position = max(end, position + 1)
    return runs


def put_all(ctx: DumpContext) -> int:
    """Hand every page of every object to the sink, while the job is frozen. Returns the number of pages.

    All are read each time: another task, write(2) or a device may have written them unseen by any tracker.
    """
    nr_pages = 0
    for shared in registry(ctx).objects.values():
        stat = os.fstat(shared.fd)
        shared.image.size_bytes = stat.st_size
        shared.present = data_runs(shared.fd, stat.st_size)
        if shared.present:
            ctx.sink.put(shared.image_name, shared.present, shared)
            nr_pages += sum(run[1] for run in shared.present)
    return nr_pages


def close_all(ctx: DumpContext) -> None:
    """After the sink was drained: tell it the final pages of every object and let go of them."""
    objects = registry(ctx)
    try:
        for shared in objects.objects.values():
            ctx.sink.close_space(shared.image_name, shared.present)
    finally:
        objects.close()


def open_shared(ctx: RestoreContext, name: str) -> int:
    """A read-write descriptor of snap's of the object, made and filled at the first call. Closed by
    `release`.
    """
    made = ctx.state.setdefault(_KEY, {})
    assert isinstance(made, dict)
    if name not in made:
        image = ctx.image(name, mm_pb2.Shmem)
        fd, fresh = (
            named.open_again(ctx, name, image)
            if image.kind in named.WITH_PATH
            else (_create(ctx, name, image), True)
        )
        made[name] = fd
        try:
            os.ftruncate(fd, image.size_bytes)
            _fill(ctx, name, image, fd)
            if fresh and image.kind not in {mm_pb2.Shmem.ANON, *named.WITH_PATH}:
                os.fchown(fd, image.uid, image.gid)
                os.fchmod(fd, image.mode & 0o1777)
            # F_SEAL_WRITE must stand before anything maps the object; nothing could be mapped writable under
            # it.
            _add_seals(ctx, name, late=False)
        except OSError as error:
            raise wrap_os_error(error, "cannot rebuild shared memory", where=name) from error
    found: int = made[name]
    return found


def open_description(ctx: RestoreContext, name: str, flags: int) -> int:
    """A description of the object for the job, which the caller closes.

    The one that memfd_create makes does not count as a writer, all later ones do: with one of those instead, what is in
    the memfd could not be executed (ETXTBSY). So the first that reads and writes gets that one.
    """
    fd = open_shared(ctx, name)
    handed = ctx.state.setdefault(_HANDED, set())
    # One of O_TMPFILE shows by its flags that it may still be given a name.
    first = ctx.image(name, mm_pb2.Shmem).kind == mm_pb2.Shmem.MEMFD or flags & O_TMPFILE_BIT
    if first and flags & os.O_ACCMODE == os.O_RDWR and name not in handed:
        handed.add(name)
        return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 0)
    return paths.reopen(fd, flags, name)


def open_read_only(ctx: RestoreContext, name: str, *, drop_writable: bool = False) -> int:
    """The same object as a description opened for reading, which the caller closes.

    Args:
        ctx: the restore.
        name: of the image.
        drop_writable: the object is to be somebody's executable: the kernel gives ETXTBSY while a descriptor
        can write.
    """
    fd = open_shared(ctx, name)
    read_only = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    if drop_writable:
        ctx.state[_KEY][name] = os.dup(read_only)
        os.close(fd)
    return read_only


def _create(ctx: RestoreContext, name: str, image: mm_pb2.Shmem) -> int:
    if image.hugetlb or image.memfd_flags & _MFD_HUGETLB:
        raise UnsupportedError("is a memfd of huge pages", where=os.fsdecode(image.name))
    if image.kind == mm_pb2.Shmem.ANON and image.size_bytes:
        fd = _anonymous(image.size_bytes)
        if fd >= 0:
            return fd
    shown = image.name
    if image.kind == mm_pb2.Shmem.DELETED_FILE:
        owner = making.Owner(image.uid, image.gid, image.mode)
        who, linkable = ctx.holders.of_object(name), _is_linkable(ctx, name)
        fd = making.nameless(ctx, who, image.file, owner, linkable=linkable)
        if fd >= 0:
            return fd
        shown = os.path.basename(image.name)
    try:
        return os.memfd_create(os.fsdecode(shown[:200]), _MFD_CLOEXEC | _MFD_ALLOW_SEALING)
    except OSError as error:
        raise wrap_os_error(error, "cannot make a memfd", where=paths.shown(shown)) from error


def _is_linkable(ctx: RestoreContext, name: str) -> bool:
    """Whether a description of it was opened with O_TMPFILE: linkat(2) can give it a name."""
    if "files" not in ctx.names:
        return False
    return any(
        description.regular.shmem == name and description.flags & O_TMPFILE_BIT
        for description in ctx.image("files", files_pb2.Files).descriptions
    )


def _anonymous(size_bytes: int) -> int:
    """Shared anonymous memory as a descriptor; -1 where map_files may not be opened (it takes
    CAP_SYS_ADMIN).
    """
    with mmap.mmap(-1, size_bytes, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | MAP_NORESERVE) as area:
        view = ctypes.c_char.from_buffer(area)
        start = ctypes.addressof(view)
        del view
        end = start + (size_bytes + PAGE_SIZE - 1 & -PAGE_SIZE)
        try:
            return os.open(f"/proc/self/map_files/{start:x}-{end:x}", os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            return -1


def _fill(ctx: RestoreContext, name: str, image: mm_pb2.Shmem, fd: int) -> None:
    def write(runs: PageRuns, data: memoryview) -> None:
        position = 0
        for first, nr_pages in as_table(runs).tolist():
            offset = first * PAGE_SIZE
            end = min(offset + nr_pages * PAGE_SIZE, image.size_bytes)
            at = position
            while offset < end:
                done = os.pwrite(fd, data[at : at + end - offset], offset)
                offset, at = offset + done, at + done
            position += nr_pages * PAGE_SIZE

    ctx.pages_written += ctx.source.fill(name, write)


def seal_late(ctx: RestoreContext) -> None:
    """Seals that older writable mappings survive (F_SEAL_FUTURE_WRITE), and the seal on seals. After all
    mappings.
    """
    for name in ctx.state.get(_KEY, {}):
        _add_seals(ctx, name, late=True)


def _add_seals(ctx: RestoreContext, name: str, *, late: bool) -> None:
    image = ctx.image(name, mm_pb2.Shmem)
    if image.kind != mm_pb2.Shmem.MEMFD:
        return
    deferred = image.seals & (_SEAL_SEAL | _SEAL_FUTURE_WRITE)
    seals = deferred if late else image.seals & ~deferred
    if seals:
        fd = ctx.state[_KEY][name]
        try:
            fcntl.fcntl(fd, _F_ADD_SEALS, seals)
        except OSError as error:
            raise wrap_os_error(error, f"cannot seal a memfd ({seals:#x})", where=name) from error


def release(ctx: RestoreContext) -> None:
    """Close snap's descriptors of the rebuilt objects."""
    for fd in ctx.state.pop(_KEY, {}).values():
        safe_close(fd)
    named.release(ctx)


def check(ctx: RestoreContext) -> None:
    """Every object an image names must be there and be of a kind that can be rebuilt.

    Named ones stay open until `release`: nobody can put another in their place.

    Raises:
        RestoreConflictError: it is of a kind this version does not know, or another file has its name.
    """
    for name in ctx.names:
        if name.startswith("shmem/"):
            image = ctx.image(name, mm_pb2.Shmem)
            if image.hugetlb or image.memfd_flags & _MFD_HUGETLB:
                raise RestoreConflictError("is a memfd of huge pages", where=name)
            if image.kind == mm_pb2.Shmem.NAMED:
                named.hold_named(ctx, name, image)
