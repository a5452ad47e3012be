"""Whose a socket is: the owner of its inode in sockfs.

The kernel makes it the file system user of whoever calls socket(2), and lets sockets of one owner share a port (SO_REUSEPORT). Owns that
a socket made again belongs to whom it belonged: fchown(2) sets the inode's owner and the kernel's own copy of it (sk_uid; sockfs_setattr
in net/socket.c). It must come before bind(2), which compares it.
"""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING

from images import files_pb2
from snapshotter.base.errors import RestoreConflictError

if TYPE_CHECKING:
    from checkpoint.resources.files.kind import Seen

_Image = files_pb2.UnixSocket | files_pb2.InetSocket
_NOBODY = 65534


def dump(seen: Seen, image: _Image) -> None:
    """Record the owner."""
    image.owner.uid, image.owner.gid = seen.stat.st_uid, seen.stat.st_gid


def check(image: _Image) -> None:
    """Whether snap may give a socket this owner: tried on one of its own.

    Raises:
        RestoreConflictError: no.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        try:
            give(probe.fileno(), image)
        except OSError as error:
            uid, gid = _owner(image)
            raise RestoreConflictError(
                f"a socket of the job belongs to user {uid}, group {gid}, and snap may not give it to them: {error.strerror}",
                where=f"socket {image.ino}",
                hint="run the rollback as root",
            ) from error


def give(fd: int, image: _Image) -> None:
    """Give a new socket the recorded owner. Raises OSError: EPERM without CAP_CHOWN."""
    os.fchown(fd, *_owner(image))


def uid_of(image: _Image) -> int:
    """The user whose socket it is; of a point that does not say, the overflow user, who may do nothing."""
    return _owner(image)[0]


def _owner(image: _Image) -> tuple[int, int]:
    return (image.owner.uid, image.owner.gid) if image.HasField("owner") else (_NOBODY, _NOBODY)
