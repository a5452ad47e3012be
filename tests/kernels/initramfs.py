"""The guest's first files: an initramfs that mounts this machine's root through 9p, read-only, with RAM on top."""

from __future__ import annotations

import lzma
import pathlib
import re
import shlex
from collections.abc import Mapping, Sequence

MODULES = (
    "virtio_pci",
    "virtio_console",
    "9pnet_virtio",
    "9p",
    "overlay",
    "virtio_rng",
    "unix_diag",
    "tcp_diag",
    "udp_diag",
)

INIT = r"""#!/busybox sh
/busybox mkdir -p /bin /dev /proc /host /ram /new; /busybox --install -s /bin; export PATH=/bin
mount -t proc proc /proc; mount -t devtmpfs dev /dev
for module in /modules/*; do insmod $module; done 2>/dev/null
echo 3 >/proc/sys/kernel/printk
mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000,cache=loose,ro host /host || reboot -f
mount -t tmpfs -o size=90% ram /ram; mkdir /ram/upper /ram/work
mount -t overlay -o lowerdir=/host,upperdir=/ram/upper,workdir=/ram/work root /new
mount -t tmpfs -o mode=1777 tmp /new/tmp
[ -z "$(cat /keep)" ] || { mkdir -p /new$(cat /keep); mount --bind /host$(cat /keep) /new$(cat /keep); }
mount -t tmpfs -o mode=755 run /new/run; mkdir /new/run/guest; cp /busybox /second /job /new/run/guest
umount /proc; mount --move /dev /new/dev
exec switch_root /new /run/guest/busybox sh /run/guest/second
"""
# Descriptors 1 and 2 of the job are FIFOs, so that it has no terminal and the two do not mix.
SECOND = r"""b=/run/guest/busybox
$b mount -t proc proc /proc; $b mount -t sysfs sys /sys; $b mkdir -p /dev/pts /dev/shm
$b mount -t devpts -o mode=620,ptmxmode=666 pts /dev/pts; $b mount -t tmpfs -o mode=1777 shm /dev/shm
$b mount -t cgroup2 cgroup /sys/fs/cgroup; $b ip link set lo up; $b hostname guest
$b ln -s /proc/self/fd /dev/fd
port() { for p in /sys/class/virtio-ports/*; do [ "$($b cat $p/name)" = $1 ] && echo /dev/${p##*/}; done; }
$b mkfifo /run/guest/out /run/guest/err
$b cat /run/guest/out >$(port out) & out=$!
$b cat /run/guest/err >$(port err) & err=$!
$b setsid /bin/sh /run/guest/job </dev/null >/run/guest/out 2>/run/guest/err; status=$?
for i in 1 2 3 4 5 6 7 8 9 10; do [ -d /proc/$out ] || [ -d /proc/$err ] || break; $b usleep 100000; done
echo $status >$(port status); $b usleep 100000; $b reboot -f
"""


class Archive:
    """A cpio archive in the "newc" format (Documentation/driver-api/early-userspace/buffer-format.rst)."""

    def __init__(self) -> None:
        self.data = bytearray()

    def add(self, name: str, content: bytes = b"", mode: int = 0o100755) -> None:
        """One entry; a directory is one with mode 0o40755."""
        encoded = name.encode() + b"\0"
        fields = (len(self.data), mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(encoded), 0)
        for part in (b"070701" + b"".join(b"%08X" % field for field in fields) + encoded, content):
            self.data += part
            self.data += b"\0" * (-len(self.data) % 4)


def _modules(folder: pathlib.Path) -> list[tuple[str, bytes]]:
    """MODULES and those they need, in the order of loading; one that is not there is built in."""
    files = {re.sub(r"\.ko.*", "", path.name).replace("-", "_"): path for path in folder.rglob("*.ko*")}
    found: dict[str, bytes] = {}

    def add(name: str) -> None:
        path = files.get(name.replace("-", "_"))
        if path is None or name in found:
            return
        content = path.read_bytes()
        if path.suffix == ".xz":
            content = lzma.decompress(content)
        depends = re.search(rb"\0depends=([^\0]*)", content)
        for needed in depends[1].decode().split(",") if depends else []:
            add(needed)
        found[name] = content

    for name in MODULES:
        add(name)
    return list(found.items())


def build(
    modules: pathlib.Path,
    busybox: pathlib.Path,
    command: Sequence[str],
    environment: Mapping[str, str],
    folder: str,
) -> bytes:
    """An archive that runs `command` in `folder` and says its exit status on the port "status"."""
    archive = Archive()
    for name in ("modules", "proc", "dev"):
        archive.add(name, mode=0o40755)
    archive.add("busybox", busybox.read_bytes())
    for number, (name, content) in enumerate(_modules(modules)):
        archive.add(f"modules/{number:03d}-{name}.ko", content)
    archive.add("init", INIT.encode())
    archive.add("second", SECOND.encode())
    # A tmpfs hides the host's /tmp; a checkout below it must stay visible.
    archive.add("keep", (folder if folder.startswith("/tmp/") else "").encode())
    lines = [f"export {name}={shlex.quote(value)}\n" for name, value in environment.items()]
    lines += [f"cd {shlex.quote(folder)} || exit 126\n", f"exec {shlex.join(command)}\n"]
    archive.add("job", "".join(lines).encode())
    archive.add("TRAILER!!!", mode=0)
    return bytes(archive.data)
