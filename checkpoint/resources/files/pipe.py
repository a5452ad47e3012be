"""Pipes and FIFOs: both ends, the bytes in between, the capacity, packet boundaries.

State: one PipeBuffer per pipe (its inode), shared by the descriptions of its ends. The bytes are copied
with tee(2) into a private pipe, so that the job's are not consumed. Packets are found in the bytes themselves, for
F_SETFL may have changed the flag of the ends since they were written. Restore makes the pipe in snap, sets
its capacity, writes the bytes back and closes each end that the job did not have: a reader whose
writers had gone reads the rest and then end-of-file, as before. A FIFO is opened read-write first, for
then no open blocks, and each end is reopened from that.

Bytes in a pipe whose readers have gone are kept, too: a new reader may come through /proc/PID/fd. They are read the same way.
Not kept: such bytes in a FIFO, since opening it would let a writer through that waits for a reader (fifo(7)), and in a
pipe whose writer asked for SIGIO, which it would get. A warning says so.

A pipe that a process outside the job has open too is connected to again, while that process lives
(outside.py); its bytes are then what they are now, and the recorded ones are not written. So it is with a FIFO
that somebody outside still has open. A FIFO that is gone is made again under its name (fifo.py), one whose name was deleted
without (nameless.py).
"""

from __future__ import annotations

import fcntl
import itertools
import mmap
import os
import select
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from checkpoint.kernel import descriptors
from checkpoint.kernel.fdinfo import O_DIRECT
from checkpoint.resources import authority, nameless, paths
from checkpoint.resources.files import fifo, kind, outside
from images import files_pb2
from snapshotter.base.errors import SnapshotterError, wrap_os_error

if TYPE_CHECKING:
    from checkpoint.model.holders import Who
    from checkpoint.resources.files.dumping import FilesDump
    from checkpoint.resources.files.kind import Seen
    from checkpoint.resources.files.opening import Opening

_CAPACITY_MAX_BYTES = 1 << 31
_USUAL_CAPACITY_BYTES = 1 << 16


class PipeKind(kind.Kind):
    field = "pipe"

    def claims(self, seen: Seen) -> bool:
        return stat.S_ISFIFO(seen.stat.st_mode) and not seen.path_only

    def dump(self, job: FilesDump, seen: Seen, description: files_pb2.Description) -> None:
        end = description.pipe
        end.id = job.pipe_id(seen)
        end.read_end = seen.info.readable
        end.write_end = seen.info.writable

    def finish(self, job: FilesDump, seen: Seen, description: files_pb2.Description) -> None:
        """The first description of a pipe that can be read from fetches its contents."""
        buffer = job.pipes[description.pipe.id]
        if not buffer.size_bytes:
            if not seen.link.startswith(b"pipe:"):
                buffer.is_fifo = True
                buffer.fifo.CopyFrom(kind.identity_of(seen))
                buffer.fifo.uid, buffer.fifo.gid = seen.stat.st_uid, seen.stat.st_gid
            with job.borrow(seen) as fd:
                buffer.size_bytes = fcntl.fcntl(fd, descriptors.F_GETPIPE_SZ)
        if buffer.data:
            return
        with job.borrow(seen) as fd:
            if description.pipe.read_end:
                _fill_in(buffer, fd)
            elif _has_no_reader(fd):
                self._unread(job, seen, buffer, fd)

    def _unread(self, job: FilesDump, seen: Seen, buffer: files_pb2.PipeBuffer, fd: int) -> None:
        """The bytes in a pipe that nobody can read from at present."""
        nr_bytes = descriptors.nr_readable(fd)
        if not nr_bytes:
            return
        ends = (d for d in job.image.descriptions if d.HasField("pipe") and d.pipe.id == buffer.id)
        if buffer.is_fifo or any(end.flags & os.O_ASYNC for end in ends):
            job.ctx.warn(
                f"task {seen.pid}, {seen.where}: {nr_bytes} bytes that wait for a reader are not part of the point"
            )
            return
        reader = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            _fill_in(buffer, reader)
        finally:
            os.close(reader)

    def check(self, opening: Opening, description: files_pb2.Description) -> None:
        buffer = opening.pipes[description.pipe.id]
        if buffer.is_fifo and not buffer.fifo.deleted:
            who = opening.ctx.holders.of_description(description.id)
            access = authority.access_of(description.flags)
            known = opening.fifos.pop(buffer.id, None)
            found = fifo.check(opening.ctx, buffer.fifo, who, access, known)
            if found is not None:
                opening.fifos[buffer.id] = found
            return
        if buffer.is_fifo:
            nameless.make(opening.ctx, buffer.fifo)
        if buffer.holders and description.id not in opening.early:
            # Before the old job is killed: its end held open here keeps the reader from seeing end-of-file.
            fd = outside.connect_again(buffer, description.flags)
            if fd is not None:
                opening.early[description.id] = fd
                return
            holder = buffer.holders[0]
            opening.warn(
                f"process {holder.pid} ({os.fsdecode(holder.comm)}) at the other end of {os.fsdecode(buffer.link)} "
                "has ended: the job finds that end closed"
            )
        if not buffer.is_fifo and (buffer.data or buffer.size_bytes > _USUAL_CAPACITY_BYTES):
            # Whether it may be as large, and its contents fit, only making one tells (fs.pipe-max-size, pipe-user-pages-hard).
            for fd in _make(opening, buffer):
                os.close(fd)

    def open(self, opening: Opening, description: files_pb2.Description) -> int:
        end = description.pipe
        buffer = opening.pipes[end.id]
        if description.id in opening.early:
            return opening.early.pop(description.id)
        ends = opening.pipe_ends.get(end.id)
        if ends is None:
            ends = opening.pipe_ends[end.id] = _make(opening, buffer)
        first = not buffer.is_fifo and not (end.read_end and end.write_end)
        if first and (end.id, end.read_end) not in opening.pipe_ends_used:
            # The very ends that pipe(2) made; further descriptions come from opens of /proc/PID/fd.
            opening.pipe_ends_used.add((end.id, end.read_end))
            return fcntl.fcntl(ends[0] if end.read_end else ends[1], fcntl.F_DUPFD_CLOEXEC, 0)
        return paths.reopen(ends[0], description.flags & ~O_DIRECT, f"pipe {end.id}")


def _has_no_reader(write_end: int) -> bool:
    """Whether every read end of a pipe is closed (poll(2): POLLERR)."""
    state = select.poll()
    state.register(write_end, 0)
    return any(events & select.POLLERR for _, events in state.poll(0))


def _fill_in(buffer: files_pb2.PipeBuffer, fd: int) -> None:
    """Copy the contents of a pipe, which keeps them, into its message."""
    nr_bytes = descriptors.nr_readable(fd)
    if not nr_bytes:
        return
    with _scratch_pipe(buffer.size_bytes) as (read_end, write_end):
        _tee(fd, write_end, nr_bytes)
        buffer.data = os.read(read_end, nr_bytes)
        # A read ends with the first packet. The byte tells whether the last piece was one.
        if len(buffer.data) == nr_bytes:
            _tee(fd, write_end, nr_bytes)
            fcntl.fcntl(write_end, descriptors.F_SETPIPE_SZ, 2 * buffer.size_bytes)
            os.write(write_end, b"\0")
            if len(os.read(read_end, nr_bytes + 1)) > nr_bytes:
                return
            os.read(read_end, 1)
        else:
            while os.read(read_end, nr_bytes) and descriptors.nr_readable(read_end):
                pass
        _tee(fd, write_end, nr_bytes)
        pieces = _pieces(read_end)
    buffer.data = b"".join(data for data, _ in pieces)
    for packet, run in itertools.groupby(pieces, key=lambda piece: piece[1]):
        sizes = [len(data) for data, _ in run]
        for size in sizes if packet else [sum(sizes)]:
            buffer.pieces.add(size_bytes=size, packet=packet)


def _tee(fd: int, write_end: int, nr_bytes: int) -> None:
    copied = descriptors.tee(fd, write_end, nr_bytes)
    if copied != nr_bytes:
        raise SnapshotterError(
            f"only {copied} of the {nr_bytes} bytes in a pipe could be copied", where="pipe"
        )


def _pieces(source: int) -> list[tuple[bytes, bool]]:
    """(bytes, whether they are a packet) of each buffer of a pipe, which is emptied.

    A pipe with room for one buffer gets them one by one (splice(2) moves whole buffers). Each is copied twice into
    another: a read of everything there ends after the first copy if the buffer is a packet (PIPE_BUF_FLAG_PACKET).
    """
    found = []
    with (
        _scratch_pipe(mmap.PAGESIZE) as (one, into_one),
        _scratch_pipe(2 * mmap.PAGESIZE) as (twice, into_twice),
    ):
        while nr_left := descriptors.nr_readable(source):
            nr_bytes = os.splice(source, into_one, nr_left, flags=descriptors.SPLICE_F_NONBLOCK)
            for _ in range(2):
                _tee(one, into_twice, nr_bytes)
            packet = len(os.read(twice, 2 * nr_bytes)) == nr_bytes
            if packet:
                os.read(twice, nr_bytes)
            found.append((os.read(one, nr_bytes), packet))
    return found


@contextmanager
def _scratch_pipe(capacity: int) -> Iterator[tuple[int, int]]:
    """A pipe of snap's own that never blocks: (read end, write end)."""
    ends = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        fcntl.fcntl(ends[1], descriptors.F_SETPIPE_SZ, capacity)
        yield ends
    finally:
        for fd in ends:
            os.close(fd)


def _make(opening: Opening, buffer: files_pb2.PipeBuffer) -> tuple[int, int]:
    """The pipe with its contents: (read end, write end); for a FIFO twice the same read-write one."""
    if buffer.is_fifo:
        flags = os.O_RDWR | os.O_NONBLOCK
        if buffer.fifo.deleted:
            both = paths.reopen(nameless.make(opening.ctx, buffer.fifo), flags, paths.shown(buffer.fifo.path))
        else:
            who = _holders(opening, buffer.id)
            both = fifo.reopen(opening.ctx, buffer.fifo, who, opening.fifos.get(buffer.id), flags)
        ends = (both, os.dup(both))
        if not buffer.fifo.deleted and _is_in_use(opening, buffer, both):
            return ends
    else:
        ends = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    if buffer.size_bytes > _CAPACITY_MAX_BYTES:
        raise SnapshotterError(f"a pipe of {buffer.size_bytes} bytes", where=f"pipe {buffer.id}")
    try:
        if buffer.size_bytes != fcntl.fcntl(ends[1], descriptors.F_GETPIPE_SZ):
            fcntl.fcntl(ends[1], descriptors.F_SETPIPE_SZ, buffer.size_bytes)
        offset = 0
        for piece in buffer.pieces or [files_pb2.PipePiece(size_bytes=len(buffer.data))]:
            data = buffer.data[offset : offset + piece.size_bytes]
            if data and _put_back(ends[1], data, buffer, packet=piece.packet) != len(data):
                raise SnapshotterError("its contents do not fit into it", where=f"pipe {buffer.id}")
            offset += piece.size_bytes
    except OSError as error:
        raise wrap_os_error(
            error,
            f"cannot make a pipe of {buffer.size_bytes} bytes with its contents",
            where=f"pipe {buffer.id}",
        ) from error
    return ends


def _holders(opening: Opening, pipe: int) -> Who:
    """Every task that gets an end of a pipe."""
    numbers = [one.id for one in opening.image.descriptions if one.HasField("pipe") and one.pipe.id == pipe]
    return frozenset().union(*map(opening.ctx.holders.of_description, numbers))


def _put_back(write_end: int, data: bytes, buffer: files_pb2.PipeBuffer, *, packet: bool) -> int:
    """Append to a pipe's contents; returns how many bytes fitted."""
    fcntl.fcntl(write_end, fcntl.F_SETFL, os.O_NONBLOCK | (O_DIRECT if packet else 0))
    if packet or not buffer.pieces:
        return os.write(write_end, data)
    # A packet that comes next would be merged into a page that was written, but not into one that was copied (tee(2)).
    with _scratch_pipe(buffer.size_bytes) as (read_end, scratch):
        return descriptors.tee(read_end, write_end, os.write(scratch, data))


def _is_in_use(opening: Opening, buffer: files_pb2.PipeBuffer, fd: int) -> bool:
    """Whether a FIFO is open outside the job, whose end is dead by now: the pipe behind it is then the one that it was."""
    now = descriptors.nr_readable(fd)
    found = outside.holders({buffer.fifo.path}, opening.ctx.processes).get(buffer.fifo.path)
    if not now and not found:
        return False
    who = f"process {found[0].pid} ({found[0].comm})" if found else "somebody"
    opening.warn(
        f"{paths.shown(buffer.fifo.path)}: {who} outside the job has this FIFO open: the job gets it with the {now} bytes "
        f"that are in it now, not the {len(buffer.data)} of the point"
    )
    return True


KIND = PipeKind()
