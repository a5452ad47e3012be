"""Bytes of an image <-> its protobuf message, with every bound checked before it costs memory.

Owns the table from image name to message type, the format versions and the size limits. An image is
parsed as hostile input: a name, version, size or value that this version does not know is refused with
VerificationError and never guessed. What the values mean is images/validate.py's; FORMAT.md has it all.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from images import files_pb2, manifest_pb2, mm_pb2, task_pb2, validate
from snapshotter.base.errors import UnsupportedError, VerificationError

FORMAT_VERSION = 1
"""Of every kind of image but those that have a number of their own."""

MIB = 1 << 20
MAX_BYTES = 256 * MIB
"""What a store takes for all images of a point together (store/FORMAT.md), so no image can be larger."""


@dataclass(frozen=True)
class Kind:
    """One kind of image: its names, its message, the largest one that is parsed."""

    title: str
    names: re.Pattern[str]
    message: type[Message]
    max_bytes: int
    version: int = FORMAT_VERSION
    """The newest; all from 1 on are read."""
    needs: Callable[[Message], int] = lambda _message: FORMAT_VERSION
    """The oldest version that can say what is in a message: that one is written."""


_NUMBER = r"(0|[1-9][0-9]{0,9})"

KINDS: tuple[Kind, ...] = (
    Kind("manifest", re.compile(r"manifest"), manifest_pb2.Manifest, 16 * MIB),
    Kind(
        "process",
        re.compile(rf"process/{_NUMBER}"),
        task_pb2.Process,
        MAX_BYTES,
        validate.PROCESS_SHARES,
        validate.process_version,
    ),
    Kind("mm", re.compile(rf"mm/{_NUMBER}"), mm_pb2.Mm, MAX_BYTES, validate.MM_LOCKS, validate.mm_version),
    Kind("shmem", re.compile(rf"shmem/{_NUMBER}"), mm_pb2.Shmem, MIB),
    Kind(
        "files",
        re.compile(r"files"),
        files_pb2.Files,
        MAX_BYTES,
        validate.FILES_SOCKET_OWNERS,
        validate.files_version,
    ),
    Kind("fdtable", re.compile(rf"fdtable/{_NUMBER}"), files_pb2.FdTable, 64 * MIB),
)
"""Every kind there is. 100 threads with 11 KiB of xstate are 1.2 MiB; a queue or a pipe holds at most what
the kernel let it hold. The limits leave a factor of a hundred and keep a forged length from costing more."""

M = TypeVar("M", bound=Message)


def kind_of(name: str) -> Kind:
    """The kind of the image called `name`.

    Raises:
        VerificationError: no kind has such names.
    """
    for kind in KINDS:
        if kind.names.fullmatch(name):
            return kind
    raise VerificationError(
        "unknown kind of image",
        where=f"image {name[:80]!r}",
        hint="the point may have been made by a newer snap; use that version",
    )


def serialise(name: str, message: Message) -> bytes:
    """The bytes of an image; stamps the format version. The same message always gives the same bytes.

    Raises:
        VerificationError: the message is not what an image of this name holds, or breaks a bound (a fault of
            the dump: better found before the point is committed than at its rollback).
        UnsupportedError: the job has more state of this kind than an image may hold.
    """
    kind = kind_of(name)
    if not isinstance(message, kind.message):
        raise VerificationError(
            f"holds a {kind.message.DESCRIPTOR.name}, not a {message.DESCRIPTOR.name}",
            where=f"image {name!r}",
        )
    message.format_version = kind.needs(message)  # type: ignore[attr-defined]
    data = message.SerializeToString(deterministic=True)
    if len(data) > kind.max_bytes:
        raise UnsupportedError(
            f"the {kind.title} image has {len(data)} bytes, more than snap keeps of this kind ({kind.max_bytes})",
            where=f"image {name!r}",
            hint="what waits in pipes and sockets is part of it: take the point when the job has read that",
        )
    validate.check(name, message)
    return data


def parse(name: str, data: bytes) -> Message:
    """The message of an image.

    Raises:
        VerificationError: unknown name or version, too large, not a protobuf message, a value out of bounds.
    """
    kind = kind_of(name)
    _check_size(name, kind, len(data))
    message = kind.message()
    try:
        message.ParseFromString(data)
    except DecodeError as error:
        raise VerificationError(
            "damaged: not a protobuf message of its kind",
            where=f"image {name!r}",
            hint="run `snap verify`; other points may be whole",
        ) from error
    version = int(message.format_version)  # type: ignore[attr-defined]
    if not FORMAT_VERSION <= version <= kind.version:
        known = f"up to {kind.version}" if kind.version > FORMAT_VERSION else str(kind.version)
        raise VerificationError(
            f"format version {version}, this snap reads {known}",
            where=f"image {name!r}",
            hint="use the version of snap that made the point" if version > kind.version else "it is damaged",
        )
    validate.check(name, message)
    return message


def parse_as(name: str, data: bytes, message_type: type[M]) -> M:
    """parse() for a caller that knows the type and wants the type checker to know it too."""
    message = parse(name, data)
    if not isinstance(message, message_type):
        raise VerificationError(
            f"is a {message.DESCRIPTOR.name}, wanted a {message_type.DESCRIPTOR.name}",
            where=f"image {name!r}",
        )
    return message


def _check_size(name: str, kind: Kind, size_bytes: int) -> None:
    if size_bytes > kind.max_bytes:
        raise VerificationError(
            f"{size_bytes} bytes, the limit of a {kind.title} image is {kind.max_bytes}",
            where=f"image {name!r}",
            hint="it is damaged",
        )
