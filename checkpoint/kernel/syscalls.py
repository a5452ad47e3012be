"""Numbers of the x86-64 system calls by name: python-ptrace's table and those that came after it."""

from __future__ import annotations

from ptrace.syscall.linux.x86_64 import SYSCALL_NAMES

_NEWER = {
    "close_range": 436,
    "openat2": 437,
    "pidfd_getfd": 438,
    "faccessat2": 439,
    "process_madvise": 440,
    "epoll_pwait2": 441,
    "mount_setattr": 442,
    "quotactl_fd": 443,
    "landlock_create_ruleset": 444,
    "landlock_add_rule": 445,
    "landlock_restrict_self": 446,
    "memfd_secret": 447,
    "process_mrelease": 448,
    "futex_waitv": 449,
    "set_mempolicy_home_node": 450,
    "cachestat": 451,
    "fchmodat2": 452,
    "map_shadow_stack": 453,
    "futex_wake": 454,
    "futex_wait": 455,
    "futex_requeue": 456,
    "statmount": 457,
    "listmount": 458,
    "lsm_get_self_attr": 459,
    "lsm_set_self_attr": 460,
    "lsm_list_modules": 461,
    "mseal": 462,
    "setxattrat": 463,
    "getxattrat": 464,
    "listxattrat": 465,
    "removexattrat": 466,
    "open_tree_attr": 467,
}

NUMBERS: dict[str, int] = {
    # 512 and up are x32's twins of the same names
    **{name: nr for nr, name in SYSCALL_NAMES.items() if nr < 512},
    "timerfd_create": 283,
    "rseq": 334,
    "pidfd_send_signal": 424,
    "io_uring_setup": 425,
    "io_uring_enter": 426,
    "io_uring_register": 427,
    "pidfd_open": 434,
    "clone3": 435,
    **_NEWER,
}
NAMES: dict[int, str] = {nr: name for name, nr in NUMBERS.items()}


def number(name: str) -> int:
    """The number of system call `name`; ValueError when there is none of that name."""
    try:
        return NUMBERS[name]
    except KeyError:
        raise ValueError(f"x86-64 has no system call {name!r}") from None


def name(nr: int) -> str:
    """The name of a number, or "syscall NR"."""
    return NAMES.get(nr, f"syscall {nr}")
