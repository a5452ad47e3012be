"""Debian packages of the kernels and of QEMU: downloaded and unpacked under a cache, none installed.

apt runs with lists, cache and sources of its own, taken from the mirrors that this machine uses already. A folder NAME is
complete once NAME.done exists, so an interrupted download is begun again.
"""

from __future__ import annotations

import fcntl
import pathlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence

CACHE = pathlib.Path.home() / ".cache" / "snap-test-kernels"
SUITES = ("bookworm", "bookworm-security", "bookworm-backports")
NEWER = {"7": (("trixie-backports",), "apt-trixie-backports")}
"""Beginning of a series -> the suites that have it, and the name of their lists here."""
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"


def output(*command: str | pathlib.Path, cwd: pathlib.Path | None = None) -> str:
    """Standard output of a command that must succeed."""
    done = subprocess.run(
        [str(part) for part in command], check=True, stdout=subprocess.PIPE, text=True, cwd=cwd
    )
    return done.stdout


def _mirrors() -> tuple[str, str]:
    """(main archive, security archive) as this machine's own sources have them."""
    lines = output("apt-get", "indextargets", "--format", "$(CODENAME) $(REPO_URI)").split("\n")
    found = dict(line.split() for line in lines if len(line.split()) == 2)
    main = next((uri for name, uri in found.items() if "-" not in name), "http://deb.debian.org/debian")
    security = next(
        (uri for name, uri in found.items() if name.endswith("-security")), f"{main.rstrip('/')}-security"
    )
    return main, security


class Apt:
    """apt-get and apt-cache with a configuration of their own."""

    def __init__(self, folder: pathlib.Path, suites: Sequence[str] = SUITES) -> None:
        self.suite = suites[-1]
        for part in ("lists/partial", "cache/archives/partial"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        main, security = _mirrors()
        sources = [
            f"deb [signed-by={KEYRING}] {security if suite.endswith('-security') else main} {suite} main\n"
            for suite in suites
        ]
        (folder / "sources").write_text("".join(sources))
        self.conf = folder / "apt.conf"
        self.conf.write_text(
            f'Dir::Etc::sourcelist "{folder}/sources"; Dir::Etc::sourceparts "-"; Dir::State::Lists "{folder}/lists";\n'
            f'Dir::Cache "{folder}/cache"; APT::Sandbox::User "root";\n'
        )
        if not (folder / "updated").exists():
            output("apt-get", "-qq", "-c", self.conf, "update")
            (folder / "updated").touch()

    def newest_kernel(self, series: str) -> list[str]:
        """The package of the newest image of a series, such as 6.12, and the parts that it is split into, if any."""
        text = output("apt-cache", "-c", self.conf, "show", "linux-image-amd64")
        images = re.findall(rf"\b(linux-image-{re.escape(series)}\.[\w.+-]+)", text)
        if not images:
            raise SystemExit(f"Debian has no kernel {series} in {self.suite} or before")
        newest = max(images, key=lambda name: [int(number) for number in re.findall(r"\d+", name)])
        parts = re.findall(
            r"\blinux-(?:binary|modules|base)-\d[\w.+-]+",
            output("apt-cache", "-c", self.conf, "show", newest),
        )
        return [newest, *sorted(set(parts))]

    def needed_by(self, package: str) -> list[str]:
        """`package` and what apt would install with it here."""
        text = output(
            "apt-get", "-c", self.conf, "-t", self.suite, "-s", "install", "--no-install-recommends", package
        )
        return re.findall(r"^Inst (\S+)", text, re.MULTILINE)

    def unpack(self, packages: list[str], target: pathlib.Path) -> None:
        """Download packages and unpack them below `target`."""
        with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
            folder = pathlib.Path(scratch)
            output("apt-get", "-qq", "-c", self.conf, "-t", self.suite, "download", *packages, cwd=folder)
            for package in sorted(folder.glob("*.deb")):
                output("dpkg", "-x", package, target)


def _once(name: str, make: Callable[[pathlib.Path], None]) -> pathlib.Path:
    folder = CACHE / name
    done = CACHE / f"{name}.done"
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two at once would unpack over each other
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            done.touch()
    return folder


def kernel(series: str) -> tuple[pathlib.Path, pathlib.Path]:
    """The image of Debian's newest kernel of a series and the folder of its modules."""

    def make(folder: pathlib.Path) -> None:
        suites, cache = next((item for key, item in NEWER.items() if series.startswith(key)), (SUITES, "apt"))
        apt = Apt(CACHE / cache, suites)
        apt.unpack(apt.newest_kernel(series), folder)

    folder = _once(f"linux-{series}", make)
    # Since 7.x the package is split, and its files lie below /usr.
    modules = next(iter([*folder.glob("lib/modules/*"), *folder.glob("usr/lib/modules/*")]))
    return next(iter([*folder.glob("boot/vmlinuz-*"), *modules.glob("vmlinuz")])), modules


def busybox() -> pathlib.Path:
    """A static busybox: the guest's first programs."""
    return (
        _once("busybox", lambda folder: Apt(CACHE / "apt").unpack(["busybox-static"], folder))
        / "bin"
        / "busybox"
    )


def qemu() -> tuple[list[str], dict[str, str]]:
    """The beginning of QEMU's command line and what its environment needs: the machine's own or a downloaded one."""
    installed = shutil.which("qemu-system-x86_64")
    if installed:
        return [installed], {}

    def make(folder: pathlib.Path) -> None:
        apt = Apt(CACHE / "apt")
        apt.unpack(apt.needed_by("qemu-system-x86"), folder)

    folder = _once("qemu", make)
    libraries = folder / "usr" / "lib" / "x86_64-linux-gnu"
    command = [str(folder / "usr/bin/qemu-system-x86_64")]
    command += ["-L", str(folder / "usr/share/qemu"), "-L", str(folder / "usr/share/seabios")]
    environment = {
        "LD_LIBRARY_PATH": f"{libraries}:{folder}/lib/x86_64-linux-gnu",
        "QEMU_MODULE_DIR": str(libraries / "qemu"),
    }
    return command, environment
