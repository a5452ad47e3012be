"""Pipes and FIFOs: both ends, the bytes in between, the capacity, packet boundaries.

State: one PipeBuffer per pipe (its inode), shared by the descriptions of its ends. The bytes are copied
with tee(2) into a private pipe, so that the job's are not consumed. Restore makes the pipe in snap, sets
its capacity, writes the bytes back and closes each end that the job did not have: a reader whose
writers had gone reads the rest and then end-of-file, as before. A FIFO is opened read-write first, for
then no open blocks, and each end is reopened from that.

A pipe that a process outside the job has open too is connected to again, while that process lives
(outside.py); its bytes are then what they are now, and the recorded ones are not written. So it is with a FIFO
that somebody outside still has open. A FIFO that is gone is made again under its name (fifo.py), one whose name was deleted
without (nameless.py).
"""

from __future__ import annotations

import fcntl
import os
import stat
from typing import TYPE_CHECKING

from checkpoint.kernel import descriptors
from checkpoint.kernel.fdinfo import O_DIRECT
from checkpoint.resources import authority, nameless, paths
from checkpoint.resources.files import fifo, kind, outside
from snapshotter.base.errors import SnapshotterError, wrap_os_error

if TYPE_CHECKING:
    from checkpoint.model.holders import Who
    from checkpoint.resources.files.dumping import FilesDump
    from checkpoint.resources.files.kind import Seen
    from checkpoint.resources.files.opening import Opening
    from images import files_pb2

_PACKET_MAX_BYTES = 4096
"""PIPE_BUF: one packet of a pipe in packet mode is one pipe buffer."""
_CAPACITY_MAX_BYTES = 1 << 31


class PipeKind(kind.Kind):
    field = "pipe"

    def claims(self, seen: Seen) -> bool:
        return stat.S_ISFIFO(seen.stat.st_mode) and not seen.path_only

    def dump(self, job: FilesDump, seen: Seen, description: files_pb2.Description) -> None:
        end = description.pipe
        end.id = job.pipe_id(seen)
        end.read_end = seen.info.readable
        end.write_end = seen.info.writable
        if end.write_end and seen.info.flags & O_DIRECT:
            job.packet_pipes.add(end.id)

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
        if not description.pipe.read_end or buffer.data:
            return
        with job.borrow(seen) as fd:
            nr_bytes = descriptors.nr_readable(fd)
            if nr_bytes:
                packets = description.pipe.id in job.packet_pipes
                pieces = _copy(fd, nr_bytes, buffer.size_bytes, packets)
                buffer.data = b"".join(pieces)
                if packets:
                    buffer.packets.extend(len(piece) for piece in pieces)

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


def _copy(fd: int, nr_bytes: int, capacity: int, packets: bool) -> list[bytes]:
    """The contents of a pipe, which keeps them. One item per packet, or one in all."""
    read_end, write_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        fcntl.fcntl(write_end, descriptors.F_SETPIPE_SZ, capacity)
        copied = descriptors.tee(fd, write_end, nr_bytes)
        if copied != nr_bytes:
            raise SnapshotterError(
                f"only {copied} of the {nr_bytes} bytes in a pipe could be copied",
                where=f"pipe of {capacity} bytes",
            )
        pieces: list[bytes] = []
        left = nr_bytes
        while left:
            piece = os.read(read_end, _PACKET_MAX_BYTES if packets else left)
            pieces.append(piece)
            left -= len(piece)
        return pieces
    finally:
        os.close(read_end)
        os.close(write_end)


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
        if buffer.packets:
            fcntl.fcntl(ends[1], fcntl.F_SETFL, O_DIRECT | os.O_NONBLOCK)
            offset = 0
            for length in buffer.packets:
                os.write(ends[1], buffer.data[offset : offset + length])
                offset += length
        elif buffer.data and os.write(ends[1], buffer.data) != len(buffer.data):
            raise SnapshotterError("its contents do not fit into it", where=f"pipe {buffer.id}")
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
