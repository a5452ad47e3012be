"""Builds the C side: the cffi extension `parasite_c._native`, the parasite blob and the restore stub.

`python -m parasite_c.build` builds everything in place; setup.py uses `ffibuilder` (cffi_modules) and
`build_blobs`. C code joins the extension by being in SOURCES, with its declarations in a *_cdef.h beside it.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent
SOURCES = (
    "native.c",
    "drive.c",
    "frames.c",
    "threads.c",
    "hash.c",
    "pages.c",
    "planes.c",
    "options.c",
    "watch.c",
    "descriptors.c",
)
CODE_SIZE_BYTES = 4096
_PROGRAMS = ("keeper", "finisher", "bystander", "attendant", "watchdog")
"""Small programs of their own, freestanding."""

_BLOB_FLAGS = [
    "-Os",
    "-ffreestanding",
    "-nostdlib",
    "-fPIC",
    "-fno-stack-protector",
    "-fcf-protection=none",
    "-mgeneral-regs-only",
    "-fno-asynchronous-unwind-tables",
    "-fno-jump-tables",
    "-fno-tree-loop-distribute-patterns",
    "-std=gnu11",
    "-Wall",
    "-Wextra",
    "-Werror",
]


class BlobError(Exception):
    """The blob or the stub is not what may be put into a process."""


def _declarations(name: str) -> str:
    """A header as cffi's parser wants it: no comments, no conditionals."""
    text = (HERE / name).read_text()
    return re.sub(r"//[^\n]*", "", text)


def _make_ffibuilder() -> FFI:
    sources = [name for name in SOURCES if (HERE / name).exists()]
    builder = FFI()
    preamble = '#include "native.h"\n'
    builder.cdef(_declarations("protocol.h"))
    builder.cdef(_declarations("attend.h"))
    for name in sources:
        header = name.removesuffix(".c") + "_cdef.h"
        if not (HERE / header).exists():
            continue
        builder.cdef(_declarations(header))
        # cdef headers declare functions and types without including anything: C reads the same text
        preamble += f'#include "{header}"\n' if name != "native.c" else _functions_only(header)
    builder.set_source(
        "parasite_c._native",
        preamble,
        sources=[os.path.relpath(HERE / name, HERE.parent) for name in sources],
        include_dirs=[str(HERE)],
        extra_compile_args=[
            "-O2",
            "-std=gnu11",
            "-Wall",
            "-Wextra",
            "-Wno-missing-field-initializers",
            "-pthread",
        ],
        extra_link_args=["-pthread"],
        py_limited_api=False,  # one name for the module, whoever builds it
    )
    return builder


def _functions_only(header: str) -> str:
    """native_cdef.h without the structs, which native.h has."""
    return re.sub(r"^struct \w+( \{[^}]*\})?;$", "", _declarations(header), flags=re.MULTILINE)


def _run(*command: str | Path) -> str:
    return subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True).stdout


def build_blobs(directory: Path | str = HERE) -> None:
    """Compile blob.bin, stub and the small programs into `directory`. Raises BlobError when a check fails."""
    directory = Path(directory)
    cc = os.environ.get("CC", "gcc")
    scratch = directory / "blob.o"
    elf = directory / "blob.elf.o"
    try:
        _run(cc, *_BLOB_FLAGS, "-c", HERE / "blob.c", "-o", scratch)
        undefined = _run("nm", "-u", scratch).split()
        if undefined:
            raise BlobError(f"blob has undefined symbols: {undefined}")
        _run("ld", "-static", "-nostdlib", "-z", "noexecstack", "-T", HERE / "blob.ld", scratch, "-o", elf)
        if "no relocations" not in _run("readelf", "-rW", elf):
            raise BlobError("blob has relocations")
        sizes = {
            line.split()[0]: int(line.split()[1])
            for line in _run("size", "-A", elf).splitlines()
            if line.startswith(".")
        }
        if sizes.get(".data", 0) or sizes.get(".bss", 0):
            raise BlobError(f"blob has data: {sizes}")
        _run("objcopy", "-O", "binary", "-j", ".text", elf, directory / "blob.bin")
        size = (directory / "blob.bin").stat().st_size
        if size > CODE_SIZE_BYTES:
            raise BlobError(f"blob has {size} bytes, the cap is {CODE_SIZE_BYTES}")
        _run(
            cc, "-static", "-nostdlib", "-nostartfiles", "-Wl,--build-id=none", "-Wl,-z,noexecstack", "-s",
            HERE / "stub.S", "-o", directory / "stub",
        )  # fmt: skip
        for name in _PROGRAMS:
            _build_program(f"{name}.c", directory / f"{name}.bin")
    finally:
        scratch.unlink(missing_ok=True)
        elf.unlink(missing_ok=True)


def _build_program(source: str, target: Path, *options: str) -> None:
    _run(
        os.environ.get("CC", "gcc"), "-O2", "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-static", "-nostdlib",
        "-nostartfiles", "-ffreestanding", "-fno-pic", "-no-pie", "-fno-stack-protector", "-fcf-protection=none",
        "-fno-asynchronous-unwind-tables", "-Wl,--build-id=none", "-Wl,-z,noexecstack", "-s", *options,
        HERE / source, "-o", target,
    )  # fmt: skip


def build_launcher(target: Path) -> None:
    """Compile the command `snap` for the Python that runs this."""
    _build_program(
        "launcher.c", target, f'-DPYTHON="python{sys.version_info.major}.{sys.version_info.minor}"'
    )


ffibuilder = _make_ffibuilder()


def main() -> None:
    """Build everything in place."""
    build_blobs(HERE)
    ffibuilder.compile(tmpdir=str(HERE.parent), verbose="-v" in sys.argv)


if __name__ == "__main__":
    main()
