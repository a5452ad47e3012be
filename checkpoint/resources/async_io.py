"""Whether a thread has ever used io_uring, which /proc does not show once the ring's descriptor and mapping are gone.

A ring may live on without both (IORING_SETUP_NO_MMAP with IORING_SETUP_REGISTERED_FD_ONLY), and requests of a ring that was closed go
on. So each thread is asked in the batch that it runs anyway; see checkpoint/tracking.md for what follows from the answer.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from checkpoint.parasite import Batch, Ref

_REGISTER_EVENTFD = 4
_USE_REGISTERED_RING = 1 << 31


def ask(batch: Batch) -> Ref:
    """Have a thread say whether it has used io_uring: `was_used` reads the answer. Changes nothing in it.

    The call names a ring by its place among those that the thread has registered, and asks it to register an event descriptor
    from an address that cannot be read. A thread that has not made a ring nor handed a request over since its exec has no such places
    (io_uring_register_get_file and io_eventfd_register in the kernel's io_uring/).
    """
    return batch.call("io_uring_register", 0, _REGISTER_EVENTFD | _USE_REGISTERED_RING, 0, 1, check=False)


def was_used(answer: int) -> bool:
    """EINVAL: never (or a kernel before 6.3, which cannot tell); ENOSYS: there is no io_uring here."""
    return answer not in {-errno.EINVAL, -errno.ENOSYS}


def has_registered_ring(answer: int) -> bool:
    """The thread has a ring in its first place, which neither a descriptor nor a mapping need show. EBADF: it has none there."""
    return was_used(answer) and answer != -errno.EBADF
