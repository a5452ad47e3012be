"""Bounds of the values inside an image: what a restore may rely on once an image was parsed.

Pure and cheap. Only what is impossible on any Linux is refused here (a mapping that ends before it starts, registers
of another size, a task outside its tree); what this machine cannot offer is the restore plan's matter.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from google.protobuf.message import Message

from images import common_pb2, files_pb2, manifest_pb2, mm_pb2, task_pb2
from snapshotter.base.errors import VerificationError

PID_MAX = 1 << 22  # PID_MAX_LIMIT of 64-bit kernels
PAGE_SIZE = 4096
NSIG = 64
REGS_SIZE_BYTES = 216  # struct user_regs_struct
SIGINFO_SIZE_BYTES = 128
XSTATE_MAX_BYTES = 1 << 16  # 11,008 with AMX
PATH_MAX_BYTES = 4096
NR_OPEN_MAX = 1 << 30
NR_TASKS_MAX = PID_MAX
_SOCK_DGRAM = 2
_SUN_PATH_BYTES = 108
_IPPROTO_IP, _IPPROTO_IPV6 = 0, 41
_SO_ATTACH_FILTER = (1, 26)
_FILTER_MAX_BYTES = 8 * 4096  # BPF_MAXINSNS
_NO_ID = 0xFFFFFFFF
_SOCKADDR_BYTES = 128  # struct sockaddr_storage
_GROUP_FILTER_BYTES = 144  # struct group_filter without its sources
USER_END = 1 << 57  # five-level page tables
PROCESS_SHARES = 2
"""Version of a Process that says what is shared otherwise than by rule (CLONE_FILES, CLONE_FS, control groups), and policies."""
UTIL_CLAMP_MOST = 1024  # SCHED_CAPACITY_SCALE
MM_LOCKS = 2
"""Version of an Mm with locks that only mappings hold."""
FILES_LEASES = 2
"""Version of Files with leases among the locks."""
FILES_PEERS = 3
"""With who made a unix socket."""
FILES_SOCKET_OWNERS = 4
"""With whose a socket is."""
_LOCKS = frozenset({"FLOCK", "OFDLCK", "LEASE"})
_TABLE = re.compile(r"fdtable/[1-9][0-9]{0,9}")


class _BadValueError(Exception):
    """What is wrong, as a clause; `check` adds where."""


def check(name: str, message: Message) -> None:
    """Refuse a message whose values cannot be those of a Linux job.

    Raises:
        VerificationError: names the image and the value.
    """
    checker = _CHECKERS.get(type(message))
    if checker is None:
        return
    try:
        checker(message)
        _check_number(name, message)
    except _BadValueError as bad:
        raise VerificationError(
            f"damaged: {bad}", where=f"image {name!r}", hint="run `snap verify`; other points may be whole"
        ) from None


def _require(condition: object, clause: str) -> None:
    if not condition:
        raise _BadValueError(clause)


def _check_number(name: str, message: Message) -> None:
    if isinstance(message, task_pb2.Process):
        _require(name == f"process/{message.pid}", f"it is of process {message.pid}")


def _pid(value: int, what: str) -> None:
    _require(0 < value <= PID_MAX, f"{what} {value} is no pid")


def _identity(identity: common_pb2.FileIdentity, what: str) -> None:
    _require(len(identity.path) < PATH_MAX_BYTES + 16, f"{what} has a path of {len(identity.path)} bytes")
    _require(b"\0" not in identity.path, f"{what} has a NUL in its path")
    _require(len(identity.build_id) <= 64, f"{what} has a build id of {len(identity.build_id)} bytes")
    _require(len(identity.handle) <= 128, f"{what} has a handle of {len(identity.handle)} bytes")
    _require(len(identity.acl) <= 64 and len(identity.way) <= 64, f"{what} has digests of no known size")


def _manifest(manifest: manifest_pb2.Manifest) -> None:
    _require(len(manifest.pids) <= NR_TASKS_MAX, f"{len(manifest.pids)} processes")
    _require(len(manifest.unconfined) <= NR_TASKS_MAX, f"{len(manifest.unconfined)} losses")
    for pid in manifest.pids:
        _pid(pid, "a process")
    _require(len(set(manifest.pids)) == len(manifest.pids), "a process is listed twice")
    _require(not manifest.pids or manifest.root_pid == manifest.pids[0], "its root is not the first process")
    _require(manifest.xstate_size_bytes <= XSTATE_MAX_BYTES, f"xstate of {manifest.xstate_size_bytes} bytes")


def _thread(thread: task_pb2.Thread) -> None:
    _pid(thread.tid, "a thread")
    tid = thread.tid
    # A zombie has neither registers nor xstate.
    _require(
        len(thread.regs) in {0, REGS_SIZE_BYTES}, f"thread {tid} has {len(thread.regs)} bytes of registers"
    )
    _require(len(thread.xstate) <= XSTATE_MAX_BYTES, f"thread {tid} has {len(thread.xstate)} bytes of xstate")
    policy = len(thread.memory_policy)
    _require(policy == 0 or 4 <= policy <= 132, f"thread {tid} has a memory policy of {policy} bytes")
    _require(
        thread.store_bypass in {0, 4, 8, 16} and thread.indirect_branch in {0, 4, 8},
        f"thread {tid} has no such guard (PR_SPEC)",
    )
    clamps = max(thread.scheduling.util_min, thread.scheduling.util_max)
    _require(clamps <= UTIL_CLAMP_MOST + 1, f"thread {tid} has a utilization clamp of {clamps - 1}")
    _require(
        thread.scheduling.slice_ns < 1 << 63, f"thread {tid} has a slice of {thread.scheduling.slice_ns} ns"
    )
    _require(
        thread.session_keyring <= 2, f"thread {tid} has a session keyring of kind {thread.session_keyring}"
    )
    _require(thread.mce_kill <= 3, f"thread {tid}: mce_kill {thread.mce_kill}")
    _require(thread.request_keyring <= 7, f"thread {tid} puts keys into keyring {thread.request_keyring}")
    _require(len(thread.loginuid) <= 10, f"thread {tid} has a login uid of {len(thread.loginuid)} bytes")
    _require(len(thread.comm) <= 16, f"thread {tid} has a name of {len(thread.comm)} bytes")
    _require(thread.rseq_size <= PAGE_SIZE, f"thread {tid} has {thread.rseq_size} bytes of rseq")
    _require(len(thread.credentials.groups) <= 65536, f"thread {tid} has too many groups")
    _pending(thread.pending, f"thread {tid}")


def _pending(signals: object, what: str) -> None:
    for signal in signals:  # type: ignore[attr-defined]
        _require(
            len(signal.siginfo) == SIGINFO_SIZE_BYTES, f"{what} has {len(signal.siginfo)} bytes of siginfo"
        )


def process_version(process: Message) -> int:
    """The oldest version of a Process that can say what is in this one."""
    if not isinstance(process, task_pb2.Process):
        return 1
    exceptional = process.fs_of or process.files not in {"", f"fdtable/{process.pid}"}
    policies = process.mce_kill or process.thp_flags or process.autogroup_nice
    return PROCESS_SHARES if exceptional or policies or any(map(_has_its_own, process.threads)) else 1


def _has_its_own(thread: task_pb2.Thread) -> bool:
    """Something that threads mostly have from their process, or nobody has asked for."""
    shares = thread.files or thread.fs_of or thread.HasField("fs") or thread.cgroups or thread.loginuid
    guards = thread.store_bypass or thread.indirect_branch or thread.l1d_flush or thread.cpuid_faults
    hints = thread.memory_policy or thread.slice_extension or thread.io_flusher or thread.mce_kill
    scheduling = thread.scheduling
    return bool(
        shares or guards or hints or scheduling.util_min or scheduling.util_max or scheduling.slice_ns
    )


def _shares(process: task_pb2.Process, tids: set[int]) -> None:
    """What is shared otherwise than by rule."""
    _require(
        process.format_version >= process_version(process), "it shares what its version has no place for"
    )
    _require(-20 <= process.autogroup_nice <= 19, f"autogroup niceness {process.autogroup_nice}")
    _require(process.mce_kill <= 2, f"mce_kill {process.mce_kill}")
    _require(process.fs_of <= PID_MAX and process.fs_of != process.pid, f"fs_of {process.fs_of}")
    firsts = {thread.fs_of for thread in process.threads if thread.fs_of == thread.tid}
    for at, thread in enumerate(process.threads):
        special = bool(thread.files or thread.fs_of or thread.HasField("fs"))
        _require(at or not special, "its first thread does not share with itself")
        _require(not thread.files or _TABLE.fullmatch(thread.files), f"thread {thread.tid} has no such table")
        _require(
            not thread.files or thread.files != process.files, f"thread {thread.tid} shares and does not"
        )
        if not thread.fs_of and not thread.HasField("fs"):
            continue
        _require(thread.fs_of in firsts and thread.fs_of in tids, f"thread {thread.tid} shares with nobody")
        own = thread.fs_of == thread.tid
        _require(thread.HasField("fs") == own, f"thread {thread.tid} has directories that it shares")
        if own:
            _require(thread.fs.umask <= 0o777, f"umask {thread.fs.umask:o}")
            _identity(thread.fs.cwd, "a working directory")
            _identity(thread.fs.root, "a root directory")


def _process(process: task_pb2.Process) -> None:
    _pid(process.pid, "the process")
    pid = process.pid
    _require(0 <= process.ppid <= PID_MAX, f"parent {process.ppid} is no pid")
    _require(0 <= process.pgid <= PID_MAX, f"process group {process.pgid} is no pid")
    _require(0 <= process.sid <= PID_MAX, f"session {process.sid} is no pid")
    _require(process.state in {0, 1, 2}, f"state {process.state} is none")
    _require(len(process.threads) <= NR_TASKS_MAX, f"{len(process.threads)} threads")
    if process.state != task_pb2.Process.ZOMBIE:
        _require(process.threads and process.threads[0].tid == pid, "its first thread is not its leader")
    tids = {thread.tid for thread in process.threads}
    _require(len(tids) == len(process.threads), "a thread is listed twice")
    for thread in process.threads:
        _thread(thread)
    _shares(process, tids)
    for action in process.actions:
        _require(0 < action.signo <= NSIG, f"an action for signal {action.signo}")
    _pending(process.shared_pending, f"process {pid}")
    for itimer in process.itimers:
        _require(itimer.which <= 2, f"an interval timer {itimer.which}")
        _require(itimer.interval_us >= 0 and itimer.value_us >= 0, "an interval timer below zero")
    for timer in process.posix_timers:
        _require(timer.id >= 0, f"a POSIX timer {timer.id}")
        _require(timer.interval_ns >= 0 and timer.value_ns >= 0, f"POSIX timer {timer.id} below zero")
        _require(timer.signo <= NSIG, f"POSIX timer {timer.id} sends signal {timer.signo}")
    for limit in process.rlimits:
        _require(limit.resource < 64, f"a limit of resource {limit.resource}")
    _require(process.umask <= 0o777, f"umask {process.umask:o}")
    _require(len(process.loginuid) <= 10, f"a login uid of {len(process.loginuid)} bytes")
    _require(-1000 <= process.oom_score_adj <= 1000, f"oom_score_adj {process.oom_score_adj}")
    _identity(process.cwd, "the working directory")
    _identity(process.root, "the root directory")


def mm_version(mm: Message) -> int:
    """The oldest version of an Mm that can say what is in this one."""
    return MM_LOCKS if isinstance(mm, mm_pb2.Mm) and mm.locks else 1


def _mm(mm: mm_pb2.Mm) -> None:
    _require(mm.format_version >= mm_version(mm), "locks, which its version has not")
    for lock in mm.locks:
        _require(lock.vma < len(mm.vmas), f"a lock of mapping {lock.vma} of {len(mm.vmas)}")
        _require(lock.lock.kind in {"FLOCK", "OFDLCK"}, "a mapping has a lock of no kind")
        _require(
            lock.lock.to_end or lock.lock.start <= lock.lock.end < 1 << 63, "a lock ends before it starts"
        )
        _require(lock.lock.start < 1 << 63, f"a lock from {lock.lock.start}")
    end = 0
    for vma in mm.vmas:
        where = f"mapping {vma.start:#x}-{vma.end:#x}"
        _require(vma.start < vma.end, f"{where} ends before it starts")
        _require(vma.start >= end, f"{where} overlaps or is out of order")
        _require(vma.start % PAGE_SIZE == 0 and vma.end % PAGE_SIZE == 0, f"{where} is not of whole pages")
        # The vsyscall page is the one mapping of the kernel's half that /proc shows.
        _require(vma.end <= USER_END or vma.kind == mm_pb2.Vma.VSYSCALL, f"{where} is outside user memory")
        _require(vma.offset % PAGE_SIZE == 0, f"{where} has an offset of {vma.offset}")
        if vma.kind in {mm_pb2.Vma.FILE_PRIVATE, mm_pb2.Vma.FILE_SHARED}:
            _require(vma.file < len(mm.files), f"{where} is of file {vma.file} of {len(mm.files)}")
        _require(len(vma.anon_name) <= 80, f"{where} has a name of {len(vma.anon_name)} bytes")
        _require(len(vma.guard_pages) % 2 == 0, f"{where} has an odd list of guard pages")
        end = vma.end
    for identity in mm.files:
        _identity(identity, "a mapped file")
    _identity(mm.exe, "the executable")
    _require(len(mm.auxv) <= PAGE_SIZE, f"an auxiliary vector of {len(mm.auxv)} bytes")


def _shmem(shmem: mm_pb2.Shmem) -> None:
    _require(shmem.kind in {0, 1, 2, 3, 4}, f"shared memory of kind {shmem.kind}")
    if shmem.kind in {mm_pb2.Shmem.NAMED, mm_pb2.Shmem.KEPT}:
        _require(shmem.name.startswith(b"/"), "named shared memory without a path")
    _require(b"\0" not in shmem.name, "a NUL in the name of shared memory")
    _require(len(shmem.origin) <= 64, f"an origin of {len(shmem.origin)} bytes")
    _require(shmem.size_bytes < 1 << 63, f"a size of {shmem.size_bytes} bytes")
    _require(len(shmem.name) <= PATH_MAX_BYTES + 16, f"a name of {len(shmem.name)} bytes")


def files_version(files: Message) -> int:
    """The oldest version of Files that can say what is in this one."""
    if not isinstance(files, files_pb2.Files):
        return 1
    if any(_has_owner(one) for one in files.descriptions):
        return FILES_SOCKET_OWNERS
    if any(one.HasField("unix") and one.unix.HasField("peer") for one in files.descriptions):
        return FILES_PEERS
    locks = (lock for description in files.descriptions for lock in description.locks)
    return FILES_LEASES if any(lock.kind == "LEASE" for lock in locks) else 1


def _has_owner(one: files_pb2.Description) -> bool:
    return (one.HasField("unix") and one.unix.HasField("owner")) or (
        one.HasField("inet") and one.inet.HasField("owner")
    )


def _uring(ring: files_pb2.Uring) -> None:
    for entries, data, size in ((ring.sq_entries, ring.sqes, 64), (ring.cq_entries, ring.cqes, 16)):
        # A power of two; the kernel's own limit is 65536.
        _require(0 < entries <= 65536 and not entries & (entries - 1), f"a ring of {entries} entries")
        _require(len(data) == size * entries, f"{len(data)} bytes in a ring of {entries} entries")
    _require(
        (ring.sq_tail - ring.sq_head) % (1 << 32) <= ring.sq_entries, "a ring with more in it than it holds"
    )
    _require(
        (ring.cq_tail - ring.cq_head) % (1 << 32) <= ring.cq_entries, "a ring with more in it than it holds"
    )


def _files(files: files_pb2.Files) -> None:
    _require(
        files.format_version >= files_version(files),
        "leases, peers or owners of sockets, which its version has not",
    )
    for description in files.descriptions:
        if _has_owner(description):
            owner = (description.unix if description.HasField("unix") else description.inet).owner
            # -1 is no id: fchown(2) would leave the socket root's.
            _require(_NO_ID not in {owner.uid, owner.gid}, "a socket that belongs to user or group -1")
    ids = [description.id for description in files.descriptions]
    _require(len(set(ids)) == len(ids), "a file description is listed twice")
    pipes = {pipe.id for pipe in files.pipes}
    _require(len(pipes) == len(files.pipes), "a pipe is listed twice")
    for pipe in files.pipes:
        _require(len(pipe.data) <= 1 << 31, f"pipe {pipe.id} holds {len(pipe.data)} bytes")
        if pipe.pieces:
            sizes = [piece.size_bytes for piece in pipe.pieces]
            _require(
                all(sizes) and sum(sizes) == len(pipe.data), f"the pieces of pipe {pipe.id} are not its data"
            )
    known = set(ids)
    sockets = {description.unix.ino for description in files.descriptions if description.HasField("unix")}
    for description in files.descriptions:
        for lock in description.locks:
            _require(lock.kind in _LOCKS, f"file description {description.id} has a lock of no kind")
        kind = description.WhichOneof("kind")
        _require(kind is not None, f"file description {description.id} has no kind")
        if kind == "uring":
            _uring(description.uring)
        if kind == "pipe":
            _require(description.pipe.id in pipes, f"file description {description.id} is of an unknown pipe")
        if kind == "epoll":
            for entry in description.epoll.entries:
                _require(
                    entry.target_description in known,
                    f"epoll instance {description.id} watches an unknown file description",
                )
        if kind in {"inet", "unix"}:
            for option in getattr(description, kind).options:
                _require(
                    (option.level, option.name) != _SO_ATTACH_FILTER
                    or (len(option.value) % 8 == 0 and 0 < len(option.value) <= _FILTER_MAX_BYTES),
                    f"socket {description.id} has a filter of {len(option.value)} bytes",
                )
        if kind == "inet":
            for group in description.inet.groups:
                _require(_is_filter(group), f"socket {description.id} is in no such multicast group")
        if kind == "unix":
            peer, address = description.unix.peer_ino, description.unix.address
            _require(
                len(address) <= _SUN_PATH_BYTES and (address.startswith(b"\0") or b"\0" not in address),
                f"socket {description.id} has an address that none can have",
            )
            if peer and description.unix.type == _SOCK_DGRAM:
                _require(peer in sockets, f"datagram socket {description.id} is connected to an unknown one")
            for message in description.unix.queue:
                _require(
                    set(message.descriptions) <= known,
                    f"socket {description.id} passes an unknown descriptor",
                )


def _is_filter(group: files_pb2.MulticastGroup) -> bool:
    if group.level not in {_IPPROTO_IP, _IPPROTO_IPV6} or len(group.filter) < _GROUP_FILTER_BYTES:
        return False
    nr_sources = int.from_bytes(group.filter[_GROUP_FILTER_BYTES - 4 : _GROUP_FILTER_BYTES], "little")
    return len(group.filter) == _GROUP_FILTER_BYTES + nr_sources * _SOCKADDR_BYTES


def _fdtable(table: files_pb2.FdTable) -> None:
    fds = [entry.fd for entry in table.entries]
    _require(len(set(fds)) == len(fds), "a descriptor is listed twice")
    _require(not fds or max(fds) < NR_OPEN_MAX, "a descriptor beyond what the kernel allows")


_CHECKERS: dict[type[Message], Callable[..., None]] = {
    manifest_pb2.Manifest: _manifest,
    task_pb2.Process: _process,
    mm_pb2.Mm: _mm,
    mm_pb2.Shmem: _shmem,
    files_pb2.Files: _files,
    files_pb2.FdTable: _fdtable,
}
