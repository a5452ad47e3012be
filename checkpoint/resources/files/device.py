"""Character devices that hold no state of their own: null, zero, full, random, urandom.

Everything else is refused by name: what a device file means is known to its driver only.
"""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

from checkpoint.kernel import distant
from checkpoint.resources import authority, nameless, paths
from checkpoint.resources.files import kind
from snapshotter.base.errors import Finding, RestoreConflictError

if TYPE_CHECKING:
    from checkpoint.resources.files.dumping import FilesDump
    from checkpoint.resources.files.kind import Seen
    from checkpoint.resources.files.opening import Opening
    from images import files_pb2

STATELESS = {
    os.makedev(1, minor): name
    for minor, name in {3: "null", 5: "zero", 7: "full", 8: "random", 9: "urandom"}.items()
}
_KNOWN = {os.makedev(10, 229): "FUSE", os.makedev(10, 200): "tun/tap", os.makedev(10, 232): "KVM"}


class DeviceKind(kind.Kind):
    field = "device"

    def claims(self, seen: Seen) -> bool:
        return (stat.S_ISCHR(seen.stat.st_mode) or stat.S_ISBLK(seen.stat.st_mode)) and not seen.path_only

    def refusal(self, seen: Seen) -> Finding | None:
        rdev = seen.stat.st_rdev
        numbers = f"{os.major(rdev)}:{os.minor(rdev)}"
        if stat.S_ISBLK(seen.stat.st_mode):
            return Finding(seen.pid, seen.where, f"is block device {numbers}", "close it first")
        if rdev not in STATELESS:
            name = _KNOWN.get(rdev, "a")
            return Finding(
                seen.pid,
                seen.where,
                f"is {name} device {numbers}, whose state only its driver knows",
                "close it first",
            )
        if not _leads_to_device(seen.path, rdev) and not _is_deleted(seen):
            return Finding(seen.pid, seen.where, f"the path does not lead to device {numbers} from here")
        return None

    def dump(self, job: FilesDump, seen: Seen, description: files_pb2.Description) -> None:
        description.device.identity.CopyFrom(kind.identity_of(seen))
        description.device.identity.deleted = _is_deleted(seen)
        description.device.rdev = seen.stat.st_rdev

    def check(self, opening: Opening, description: files_pb2.Description) -> None:
        device = description.device
        if device.rdev not in STATELESS:
            raise RestoreConflictError(
                "is no device of the memory driver's", where=paths.shown(device.identity.path)
            )
        if device.identity.deleted:
            nameless.make(opening.ctx, device.identity, device.rdev)
        else:
            # Whichever node it is: all of one number are the same device.
            fd = paths.locate(device.identity, same_inode=False, rdev=device.rdev)
            who = opening.ctx.holders.of_description(description.id)
            access = authority.access_of(description.flags)
            opening.keep(
                description, authority.judged(opening.ctx, fd, device.identity, who, access, proven=True)
            )

    def open(self, opening: Opening, description: files_pb2.Description) -> int:
        device = description.device
        if device.identity.deleted:
            node = nameless.make(opening.ctx, device.identity, device.rdev)
            return paths.reopen(node, description.flags, paths.shown(device.identity.path))
        return opening.open_judged(description, paths.shown(device.identity.path))


def _is_deleted(seen: Seen) -> bool:
    return seen.stat.st_nlink == 0 and seen.link.endswith(kind.DELETED)


def _leads_to_device(path: bytes, rdev: int) -> bool:
    try:
        now = distant.stat(path)
    except OSError:
        return False
    return stat.S_ISCHR(now.st_mode) and now.st_rdev == rdev


KIND = DeviceKind()
