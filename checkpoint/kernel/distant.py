"""Files on file systems that may keep a caller waiting for ever: another process asks about them.

Owns which file systems those are, the process that asks (distant_process.py), and the few questions that a take has. A call to a file
server that does not answer (FUSE, NFS, SMB ...) cannot always be ended, not even by SIGKILL: fs/fuse/dev.c,
request_wait_answer(), waits uninterruptibly once the server has read the request. A tracer in such a wait keeps what it traces,
holds its locks, and heeds no signal. So snap never makes such a call: the other process does, and if it does not come back,
snap goes on without it. It ends when the server answers or is gone; it holds nothing.

What is on a local file system is asked directly, which is what nearly every job has. A path is told by the mount that it lies on
(proc_pid_mountinfo(5)); the links of /proc by what they read.

Outside of `asking()` every question is asked directly.
"""

from __future__ import annotations

import array
import contextlib
import marshal
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from checkpoint.kernel import descriptors, distant_process
from snapshotter.base.errors import SnapshotterError

_PROGRAM = Path(distant_process.__file__)
_LOCAL = frozenset(
    b"bcachefs bdev binfmt_misc bpf btrfs cgroup cgroup2 configfs cpuset debugfs devpts devtmpfs ecryptfs efivarfs erofs "
    b"exfat ext2 ext3 ext4 f2fs fusectl hfs hfsplus hugetlbfs iso9660 jfs mqueue msdos nilfs2 nsfs ntfs3 overlay pipefs proc pstore "
    b"ramfs reiserfs rootfs rpc_pipefs securityfs selinuxfs sockfs squashfs sysfs tmpfs tracefs udf ufs vfat xfs zfs".split()
)
"""Nobody but the kernel and its disks answers for these."""
_LENGTH = struct.Struct("=I")
_PATIENCE_S = 30.0
"""How long an answer may take while the job runs."""


class StalledError(SnapshotterError):
    """A file server does not answer."""

    code = "stalled"


class Asking:
    """The questions of one take. Use `asking()`.

    Args:
        left_s: how long an answer may take now.
        note: told what is asked, for whoever has to say what snap waits for.
    """

    def __init__(self, left_s: Callable[[], float], note: Callable[[str], None]) -> None:
        self._left_s = left_s
        self._note = note
        self._mounts = _distant_mounts()
        self.later: list[int] = []
        """Descriptors to close at the end."""
        self._stalled = False
        self._socket: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def is_distant(self, path: bytes) -> bool:
        """Whether a path lies on such a file system, as far as the mounts tell."""
        return any(path == mount or path.startswith(mount + b"/") for mount in self._mounts)

    @property
    def mounts(self) -> tuple[bytes, ...]:
        """Where such file systems are mounted."""
        return self._mounts

    def start(self) -> None:
        """Have the process ready. Not while descriptors of the job's are open here: a child closes its copies before its exec, and we
        wait for that (see `close`).
        """
        if self._mounts and self._process is None:
            self._socket, other_end = socket.socketpair()
            with other_end:
                self._process = subprocess.Popen(
                    [sys.executable, "-I", "-S", str(_PROGRAM)],
                    stdin=other_end.fileno(),
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,
                    cwd="/",
                )

    def ask(self, what: str, path: bytes, shown: bytes, *args: Any) -> tuple[Any, list[int]]:
        """The answer to one question, and descriptors that came with it.

        Raises:
            OSError: the answer is an errno.
            StalledError: there is none in time.
        """
        assert self._socket is not None  # there is a distant mount, so it was started
        question = marshal.dumps((what, path, args))
        text = f"waiting for the file server of {os.fsdecode(shown)!r} ({what})"
        self._note(text)
        limit_s = min(self._left_s(), _PATIENCE_S)
        began = time.monotonic()
        try:
            self._socket.sendall(_LENGTH.pack(len(question)) + question)
            data, fds = self._receive(began + limit_s)
        except (EOFError, ConnectionError) as error:
            raise SnapshotterError("the process that asks file servers has ended; was it killed?") from error
        except TimeoutError:
            self._stalled = True
            raise StalledError(
                f"its file server does not answer: {what} took more than {max(time.monotonic() - began, 0):.1f} s, so the take was "
                "given up and the job goes on",
                where=repr(os.fsdecode(shown)),
                hint="see to the server, or let the job close the file; then take again",
            ) from None
        self._note("")
        ok, answer = marshal.loads(data)  # noqa: S302 - of our own program
        if not ok:
            raise OSError(answer, os.strerror(answer), os.fsdecode(shown))
        return answer, fds

    def _receive(self, deadline: float) -> tuple[bytes, list[int]]:
        assert self._socket is not None
        data, fds = b"", array.array("i")
        wanted = _LENGTH.size
        while len(data) < wanted:
            if not select.select([self._socket], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise TimeoutError
            part, ancillary, _, _ = self._socket.recvmsg(
                1 << 16, socket.CMSG_SPACE(4), socket.MSG_CMSG_CLOEXEC
            )
            for _, _, more in ancillary:
                fds.frombytes(more)
            if not part:
                raise EOFError
            data += part
            if len(data) >= _LENGTH.size:
                wanted = _LENGTH.size + _LENGTH.unpack_from(data)[0]
        return data[_LENGTH.size :], list(fds)

    def close(self) -> None:
        """End the process, if it can end: one that still waits does so when its server answers, and is not waited for."""
        for fd in () if self._stalled else self.later:
            os.close(fd)
        self.later.clear()
        if self._socket is not None and self._process is not None:
            self._socket.close()
            self._process.send_signal(signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=0.05)
            self._process.returncode = self._process.returncode or 0  # init's from here on
            self._socket = self._process = None


def _distant_mounts() -> tuple[bytes, ...]:
    with open("/proc/self/mountinfo", "rb") as file:
        return distant_mounts(file.read())


def distant_mounts(mountinfo: bytes) -> tuple[bytes, ...]:
    """Mount points of file systems that are not local, of /proc/PID/mountinfo (see proc_pid_mountinfo(5))."""
    found = []
    for line in mountinfo.splitlines():
        fields, _, rest = line.partition(b" - ")
        if rest.split()[0].partition(b".")[0] not in _LOCAL:
            place = fields.split()[4]
            for code in (b"\\040", b"\\011", b"\\012", b"\\134"):
                place = place.replace(code, bytes([int(code[1:], 8)]))
            if place != b"/":  # whose server does not answer for "/" has nothing that runs
                found.append(place)
    return tuple(found)


_asking: list[Asking] = []
"""That of the take that this process makes."""


@contextlib.contextmanager
def asking(left_s: Callable[[], float], note: Callable[[str], None]) -> Iterator[Asking]:
    """For the time of the context, questions about distant files are asked by another process."""
    one = Asking(left_s, note)
    one.start()
    _asking.append(one)
    try:
        yield one
    finally:
        _asking.remove(one)
        one.close()


def _asked(path: bytes) -> Asking | None:
    """Who is to ask about a path; None: we ourselves."""
    return next((one for one in _asking if one.is_distant(path)), None)


def is_distant(path: bytes) -> bool:
    """Whether a call about that file could wait for a file server."""
    return _asked(path) is not None


def mounts() -> list[bytes]:
    """Where the file systems are mounted whose servers a call could wait for."""
    return [mount for one in _asking for mount in one.mounts]


# -- questions. `path` is what to ask about; `link`: what it reads, when it is one of the links of /proc ---------------------


def stat(path: str | bytes, link: bytes = b"") -> os.stat_result:
    """stat(2). Raises OSError, StalledError, as all of these."""
    place = os.fsencode(path)
    if (one := _asked(link or place)) is None:
        return os.stat(path)
    return _stat_result(one.ask("stat", place, link or place)[0])


def lstat(path: str | bytes) -> os.stat_result:
    """lstat(2)."""
    place = os.fsencode(path)
    if (one := _asked(place)) is None:
        return os.lstat(path)
    return _stat_result(one.ask("lstat", place, place)[0])


def _stat_result(answer: tuple[tuple[Any, ...], dict[str, Any]]) -> os.stat_result:
    return os.stat_result(*answer)


def filesystem_type(path: str | bytes, link: bytes = b"") -> int:
    """statfs(2)'s f_type. Of a distant file system 0: it is none of those that anybody asks for, and nobody need wait to know."""
    if _asked(link or os.fsencode(path)) is not None:
        return 0
    return descriptors.filesystem_type(path)


def realpath(path: bytes, link: bytes = b"") -> bytes:
    """realpath(3)."""
    place = link or path
    if (one := _asked(place)) is None:
        return os.path.realpath(path)
    return bytes(one.ask("realpath", path, place)[0])


@contextlib.contextmanager
def opened(
    path: str | bytes, link: bytes = b"", *, flags: int = os.O_RDONLY
) -> Iterator[Callable[[int, int], bytes]]:
    """(offset, size) -> bytes of a file, fewer at its end."""
    place = os.fsencode(path)
    one = _asked(link or place)
    if one is not None:
        asked = one
        yield lambda offset, size: bytes(asked.ask("read", place, link or place, flags, offset, size)[0])
        return
    fd = os.open(path, flags | os.O_CLOEXEC)
    try:
        yield lambda offset, size: os.pread(fd, size, offset)
    finally:
        os.close(fd)


def path_of_handle(mount: bytes, handle_type: int, handle: bytes) -> bytes:
    """Where the kernel thinks a file is that has this handle (open_by_handle_at(2)) on the file system of a mount."""
    if (one := _asked(mount)) is not None:
        return bytes(one.ask("path_of_handle", mount, mount, handle_type, handle)[0])
    return distant_process.path_of_handle(mount, handle_type, handle)


def close(fd: int, link: bytes = b"") -> None:
    """Close a descriptor of the job's that was fetched. That of a distant file waits for its server, even for a mere duplicate
    (FUSE_FLUSH): it is closed when the take is over, or, if the server stalls, by the kernel when snap has ended. `link`: what its link in /proc reads, where that is known.
    """
    for one in _asking:
        if one.mounts and one.is_distant(link or os.readlink(b"/proc/self/fd/%d" % fd)):
            one.later.append(fd)
            return
    os.close(fd)


def open_content(path: str | bytes, link: bytes) -> int:
    """A descriptor of ours by which a file can be read without waiting for anybody: of a distant one it is a copy in memory."""
    place = os.fsencode(path)
    if (one := _asked(link)) is None:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    _, fds = one.ask("copy", place, link)
    return int(fds[0])
