"""Unix sockets with an address in the file system that leads to them no more: unlinked, or taken by another file since.

Such an address cannot be bound where it was: what is there now is not ours to move, and a node of ours would be seen. So
the socket is bound in an empty file system of its own, mounted nowhere, by a thread whose root that is. Its name
and all that the job can see are the same. What has to reach such a socket by its address during the restore (a
connection, a queued datagram) does so from the same root. Where that is not allowed (it takes CAP_SYS_ADMIN and
CAP_SYS_CHROOT), the address is bound in its old place for a moment, if nothing else is there.
"""

from __future__ import annotations

import contextlib
import functools
import os
import socket
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from checkpoint.kernel import descriptors
from checkpoint.kernel.fdinfo import O_PATH
from checkpoint.resources import paths
from checkpoint.resources.files import unixnode
from images import files_pb2
from snapshotter.base.errors import RestoreConflictError

if TYPE_CHECKING:
    from checkpoint.resources.files.opening import Opening


def bind(opening: Opening, sock: socket.socket, image: files_pb2.UnixSocket) -> None:
    """Give a socket the job's address: in its place where it has one, else in a hidden one."""
    with bound(opening, sock, image):
        pass


@contextlib.contextmanager
def bound(opening: Opening, sock: socket.socket, image: files_pb2.UnixSocket) -> Iterator[None]:
    """The same; in the context the address can be reached (`reach`)."""
    if image.HasField("bound") or not unixnode.has_path(image):
        unixnode.bind(opening, sock, image)
        yield
        return
    root = opening.hidden.get(image.ino, -1)
    if root < 0:
        try:
            root = descriptors.detached_tmpfs()
        except OSError as error:
            if not image.address.startswith(b"/"):
                raise RestoreConflictError(
                    f"cannot bind the job's socket to a relative address that was unlinked: {error.strerror}",
                    where=paths.shown(image.address),
                    hint="it takes CAP_SYS_ADMIN: run the rollback as root",
                ) from error
            with unixnode.bound_for_a_moment(opening, sock, image):
                yield
            return
        opening.hidden[image.ino] = root
    descriptors.with_root(root, functools.partial(_bind, sock, image))
    yield


def reach(opening: Opening, image: files_pb2.UnixSocket, work: Callable[[bytes], object]) -> None:
    """Do something with an address that leads to a socket of the job's, and to no other: whoever may write along a path could
    have put a link to another's socket there by now.
    """
    if image.ino in opening.nodes:
        work(b"/proc/self/fd/%d" % opening.nodes[image.ino])
    elif image.ino in opening.hidden:
        descriptors.with_root(opening.hidden[image.ino], functools.partial(work, image.address))
    else:
        work(image.address)


@contextlib.contextmanager
def held(opening: Opening, image: files_pb2.UnixSocket) -> Iterator[int]:
    """The node of a bound socket (O_PATH), for a task that has to reach it from elsewhere; -1: its address leads to it."""
    if image.ino in opening.nodes:
        yield opening.nodes[image.ino]
        return
    if image.ino not in opening.hidden:
        yield -1
        return
    flags = O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = descriptors.with_root(opening.hidden[image.ino], lambda: os.open(image.address, flags))
    try:
        yield fd
    finally:
        os.close(fd)


def _bind(sock: socket.socket, image: files_pb2.UnixSocket) -> None:
    if folder := os.path.dirname(image.address):
        os.makedirs(folder, exist_ok=True)
    os.fchmod(sock.fileno(), 0o600)
    sock.bind(image.address)
    os.fchmod(sock.fileno(), image.mode or unixnode.FRESH_MODE)
    os.chown(image.address, image.uid, image.gid, follow_symlinks=False)
