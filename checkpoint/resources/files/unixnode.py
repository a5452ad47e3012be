"""The nodes of bound unix sockets in the file system: made, given their owner and mode, replaced, removed.

Owns that snap's rights are not lent to whoever may write along the path. bind(2) takes the address as the program gave it
and follows links in it, so it is done in a thread of snap's with the fsuid and fsgid of the node's owner: it reaches what he
reaches. Where he may not write into the directory (a daemon that bound its socket as root and gave it away), it
is done with those of the directory's owner, and the node is given away again once it is known, by its inode, to be the
socket's. Old nodes are removed below the directory's descriptor, which was opened without following any link.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
from collections.abc import Callable, Iterator

from checkpoint.kernel import descriptors, sockdiag
from checkpoint.kernel.fdinfo import O_PATH
from checkpoint.resources import paths
from images import files_pb2
from snapshotter.base.errors import RestoreConflictError

_INO_MASK = 0xFFFFFFFF
"""unix_diag shows 32 bits of an inode number."""
FRESH_MODE = 0o777
"""Of a socket that nobody has changed; bind(2) takes the node's mode from it, less the umask."""


def has_path(image: files_pb2.UnixSocket) -> bool:
    """Whether it has an address in the file system."""
    return bool(image.address) and not image.address.startswith(b"\0")


def is_renamed(image: files_pb2.UnixSocket) -> bool:
    """Whether its node has got another name since it was bound, in the same directory; only absolute addresses can."""
    return (
        image.HasField("bound")
        and image.address.startswith(b"/")
        and os.path.basename(image.bound.path) != os.path.basename(image.address)
    )


def way_to(image: files_pb2.UnixSocket) -> bytes:
    """The path or abstract name under which it can be reached."""
    path: bytes = image.bound.path if is_renamed(image) else image.address
    return path


def check(image: files_pb2.UnixSocket) -> None:
    """Whether the directory of a bound socket is there. Touches nothing.

    Raises:
        RestoreConflictError: it is gone, or a link has come into its path; something has the name that it is to be bound under.
    """
    with contextlib.closing(_Directory(image)) as directory, contextlib.suppress(FileNotFoundError):
        if is_renamed(image):
            os.stat(os.path.basename(image.address), dir_fd=directory.fd, follow_symlinks=False)
            raise _in_the_way(image.address, OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE)))


def bind(sock: socket.socket, image: files_pb2.UnixSocket) -> None:
    """Give a socket the job's address. A node that a dead socket left there is replaced.

    Raises:
        RestoreConflictError: something else is in the way.
    """
    if not has_path(image):
        _bind(sock, image.address)
        return
    if not image.HasField("bound"):  # the job had unlinked it
        with bound_for_a_moment(sock, image):
            return
    with contextlib.closing(_Directory(image)) as directory:
        _make(sock, image, directory, image.bound.mode & 0o7777)


@contextlib.contextmanager
def bound_for_a_moment(sock: socket.socket, image: files_pb2.UnixSocket) -> Iterator[None]:
    """The same, with a node that is there for the time of the context only."""
    with contextlib.closing(_Directory(image)) as directory:
        _make(sock, image, directory, 0o600)
        try:
            yield
        finally:
            _with_rights(image, directory, directory.unlink)


def base_of(image: files_pb2.UnixSocket) -> bytes:
    """The directory from which the address leads to the node: the working directory of whoever bound it."""
    if image.address.startswith(b"/") or not image.bound.path.endswith(b"/" + image.address):
        return b"/"
    return image.bound.path[: -len(image.address)]


class _Directory:
    """The directory of a socket's node, opened (O_PATH) without following a link."""

    def __init__(self, image: files_pb2.UnixSocket) -> None:
        self.path, self.name = os.path.split(image.bound.path or image.address)
        if not image.HasField("bound"):
            # Nothing of it is in the file system: there is no path that the kernel had resolved.
            self.path = os.path.realpath(self.path)
        where = paths.shown(image.address)
        try:
            self.fd = descriptors.open_without_symlinks(self.path, O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise RestoreConflictError(
                f"the directory of the job's socket is gone ({error.strerror})",
                where=where,
                hint="make it again",
            ) from error
        self.stat = os.fstat(self.fd)
        try:
            there = os.stat(os.path.join(base_of(image), os.path.dirname(image.address)))
        except OSError:
            there = None
        if there is None or not os.path.samestat(there, self.stat):
            self.close()
            raise RestoreConflictError(
                f"the address leads to another directory than {paths.shown(self.path)} now",
                where=where,
                hint="put its links back as they were",
            )

    def unlink(self) -> None:
        os.unlink(self.name, dir_fd=self.fd)

    def node(self) -> os.stat_result | None:
        try:
            return os.stat(self.name, dir_fd=self.fd, follow_symlinks=False)
        except FileNotFoundError:
            return None

    def close(self) -> None:
        os.close(self.fd)


def _make(sock: socket.socket, image: files_pb2.UnixSocket, directory: _Directory, mode: int) -> None:
    base = base_of(image)

    def place() -> None:
        os.chdir(base)  # of this thread alone
        node = directory.node()
        if node is not None and image.HasField("bound"):
            _unlink_dead(way_to(image), directory, node, sock.type)
        _bind(sock, image.address)
        if is_renamed(image):
            os.rename(
                os.path.basename(image.address),
                directory.name,
                src_dir_fd=directory.fd,
                dst_dir_fd=directory.fd,
            )

    os.fchmod(sock.fileno(), mode)
    try:
        as_owner = _with_rights(image, directory, place)
    finally:
        os.fchmod(sock.fileno(), image.mode or FRESH_MODE)
    if not as_owner and image.HasField("bound"):
        _give_away(sock, image, directory)


def _with_rights(image: files_pb2.UnixSocket, directory: _Directory, work: Callable[[], None]) -> bool:
    """With the rights of the node's owner (True); if he may not, with those of the directory's (False)."""
    try:
        descriptors.with_file_rights(image.uid, image.gid, work)
    except PermissionError:
        descriptors.with_file_rights(directory.stat.st_uid, directory.stat.st_gid, work)
        return False
    except OSError as error:
        raise _in_the_way(image.address, error) from error
    return True


def _bind(sock: socket.socket, address: bytes) -> None:
    try:
        sock.bind(address)
    except PermissionError:
        raise
    except OSError as error:
        raise _in_the_way(address, error) from error


def _in_the_way(address: bytes, error: OSError) -> RestoreConflictError:
    return RestoreConflictError(
        f"cannot bind the job's socket: {error.strerror}",
        where=paths.shown(address),
        hint="end what uses this address",
    )


def _unlink_dead(address: bytes, directory: _Directory, node: os.stat_result, socket_type: int) -> None:
    """Remove the node of a socket that nobody serves any more; anything else is in the way."""
    where = paths.shown(address)
    if not stat.S_ISSOCK(node.st_mode):
        raise RestoreConflictError("there is something else where the job's socket was", where=where)
    with socket.socket(socket.AF_UNIX, socket_type) as probe:
        probe.setblocking(False)
        try:
            probe.connect(address)
        except ConnectionRefusedError:
            directory.unlink()
            return
        except PermissionError:
            raise
        except OSError:
            pass
    raise RestoreConflictError(
        "another program serves the job's socket", where=where, hint="end it, or move its socket"
    )


def _give_away(sock: socket.socket, image: files_pb2.UnixSocket, directory: _Directory) -> None:
    """Change the owner of the node, if it is this socket's."""
    info = sockdiag.unix_sockets().get(os.fstat(sock.fileno()).st_ino & _INO_MASK)
    fd = os.open(directory.name, O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory.fd)
    try:
        node = os.fstat(fd)
        if info is None or not stat.S_ISSOCK(node.st_mode) or info.vfs_ino != node.st_ino & _INO_MASK:
            raise RestoreConflictError(
                "somebody has put another file where the job's socket was bound just now",
                where=paths.shown(image.address),
                hint="see who writes into that directory",
            )
        os.chown(f"/proc/self/fd/{fd}", image.uid, image.gid)
    finally:
        os.close(fd)
