"""What a job has from the system around it: control groups."""

from __future__ import annotations

import contextlib
import os
import pathlib

import pytest

from checkpoint.resources import cgroups
from tests.jobs import SnapFailedError, reap, wait_until

pytestmark = pytest.mark.requires("root")


@pytest.fixture
def group(request):
    """A control group of our own: (controllers, path, folder); of the hierarchies that the test is marked with, or any."""
    mounts = cgroups.parse_mounts(pathlib.Path("/proc/self/mountinfo").read_bytes())
    own = cgroups.parse(pathlib.Path("/proc/self/cgroup").read_bytes())
    for controllers in getattr(request, "param", ("", "pids", "freezer")):
        mount = mounts.get(controllers)
        if mount is None or mount.root != "/":
            continue
        path = f"{own[controllers].rstrip('/')}/snap-test-{os.getpid()}"
        folder = pathlib.Path(mount.point + path)
        with contextlib.suppress(OSError):
            folder.mkdir()
            break
    else:
        pytest.skip("no control group can be made here (cgroups(7)): run as root on the host")
    yield controllers, path, folder
    with contextlib.suppress(FileNotFoundError):
        folder.rmdir()


def groups_of(pid: int) -> dict[str, str]:
    return cgroups.parse(pathlib.Path(f"/proc/{pid}/cgroup").read_bytes())


def test_control_group_is_kept_and_its_loss_is_said(job, compile_program, group):
    controllers, path, folder = group
    job.start([compile_program("nothing.c")]).wait_ready()
    (folder / "cgroup.procs").write_text(str(job.pid))
    job.take("--kill")
    assert job.rollback()["warnings"] == []
    assert groups_of(job.pid)[controllers] == path
    job.take("--kill")
    wait_until(lambda: not (folder / "cgroup.procs").read_text(), "the group is empty")
    folder.rmdir()
    said = job.rollback()["warnings"]
    assert any(path in text for text in said), said
    assert groups_of(job.pid)[controllers] != path
    assert job.finish() == "PASS"
    reap(job.pid)


@pytest.mark.parametrize("group", [("", "freezer")], indirect=True, ids=["freezer"])
def test_a_frozen_group_is_refused_by_name(job, compile_program, group):
    """As `docker pause` leaves it, in the group itself or in one above it."""
    controllers, path, folder = group
    switch, on, off = ("freezer.state", "FROZEN", "THAWED") if controllers else ("cgroup.freeze", "1", "0")
    if not (folder / switch).exists():
        pytest.skip("this kernel's control groups cannot be frozen")
    inner = folder / "inner"
    inner.mkdir()
    try:
        job.start([compile_program("nothing.c")]).wait_ready()
        (inner / "cgroup.procs").write_text(str(job.pid))
        for which in (inner, folder):
            (which / switch).write_text(on)
            with pytest.raises(SnapFailedError, match=f"frozen control group {path}/inner") as refused:
                job.take()
            assert refused.value.error["code"] == "unsupported"
            (which / switch).write_text(off)
        job.take()
        assert job.finish() == "PASS"
        reap(job.pid)
    finally:
        for which in (inner, folder):
            (which / switch).write_text(off)
        wait_until(lambda: not (inner / "cgroup.procs").read_text(), "the group is empty")
        inner.rmdir()


def test_keys_that_are_not_kept_are_named(job, compile_program):
    """Only those: an own session keyring that holds no more than the user's own comes back. Being asked leaves nothing in the job."""
    if not pathlib.Path("/proc/keys").exists():
        pytest.skip("this kernel has no keys (CONFIG_KEYS)")
    job.start([compile_program("keyring_keys.c")]).wait_ready()
    said = [text for text in job.take()["warnings"] if "keyring" in text]
    assert said == [
        f"task {job.pid}: its session keyring '_ses' holds 1 key, which is not kept; a rollback gives it a new one",
        f"task {job.pid}: its process keyring holds 2 keys, which are not kept",
        f"task {job.pid}: its thread keyring holds 1 key, which is not kept",
    ]
    assert job.finish() == "PASS"


def test_io_ports_are_refused(job, compile_program):
    job.start([compile_program("ports.c")]).wait_ready()
    if (job.directory / "absent").exists():
        pytest.skip("this kernel, or its rights here, has no I/O ports (CONFIG_X86_IOPL_IOPERM)")
    with pytest.raises(SnapFailedError, match="ioperm"):
        job.take()
    assert job.finish() == "PASS"


def test_what_no_interface_gives_back_is_said(job, compile_program):
    job.start([compile_program("said.c")]).wait_ready()
    said = "\n".join(job.take("--kill")["warnings"])
    assert "F_NOTIFY" in said
    assert "PR_SET_PDEATHSIG" in said
    job.rollback()
    assert job.finish() == "PASS"
    reap(job.pid)
