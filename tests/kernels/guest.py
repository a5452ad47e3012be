"""One run of a guest: QEMU in software emulation, output and exit status over virtio ports."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence

from tests.kernels import initramfs, packages

BOOT = (
    "console=ttyS0 quiet panic=-1 nokaslr mitigations=off tsc=reliable clocksource=tsc random.trust_cpu=on "
    "no_timer_check apparmor=0 audit=0 reboot=t"
)


class GuestError(Exception):
    """The guest ended without an exit status; holds the end of its console."""


def _pump(source: int, sink: int | None, collected: list[bytes]) -> None:
    while data := os.read(source, 1 << 16):
        collected.append(data)
        if sink is not None:
            os.write(sink, data)


def run(
    series: str, command: Sequence[str], environment: Mapping[str, str], seconds: float
) -> tuple[int, str]:
    """Run `command` in this working directory inside Debian's kernel `series`; its exit status and standard output.

    Raises:
        GuestError: no status within `seconds`.
    """
    image, modules = packages.kernel(series)
    busybox, (qemu, qemu_environment) = packages.busybox(), packages.qemu()
    with tempfile.TemporaryDirectory(dir=packages.CACHE) as scratch:
        folder = pathlib.Path(scratch)
        archive = initramfs.build(modules, busybox, command, environment, os.getcwd())
        (folder / "initrd").write_bytes(archive)
        line = [
            *qemu, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-M", "q35",
            "-cpu", "max,la57=off", "-smp", "2", "-m", "2G", "-accel", "tcg,thread=multi,tb-size=256",
            "-kernel", str(image), "-initrd", str(folder / "initrd"),
            "-append", BOOT, "-serial", f"file:{folder}/console",
            "-device", "virtio-serial-pci", "-device", "virtio-rng-pci",
            "-device", "virtio-9p-pci,fsdev=root,mount_tag=host",
            "-fsdev", "local,id=root,path=/,security_model=passthrough,readonly=on,multidevs=remap",
        ]  # fmt: skip
        sinks = {"out": sys.stdout.fileno(), "err": sys.stderr.fileno(), "status": None}
        collected: dict[str, list[bytes]] = {name: [] for name in sinks}
        pipes = {name: os.pipe() for name in sinks}
        for name, (_, write_end) in pipes.items():
            line += ["-chardev", f"file,id={name},path=/dev/fd/{write_end}"]
            line += ["-device", f"virtserialport,chardev={name},name={name}"]
        process = subprocess.Popen(
            line,
            env={**os.environ, **qemu_environment},
            stdin=subprocess.DEVNULL,
            pass_fds=[write_end for _, write_end in pipes.values()],
        )
        pumps = []
        for name, (read_end, write_end) in pipes.items():
            os.close(write_end)
            pumps.append(threading.Thread(target=_pump, args=(read_end, sinks[name], collected[name])))
            pumps[-1].start()
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for pump, (read_end, _) in zip(pumps, pipes.values(), strict=True):
            pump.join()
            os.close(read_end)
        status = b"".join(collected["status"]).split()
        if not status:
            console = (folder / "console").read_text(errors="replace")[-3000:]
            raise GuestError(
                f"no exit status from kernel {series} within {seconds:g} s; its console ends with:\n{console}"
            )
        return int(status[-1]), b"".join(collected["out"]).decode(errors="replace")
