"""Keyrings of a task: which session keyring it has, and that the keys in its own keyrings are not kept.

A job comes back with a new session keyring, which its processes share (assembly.py). A thread that had none of its own, but its
user's default one, joins that again; a job's own one is linked to the user's keyring again, as login programs do it. Keys cannot be read
by another than who holds them, some by nobody: those in session, process and thread keyrings are named in warnings.

Nothing is asked that would make a keyring in the job. To ask for the session keyring of a task that has none gives it one
(lookup_user_key in security/keys/process_keys.c), so what is asked first is whether the user's default one is what it would find, which it
does if it has none of its own. That default must exist for this; `prepare` has it made by a thread of snap's, before the job is
touched. Sources: keyrings(7), session-keyring(7), keyctl(2), request_key(2).
"""

from __future__ import annotations

import errno
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from checkpoint.kernel import sys as ksys
from images import task_pb2

if TYPE_CHECKING:
    from checkpoint.parasite import Batch, Buffer, Ref, RemoteTask, Results

_THREAD, _PROCESS, _SESSION, _USER, _USER_SESSION = -1, -2, -3, -4, -5
_GET_KEYRING_ID, _JOIN_SESSION_KEYRING, _DESCRIBE, _LINK, _READ, _SET_REQKEY_KEYRING = 0, 1, 6, 8, 11, 14
_NO_CHANGE = -1
_KEYS_BYTES, _NAME_BYTES = 1024, 256

_uids: set[int] = set()
"""Real user ids of the processes that were looked at."""
_prepared: set[int] = set()
"""Those whose default keyrings exist."""


def look(uid: int) -> None:
    """Note the real user id of a process."""
    _uids.add(uid)


def prepare() -> None:
    """Make sure that the default keyrings of the job's users exist: they do if any program of theirs has ever asked."""

    def make() -> None:
        # Of this thread alone, which ends: the bare system call (setresuid(2), "C library/kernel differences").
        for uid in sorted(_uids - _prepared):
            try:
                ksys.syscall("setresuid", uid, -1, -1)
                ksys.syscall("keyctl", _GET_KEYRING_ID, _USER_SESSION, 0)
            except OSError:
                continue
            _prepared.add(uid)

    if _uids - _prepared:
        making = threading.Thread(target=make)
        making.start()
        making.join()


@dataclass(frozen=True, slots=True)
class Asked:
    """What each thread is asked."""

    uid: int
    default: Ref
    thread: Ref
    process: Ref
    destination: Ref


def ask(batch: Batch, uid: int) -> Asked:
    """Add the questions to the batch of a thread; none of them makes a keyring.

    Args:
        batch: where to.
        uid: real user id of its process.
    """
    return Asked(
        uid,
        batch.call("request_key", b"keyring\0", b"_uid_ses.%d\0" % uid, 0, 0, check=False),
        batch.call("keyctl", _READ, _THREAD, 0, 0, check=False),
        batch.call("keyctl", _READ, _PROCESS, 0, 0, check=False),
        batch.call("keyctl", _SET_REQKEY_KEYRING, _NO_CHANGE, check=False),
    )


def has_own_session(results: Results, asked: Asked) -> bool:
    """The session keyring is neither missing nor the user's default one."""
    return asked.uid in _prepared and results[asked.default] == -errno.ENOKEY


@dataclass(frozen=True, slots=True)
class Session:
    """A session keyring of a process's own."""

    name: str
    nr_keys: int
    """Without the user's default keyrings."""
    has_user_keyring: bool


@dataclass(frozen=True, slots=True)
class _AskedSession:
    keys: Buffer
    size: Ref
    text: Buffer
    described: Ref
    user: Ref
    user_session: Ref


def read_session(remote: RemoteTask) -> Session | None:
    """What a process has in the session keyring of its own; None: it may not read it. Only for those that have one."""
    batch = remote.batch()
    keys, text = batch.buffer(_KEYS_BYTES), batch.buffer(_NAME_BYTES)
    asked = _AskedSession(
        keys,
        batch.call("keyctl", _READ, _SESSION, keys, _KEYS_BYTES, check=False),
        text,
        batch.call("keyctl", _DESCRIBE, _SESSION, text, _NAME_BYTES, check=False),
        batch.call("keyctl", _GET_KEYRING_ID, _USER, 0, check=False),
        batch.call("keyctl", _GET_KEYRING_ID, _USER_SESSION, 0, check=False),
    )
    results = remote.run(batch)
    size = results[asked.size]
    if size < 0:
        return None
    shown = results.bytes(asked.keys)[: min(size, _KEYS_BYTES) & ~3]
    serials = set(struct.unpack(f"<{len(shown) // 4}i", shown))
    defaults = serials & {results[asked.user], results[asked.user_session]}
    # type;uid;gid;permissions;description
    text_of_it = results.bytes(asked.text).split(b"\0")[0] if results[asked.described] > 0 else b""
    return Session(
        text_of_it.split(b";", 4)[-1].decode("utf-8", "replace"),
        size // 4 - len(defaults),
        results[asked.user] in serials,
    )


def answer(results: Results, asked: Asked, thread: task_pb2.Thread) -> None:
    """Put the answers into the message of a thread."""
    if thread.credentials.ruid != asked.uid:
        return  # its default keyring has another name: it stays with that of the job
    if results[asked.default] > 0:
        thread.session_keyring = task_pb2.Thread.DEFAULT
    elif has_own_session(results, asked):
        thread.session_keyring = task_pb2.Thread.OWN
    thread.request_keyring = max(results[asked.destination], 0)


def warn(
    pid: int, given: list[tuple[int, Results, Asked]], session: Session | None, tell: Callable[[str], None]
) -> None:
    """Name the keyrings of a process whose keys are lost.

    Args:
        pid: the process.
        given: tid, results, questions of each thread, the leader first.
        session: what `read_session` gave.
        tell: takes a warning.
    """
    if session is not None and session.nr_keys:
        tell(
            f"task {pid}: its session keyring {session.name!r} holds {_keys(session.nr_keys)} not kept; a rollback gives it a new one"
        )
    nr_bytes = max(results[asked.process] for _, results, asked in given)
    if nr_bytes > 0:
        tell(f"task {pid}: its process keyring holds {_keys(nr_bytes // 4)} not kept")
    for tid, results, asked in given:
        if results[asked.thread] > 0:
            tell(f"task {tid}: its thread keyring holds {_keys(results[asked.thread] // 4)} not kept")


def _keys(count: int) -> str:
    return "1 key, which is" if count == 1 else f"{count} keys, which are"


def restore(batch: Batch, thread: task_pb2.Thread) -> None:
    """By the thread itself, with its credentials: keyrings are its user's."""
    credentials = thread.credentials
    if thread.session_keyring == task_pb2.Thread.DEFAULT and credentials.fsuid == credentials.ruid:
        batch.call("keyctl", _GET_KEYRING_ID, _USER_SESSION, 0, check=False)
        name = b"_uid_ses.%d\0" % credentials.ruid
        batch.call("keyctl", _JOIN_SESSION_KEYRING, name, check=False)
    elif thread.links_user_keyring:
        batch.call("keyctl", _LINK, _USER, _SESSION, check=False)
    if thread.request_keyring:
        batch.call("keyctl", _SET_REQKEY_KEYRING, thread.request_keyring, check=False)
