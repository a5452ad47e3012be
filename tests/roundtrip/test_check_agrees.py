"""`check` and `take` agree: of odd jobs both find the same, or neither finds anything. What no look can see, `check` names."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess

import pytest

from checkpoint.check import check
from checkpoint.parasite.infection import look_at_code
from snapshotter.base.errors import Finding, UnsupportedError
from tests import memory_store
from tests.jobs import SnapFailedError, is_running, snap, wait_until

pytestmark = pytest.mark.requires("root")

START = """
import array, ctypes, fcntl, mmap, os, resource, select, signal, socket, struct, subprocess, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
def must(result):
    if result < 0: raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result
back = os.open(".", 0)
"""
END = """
os.close(os.open("ready", os.O_CREAT, dir_fd=back))
os.close(back)
while True: time.sleep(0.05)
"""
REFUSED = {
    "pidfd of a process outside": "f = os.pidfd_open(os.getppid())",
    "epoll entry of what only another has open": """
e = select.epoll(); e.register(int(sys.argv[1]), select.EPOLLIN); os.close(int(sys.argv[1]))
""",
    "connection that waits to be accepted": """
s = socket.socket(socket.AF_UNIX); s.bind("socket"); s.listen(5)
c = socket.socket(socket.AF_UNIX); c.connect("socket")
""",
    "socket bound through a link": """
os.mkdir("real"); os.mkdir("real/in"); os.symlink("real/in", "link")
s = socket.socket(socket.AF_UNIX); s.bind("link/socket")
""",
    "memfd of huge pages": "f = os.memfd_create('x', os.MFD_HUGETLB)",
    "timer of a thread that has ended": """
def thread():
    event = struct.pack("<Qiii44x", 0, 10, 4, threading.get_native_id())
    must(libc.syscall(222, 1, event, ctypes.create_string_buffer(8)))
t = threading.Thread(target=thread); t.start(); t.join()
""",
    "memory of another process": "f = open(f'/proc/{os.getppid()}/maps')",
    "socket to outside": "a = socket.fromfd(int(sys.argv[1]), socket.AF_UNIX, socket.SOCK_STREAM)",
    "TCP connection": """
s = socket.create_server(("127.0.0.1", 0)); c = socket.create_connection(s.getsockname()); d = s.accept()
""",
    "pseudo terminal": "m, s = os.openpty()",
    "netlink socket": "s = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)",
    "raw socket": "s = socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)",
    "packet socket": "s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)",
    "secret memory": "f = must(libc.syscall(447, 0))",
    "userfaultfd": "f = must(libc.syscall(323, 1))",
    "io_uring": "f = must(libc.syscall(425, 8, ctypes.create_string_buffer(120)))",
    "perf event": "f = must(libc.syscall(298, struct.pack('=IIQ', 1, 112, 0) + bytes(96), 0, -1, -1, 0))",
    "half-made mount": "f = must(libc.syscall(430, b'tmpfs', 0))",
    "Landlock rule set": "f = must(libc.syscall(444, struct.pack('Q', 1), 8, 0))",
    "network namespace of its own": "must(libc.unshare(0x40000000))",
    "seccomp filter": """
code = struct.pack("HBBI", 6, 0, 0, 0x7fff0000)
buffer = ctypes.create_string_buffer(code)
must(libc.prctl(38, 1, 0, 0, 0))
must(libc.prctl(22, 2, struct.pack("HxxxxxxQ", 1, ctypes.addressof(buffer))))
""",
    "working directory of a process": "os.chdir('/proc/self')",
    "root that was deleted": "os.mkdir('r'); os.chroot('r'); os.fchdir(back); os.rmdir('r')",
    "address space at its limit": """
used = int(open("/proc/self/statm").read().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (used + 300000, used + 300000))
""",
    "deleted file held as a place": "open('x','w').close(); f = os.open('x', 0x200000); os.unlink('x')",
}
TAKEN = {
    "nothing": "",
    "epoll entry under another number": """
a, b = socket.socketpair()
e = select.epoll(); e.register(a, select.EPOLLIN)
c = os.dup(a.fileno()); os.close(a.detach())
""",
    "epoll entry of what is in flight alone": """
a = os.eventfd(0); c, d = socket.socketpair()
e = select.epoll(); e.register(a, select.EPOLLIN)
socket.send_fds(c, [b"x"], [a]); os.close(a)
""",
    "pidfd of a child": "c = os.fork()\nif c == 0:\n    while True: time.sleep(0.05)\nf = os.pidfd_open(c)",
    "pidfd of itself": "f = os.pidfd_open(os.getpid())",
    "timer of a thread that lives": """
def thread():
    event = struct.pack("<Qiii44x", 0, 10, 4, threading.get_native_id())
    must(libc.syscall(222, 1, event, ctypes.create_string_buffer(8)))
    while True: time.sleep(0.05)
threading.Thread(target=thread).start()
while not open("/proc/self/timers").read(): time.sleep(0.01)
""",
    "listening socket": "s = socket.socket(socket.AF_UNIX); s.bind('socket'); s.listen(5)",
    "System V semaphores": "i = must(libc.semget(0, 1, 0o1600)); must(libc.semop(i, struct.pack('HhH', 0, 1, 0), 1)); open('id', 'w').write(str(i))",
    "System V messages": "i = must(libc.msgget(0, 0o1600)); must(libc.msgsnd(i, struct.pack('Q', 1) + b'x', 1, 0)); open('id', 'w').write(str(i))",
    "its own maps": "f = open('/proc/self/maps')",
}
TO_OUTSIDE = {"socket to outside", "epoll entry of what only another has open"}
REMOVE = {"System V semaphores": "-s", "System V messages": "-q"}
NO_RESTORER = """
static struct { long seconds, nanoseconds; } second = {1, 0};
void _start(void)
{
    for (;;) {
        long result = 35;
        __asm__ volatile("syscall" : "+a"(result) : "D"(&second), "S"(0) : "rcx", "r11", "memory");
    }
}
"""


@pytest.fixture
def odd(start, tmp_path):
    """Start a job of that text in a directory of its own, and wait until it is as it is to be."""

    def run(text: str, *args: str, **options) -> int:
        where = tmp_path / "job"
        where.mkdir()
        script = "import os, sys; os.chdir('job'); exec(sys.argv.pop(1))"
        pid = start("/usr/bin/python3", "-c", script, START + text + END, *args, **options)
        wait_until(lambda: (where / "ready").exists() or not is_running(pid), "the job is ready")
        assert is_running(pid), (tmp_path / "out").read_text()
        return pid

    return run


def said(findings) -> list[str]:
    return sorted(f"{one.pid} {one.where}: {one.what}" for one in findings)


def assert_both_refuse(pid: int) -> None:
    found = check(pid).findings
    assert found
    with pytest.raises(UnsupportedError) as error:
        memory_store.take(pid)
    assert said(error.value.findings) == said(found)
    assert is_running(pid)


@pytest.mark.parametrize("name", REFUSED)
def test_both_refuse_for_the_same_reasons(odd, name):
    with contextlib.ExitStack() as stack:
        ends = [stack.enter_context(end) for end in socket.socketpair()]
        outside = ends[0].fileno()
        options = {"pass_fds": [outside]} if name in TO_OUTSIDE else {}
        assert_both_refuse(odd(REFUSED[name], str(outside), **options))


def test_a_static_program_in_which_nothing_can_be_run_safely(start, tmp_path):
    """It has no restorer of signals: a take found that out in the frozen window only."""
    source = tmp_path / "still.c"
    source.write_text(NO_RESTORER)
    flags = ["-O2", "-static", "-nostdlib", "-nostartfiles", "-fcf-protection=none"]
    subprocess.run(["gcc", *flags, "-o", tmp_path / "still", source], check=True)
    pid = start(str(tmp_path / "still"))
    wait_until(lambda: os.readlink(f"/proc/{pid}/exe") == str(tmp_path / "still"), "it runs")
    assert_both_refuse(pid)
    store = tmp_path / "store"
    for command in ("check", "take"):
        with pytest.raises(SnapFailedError) as error:
            snap(command, pid, store=store)
        assert error.value.status == UnsupportedError.exit_status


@pytest.mark.parametrize("name", TAKEN)
def test_both_take_it_with_the_same_warnings(odd, tmp_path, name):
    pid = odd(TAKEN[name])
    try:
        found = check(pid)
        assert said(found.findings) == []
        point = memory_store.take(pid)
        assert set(found.warnings) <= set(point.result.warnings)
        assert bool(found.warnings) == (name in REMOVE)
    finally:
        if name in REMOVE:
            subprocess.run(["ipcrm", REMOVE[name], (tmp_path / "job" / "id").read_text()], check=True)


def test_a_process_in_the_midst_of_its_exec_is_no_finding():
    """It has no code for an instant; a shell's next command is always in one."""
    for _ in range(150):
        pid = os.posix_spawn("/bin/sleep", ["sleep", "60"], {})
        try:
            findings: list[Finding] = []
            for _ in range(15):
                look_at_code(pid, findings)
            assert not findings
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
