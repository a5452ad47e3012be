"""The nodes of bound unix sockets in the file system: made, given their owner and mode, replaced, removed.

Owns that snap's rights are not lent to whoever may write along the path. bind(2) takes the address as the program gave it
and follows links in it, so it is done in a thread with the rights of a task that has the socket, or with fewer (the node's
owner's): it reaches what they reach. Old nodes are removed below the directory's descriptor, which was opened without following any link.

The exception: a daemon that bound its socket as root and then dropped its rights may not do that again. Its node is replaced all
the same while it is there, provably the one that it was, with the same owner and mode, below directories that are as they were and that nobody
but their owners can rearrange.

The job's own connections to a socket are made through a descriptor of its node, which nobody can put another under.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import socket
import stat
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from checkpoint.kernel import descriptors, rights, sockdiag
from checkpoint.kernel.fdinfo import O_PATH
from checkpoint.model.holders import Rights
from checkpoint.resources import authority, paths, proof
from images import files_pb2
from snapshotter.base.errors import RestoreConflictError

if TYPE_CHECKING:
    from checkpoint.resources.files.opening import Opening

_CAP_CHOWN, _CAP_FOWNER = 1 << 0, 1 << 3
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


def check(opening: Opening, image: files_pb2.UnixSocket) -> None:
    """Whether a bound socket can be bound where it was. Touches nothing.

    Raises:
        RestoreConflictError: its directory is gone, or a link has come into its path; something has the name that it is to be bound
            under; no task of the job may bind it there.
    """
    with contextlib.closing(_Directory(image)) as directory, contextlib.suppress(FileNotFoundError):
        node = directory.node()
        if node is not None and not stat.S_ISSOCK(node.st_mode):
            raise _something_else(image.bound.path)
        _permitted(opening, image, directory)
        if is_renamed(image):
            os.stat(os.path.basename(image.address), dir_fd=directory.fd, follow_symlinks=False)
            raise _in_the_way(image.address, OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE)))


def bind(opening: Opening, sock: socket.socket, image: files_pb2.UnixSocket) -> None:
    """Give a socket the job's address. A node that a dead socket left there is replaced.

    Raises:
        RestoreConflictError: something else is in the way.
    """
    if not has_path(image):
        _bind(sock, image.address)
        return
    if not image.HasField("bound"):  # the job had unlinked it
        with bound_for_a_moment(opening, sock, image):
            return
    with contextlib.closing(_Directory(image)) as directory:
        _make(opening, sock, image, directory)


@contextlib.contextmanager
def bound_for_a_moment(opening: Opening, sock: socket.socket, image: files_pb2.UnixSocket) -> Iterator[None]:
    """The same, with a node that is there for the time of the context only."""
    with contextlib.closing(_Directory(image)) as directory:
        used = _make(opening, sock, image, directory)
        try:
            yield
        finally:
            opening.ctx.acting.run(used, directory.unlink)


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


def _make(
    opening: Opening, sock: socket.socket, image: files_pb2.UnixSocket, directory: _Directory
) -> Rights:
    """Bind it, and dress its node; returns the rights that this took."""
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

    permitted, owned = _permitted(opening, image, directory)
    os.fchmod(sock.fileno(), 0o600)
    try:
        used = _first_that_may(opening, image, permitted, place)
    finally:
        os.fchmod(sock.fileno(), image.mode or FRESH_MODE)
    node = _node_of(sock, image, directory)
    try:
        if image.HasField("bound"):
            mode = image.bound.mode & 0o7777

            def dress() -> None:
                authority.dress(node, image.uid, image.gid, mode)

            if owned:
                _first_that_may(opening, image, [used, *permitted], dress)
            else:
                dress()
            proof.mark(node, image.origin)
    except BaseException:
        os.close(node)
        raise
    opening.hold_node(image.ino, node)
    return used


def _first_that_may(
    opening: Opening, image: files_pb2.UnixSocket, permitted: Iterable[Rights], work: Callable[[], None]
) -> Rights:
    """Do it with the first of these rights that suffice; returns them."""
    refused: OSError = PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    for own in permitted:
        try:
            opening.ctx.acting.run(own, work)
        except PermissionError as error:
            refused = error
        except OSError as error:
            raise _in_the_way(image.address, error) from error
        else:
            return own
    raise _in_the_way(image.address, refused) from refused


def _permitted(
    opening: Opening, image: files_pb2.UnixSocket, directory: _Directory
) -> tuple[list[Rights], bool]:
    """(rights with which it can be bound, the least first; whether they are those of a task that has it).

    Raises:
        RestoreConflictError: no task may bind it, and the exception does not hold.
    """
    acting = opening.ctx.acting
    description = opening.unix_by_ino.get(image.ino)
    holders = opening.ctx.holders
    who = holders.everybody if description is None else holders.of_description(description.id)
    for own in (own for task in sorted(who) for own in task):
        if acting.run(own, functools.partial(_may_bind, own, image, directory)):
            least = Rights(image.uid, image.gid)
            return ([least] if own.capabilities & _CAP_CHOWN else []) + [own], True
    reason = _changed(image, directory)
    if reason:
        raise RestoreConflictError(
            f"the job's users may not bind its socket there as it was (user {image.uid}, group {image.gid}), and {reason}",
            where=paths.shown(image.address),
            hint="give them access to its directory, or put everything back as it was",
        )
    uid, gid = directory.stat.st_uid, directory.stat.st_gid
    return [Rights(uid, gid, (), 0 if uid else acting.own.capabilities)], False


def _may_bind(own: Rights, image: files_pb2.UnixSocket, directory: _Directory) -> bool:
    """With these rights: whether its node can be made where it was, for its owner."""
    try:
        reached = descriptors.open_without_symlinks(directory.path, O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        if not os.path.samestat(os.fstat(reached), directory.stat):
            return False
    finally:
        os.close(reached)
    if not rights.may_access(directory.fd, os.W_OK | os.X_OK):
        return False
    if not image.HasField("bound"):
        return True
    node, sticky = directory.node(), directory.stat.st_mode & stat.S_ISVTX
    owners = {directory.stat.st_uid, node.st_uid} if node is not None else {own.uid}
    if sticky and own.uid not in owners and not own.capabilities & _CAP_FOWNER:
        return False
    if node is not None and not _may_connect(directory):
        return False
    gives = own.capabilities & _CAP_CHOWN
    groups = {own.gid, *own.groups}
    if directory.stat.st_mode & stat.S_ISGID:
        groups.add(directory.stat.st_gid)
    return bool(gives or (own.uid == image.uid and image.gid in groups))


def _may_connect(directory: _Directory) -> bool:
    """Whether the node that is there may be asked if anybody serves it still (unix(7): write permission)."""
    try:
        fd = os.open(directory.name, O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory.fd)
    except OSError:
        return False
    try:
        return rights.may_access(fd, os.W_OK)
    finally:
        os.close(fd)


def _changed(image: files_pb2.UnixSocket, directory: _Directory) -> str:
    """Why the exception does not hold for a socket, as a clause; "" if it does."""
    if not image.HasField("bound"):
        return "it has no node any more"
    try:
        fd = os.open(directory.name, O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory.fd)
    except OSError:
        return "its node is gone"
    try:
        if changed := proof.changed_rights(image.bound, fd):
            return f"what is there {changed}"
        if proof.compare(image.bound, fd) is not proof.Sameness.SAME and not proof.is_marked(
            fd, image.origin
        ):
            return "nothing proves that what is there is its node"
    finally:
        os.close(fd)
    if not _is_settled(directory.path, directory.stat.st_uid):
        return "others than its directory's owner can rearrange the directories above it"
    return ""


def _is_settled(path: bytes, owner: int) -> bool:
    """Whether only root and that owner can rename what is along a path: bind(2) will follow it with his rights."""
    while True:
        state = os.lstat(path)
        if state.st_uid not in {0, owner} or (state.st_mode & 0o022 and not state.st_mode & stat.S_ISVTX):
            return False
        if path in {b"/", b""}:
            return True
        path = os.path.dirname(path)


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
    if not stat.S_ISSOCK(node.st_mode):
        raise _something_else(address)
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
        "another program serves the job's socket",
        where=paths.shown(address),
        hint="end it, or move its socket",
    )


def _something_else(address: bytes) -> RestoreConflictError:
    return RestoreConflictError(
        "there is something else where the job's socket was", where=paths.shown(address), hint="move it away"
    )


def _node_of(sock: socket.socket, image: files_pb2.UnixSocket, directory: _Directory) -> int:
    """An O_PATH descriptor of the node that a socket was bound to just now.

    Raises:
        RestoreConflictError: somebody has put something else there.
    """
    info = sockdiag.unix_sockets().get(os.fstat(sock.fileno()).st_ino & _INO_MASK)
    try:
        fd = os.open(directory.name, O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory.fd)
        node = os.fstat(fd)
        if info is not None and stat.S_ISSOCK(node.st_mode) and info.vfs_ino == node.st_ino & _INO_MASK:
            return fd
        os.close(fd)
    except FileNotFoundError:
        pass
    raise RestoreConflictError(
        "somebody has put another file where the job's socket was bound just now",
        where=paths.shown(image.address),
        hint="see who writes into that directory",
    )
