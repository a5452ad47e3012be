"""Which files outside the store a point needs again: for the catalog, which answers without reading images.

Executables, mapped files and open regular files by name. What was deleted or never had a name is in the store itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from store import FileRecord

if TYPE_CHECKING:
    from images.common_pb2 import FileIdentity


def of_images(images: Mapping[str, bytes]) -> tuple[FileRecord, ...]:
    """The files that a point's images (name -> bytes, as the engine dumped them) refer to, each once, by path."""
    found = {_record(identity) for identity in _identities(images) if identity.path and not identity.deleted}
    return tuple(sorted(found, key=lambda record: (record.path, record.dev, record.ino)))


def _identities(images: Mapping[str, bytes]) -> Iterator[FileIdentity]:
    # Parsed plainly: the engine serialised and checked them an instant ago.
    from images import files_pb2, mm_pb2

    for name, data in images.items():
        if name.startswith("mm/"):
            mm = mm_pb2.Mm.FromString(data)
            yield from mm.files
            if not mm.exe_shmem:
                yield mm.exe
        elif name == "files":
            for description in files_pb2.Files.FromString(data).descriptions:
                if description.WhichOneof("kind") == "regular" and not description.regular.shmem:
                    yield description.regular.identity


def _record(identity: FileIdentity) -> FileRecord:
    return FileRecord(
        path=identity.path.decode("utf-8", "backslashreplace"),  # as `snap show` does: the catalog holds text
        dev=identity.dev,
        ino=identity.ino,
        size_bytes=identity.size_bytes,
        mtime_ns=identity.mtime_ns,
        build_id=identity.build_id,
    )
