"""inotify(7): the watches, with their numbers and masks.

A watch is of an inode; its path is found through the file handle that fdinfo shows, and must lead to that inode.
Restore counts the watch numbers up as the job had: they are given one after the other, and cannot be
chosen. Events that were queued at the dump cannot be put back; a warning says so.

Refused: a watch of a file that no path leads to (deleted), or on a file system without handles.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from checkpoint.kernel import descriptors, distant
from checkpoint.kernel.fdinfo import WatchLine
from checkpoint.resources import authority, paths, proof
from checkpoint.resources.files import kind
from images import common_pb2
from snapshotter.base.errors import Finding, SnapshotterError, UnsupportedError, wrap_os_error

if TYPE_CHECKING:
    from checkpoint.resources.files.dumping import FilesDump
    from checkpoint.resources.files.kind import Seen
    from checkpoint.resources.files.opening import Opening
    from images import files_pb2

_WD_MAX = 1 << 20
_IN_UNMOUNT = 0x2000
_DRAIN_EVERY = 4096
_ADD_FLAGS = 0x33000000
"""IN_ONLYDIR, IN_DONT_FOLLOW, IN_MASK_CREATE, IN_MASK_ADD: how to add a watch, no part of it."""


class InotifyKind(kind.Kind):
    field = "inotify"

    def claims(self, seen: Seen) -> bool:
        return seen.anonymous(b"inotify")

    def refusal(self, seen: Seen) -> Finding | None:
        for watch in seen.info.inotify:
            if watch.wd > _WD_MAX:
                return Finding(
                    seen.pid, seen.where, f"is an inotify instance that has used {watch.wd} watches"
                )
            if _path_of(watch) is None:
                return Finding(
                    seen.pid,
                    seen.where,
                    f"is an inotify instance with a watch ({watch.wd}) of a file without a path (inode {watch.ino})",
                    "let the program remove that watch",
                )
        return None

    def dump(self, job: FilesDump, seen: Seen, description: files_pb2.Description) -> None:
        description.inotify.SetInParent()
        for watch in seen.info.inotify:
            path = _path_of(watch)
            if path is None:
                finding = Finding(seen.pid, seen.where, f"watches a file without a path (inode {watch.ino})")
                raise UnsupportedError(finding.what, where=finding.where, findings=(finding,))
            description.inotify.watches.add(wd=watch.wd, mask=watch.mask, file=_identity_of(path))
        with job.borrow(seen) as fd:
            if descriptors.nr_readable(fd):
                job.ctx.warn(
                    f"task {seen.pid}, {seen.where}: inotify events that were not read yet are not saved"
                )

    def check(self, opening: Opening, description: files_pb2.Description) -> None:
        """The whole instance is made now: what is watched is then what was judged."""
        if description.id not in opening.early:
            opening.early[description.id] = self._make(opening, description)

    def open(self, opening: Opening, description: files_pb2.Description) -> int:
        fd = opening.early.pop(description.id)
        _drain(fd)
        return fd

    @staticmethod
    def _make(opening: Opening, description: files_pb2.Description) -> int:
        who = opening.ctx.holders.of_description(description.id)
        fd = descriptors.inotify_init(os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            reached = 0
            for watch in sorted(description.inotify.watches, key=lambda watch: watch.wd):
                if not reached < watch.wd <= _WD_MAX:
                    raise SnapshotterError(f"a watch with the number {watch.wd}", where="inotify")
                while reached < watch.wd - 1:
                    reached = descriptors.inotify_add_watch(fd, b"/", _IN_UNMOUNT)
                    descriptors.inotify_rm_watch(fd, reached)
                    if reached % _DRAIN_EVERY == 0:
                        _drain(fd)
                _drain(fd)
                # inotify_add_watch(2) asks for read permission.
                place = authority.locate(opening.ctx, watch.file, who, os.R_OK)
                try:
                    reached = descriptors.inotify_add_watch(
                        fd, b"/proc/self/fd/%d" % place.fd, watch.mask & ~_ADD_FLAGS
                    )
                finally:
                    place.close()
                if reached != watch.wd:
                    raise SnapshotterError(
                        f"watch {watch.wd} became {reached}", where=paths.shown(watch.file.path)
                    )
        except BaseException as error:
            os.close(fd)
            if isinstance(error, OSError):
                raise wrap_os_error(error, "cannot watch it again", where="inotify") from error
            raise
        return fd


def _identity_of(path: bytes) -> common_pb2.FileIdentity:
    if distant.is_distant(path):
        there = distant.lstat(path)
        return common_pb2.FileIdentity(path=path, dev=there.st_dev, ino=there.st_ino, mode=there.st_mode)
    fd = paths.find(path)
    try:
        now = os.fstat(fd)
        identity = common_pb2.FileIdentity(path=path, dev=now.st_dev, ino=now.st_ino, mode=now.st_mode)
        proof.record(identity, now, b"/proc/self/fd/%d" % fd)
        return identity
    finally:
        os.close(fd)


def _drain(fd: int) -> None:
    with contextlib.suppress(BlockingIOError):
        while os.read(fd, 1 << 16):
            pass


def _path_of(watch: WatchLine) -> bytes | None:
    """Where the watched inode is, if a path leads there."""
    if not watch.handle:
        return None
    for mount in _mounts(watch.dev):
        try:
            path = distant.path_of_handle(mount, watch.handle_type, watch.handle)
            now = distant.lstat(path)
        except OSError:
            continue
        if now.st_ino == watch.ino:
            return path
    return None


def _mounts(dev: int) -> list[bytes]:
    """Mount points of a file system, by device number."""
    wanted = b"%d:%d" % (os.major(dev), os.minor(dev))
    found = []
    with open("/proc/self/mountinfo", "rb") as file:
        for line in file:
            words = line.split()
            if words[2] == wanted:
                found.append(words[4].decode("unicode_escape").encode("latin-1"))
    return found


KIND = InotifyKind()
