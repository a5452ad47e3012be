"""The table of kinds: which module owns a descriptor, and names for those that none does."""

from __future__ import annotations

import stat

from checkpoint.resources.files import (
    device,
    directory,
    epoll,
    eventfd,
    inet,
    inotify,
    pidfd,
    pipe,
    regular,
    signalfd,
    sockets,
    terminal,
    timerfd,
    unixsock,
    uring,
)
from checkpoint.resources.files.kind import Kind, Seen
from snapshotter.base.errors import Finding

KINDS: tuple[Kind, ...] = (
    directory.PATH_ONLY,
    pidfd.KIND,  # before regular files: newer kernels give pidfds a regular inode
    regular.KIND,
    directory.DIRECTORY,
    terminal.KIND,
    device.KIND,
    pipe.KIND,
    eventfd.KIND,
    timerfd.KIND,
    signalfd.KIND,
    epoll.KIND,
    inotify.KIND,
    uring.KIND,
    unixsock.KIND,
    inet.KIND,
)
"""In the order in which they are asked."""

_ANONYMOUS: tuple[Kind, ...] = (
    eventfd.KIND,
    timerfd.KIND,
    signalfd.KIND,
    epoll.KIND,
    inotify.KIND,
    uring.KIND,
    pidfd.KIND,
)
_BY_TYPE: dict[int, tuple[Kind, ...]] = {
    stat.S_IFREG: (directory.PATH_ONLY, pidfd.KIND, regular.KIND),
    stat.S_IFIFO: (directory.PATH_ONLY, pipe.KIND),
    stat.S_IFSOCK: (directory.PATH_ONLY, unixsock.KIND, inet.KIND),
    stat.S_IFCHR: (directory.PATH_ONLY, terminal.KIND, device.KIND),
    0: _ANONYMOUS,
}
"""The frozen window asks only those that can claim a descriptor of this file type; anonymous inodes have none."""

BY_FIELD: dict[str, Kind] = {kind.field: kind for kind in KINDS}

_REASONS = {
    "fanotify": ("is a fanotify group", "close it first"),
    "userfaultfd": ("is a userfaultfd", "close it first"),
    "perf_event": ("is a perf event", "detach perf first"),
    "bpf-prog": ("is a loaded BPF program", "close it first"),
    "bpf-map": ("is a BPF map", "close it first"),
    "bpf_link": ("is a BPF link", "close it first"),
    "kvm-vm": ("is a virtual machine of KVM", "take a snapshot of the guest instead"),
    "kvm-vcpu:0": ("is a virtual CPU of KVM", "take a snapshot of the guest instead"),
    "seccomp notify": ("is a seccomp notifier", "close it first"),
    "fscontext": ("is a half-made mount", "close it first"),
    "mount": ("is a detached mount", "close it first"),
    "sync_file": ("is a fence of a graphics driver", "close it first"),
    "dmabuf": ("is a buffer of a graphics driver", "close it first"),
    "landlock-ruleset": ("is a Landlock rule set", "close it first"),
}


def kind_of(seen: Seen) -> Kind | None:
    """The kind that a descriptor is of, or None."""
    for kind in _BY_TYPE.get(seen.format, KINDS):
        if kind.claims(seen):
            return kind
    return None


def unknown(seen: Seen) -> Finding:
    """What to say of a descriptor that no kind claims."""
    link = seen.link.decode("utf-8", "replace")
    if link.startswith("anon_inode:"):
        name = link.removeprefix("anon_inode:").strip("[]")
        what, hint = _REASONS.get(
            name, (f"is a kernel object that snap does not know ({name})", "close it first")
        )
    elif stat.S_ISSOCK(seen.stat.st_mode):
        name = sockets.protocol_name(seen.pid, seen.fd) or "unknown"
        what, hint = f"is a socket of a kind ({name}) that cannot be dumped", "close it first"
    else:
        what, hint = "is of a type that cannot be dumped", "close it first"
    return Finding(seen.pid, seen.where, what, hint)


def refusal(seen: Seen) -> Finding | None:
    """Why a descriptor cannot be dumped, or None if it can."""
    kind = kind_of(seen)
    return unknown(seen) if kind is None else kind.refusal(seen)
