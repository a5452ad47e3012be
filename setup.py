"""Makes what is generated: protobuf modules, the freestanding blobs and the cffi extension.

Everything is generated beside its source (and git-ignored), so that a checkout, an editable install and a
wheel have the same layout. pyproject.toml holds all that is static.
"""

from __future__ import annotations

import pathlib
import sys
from typing import ClassVar

from setuptools import Command, Distribution, setup
from setuptools.command.build_py import build_py

ROOT = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # the PEP 517 front end does not put the source on the path

from parasite_c.build import build_blobs, build_launcher  # noqa: E402


def generate_messages() -> None:
    """images/*.proto -> images/*_pb2.py and .pyi."""
    import grpc_tools
    from grpc_tools import protoc

    protos = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "images").glob("*.proto"))
    well_known = pathlib.Path(grpc_tools.__file__).parent / "_proto"
    status = protoc.main(
        ["protoc", f"-I{ROOT}", f"-I{well_known}", f"--python_out={ROOT}", f"--pyi_out={ROOT}", *protos]
    )
    if status != 0:
        raise SystemExit(f"protoc failed with status {status} on {', '.join(protos)}")


class Generate(Command):
    """`setup.py generate`: everything but the extension, in place."""

    description = "generate protobuf modules and build the freestanding blobs in place"
    user_options: ClassVar[list[tuple[str, str | None, str]]] = []

    def initialize_options(self) -> None:
        """No options."""

    def finalize_options(self) -> None:
        """No options."""

    def run(self) -> None:
        """Overwrite what was generated before."""
        generate_messages()
        build_blobs()


class BuildPy(build_py):
    """Generates before it looks for what to copy; an editable install runs it too."""

    def run(self) -> None:
        """Generate, then copy as usual."""
        self.run_command("generate")
        # setuptools listed the package data when it was made; the blobs did not exist then.
        self.data_files = self._get_data_files()
        super().run()


class BuildScripts(Distribution().get_command_class("build_scripts")):
    """Compiles the command: no entry point, whose `#!` line could not start Python isolated (launcher.c)."""

    def run(self) -> None:
        """Compile instead of copying."""
        folder = pathlib.Path(self.build_dir)
        folder.mkdir(parents=True, exist_ok=True)
        build_launcher(folder / "snap")
        (folder / "snap").chmod(0o755)


setup(
    cmdclass={"generate": Generate, "build_py": BuildPy, "build_scripts": BuildScripts},
    scripts=["parasite_c/launcher.c"],
    cffi_modules=["parasite_c/build.py:ffibuilder"],
)
