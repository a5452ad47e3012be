"""Programs as people run them: taken while they run, let go on unharmed, killed, rolled back, seen to continue.

Two shapes. A *counter* writes ever higher numbers into a file: it must go on after a take, and after a rollback its
first new number must follow the point's. A *worker* has an end: killed by the take, brought back, its result is compared
with that of an undisturbed run.
"""

from __future__ import annotations

import os
import pathlib
import random
import subprocess
import sys
import textwrap

import pytest

from tests.jobs import is_running, reap, reap_all, signal_tree, snap, state, ticks, tree, wait_until

pytestmark = pytest.mark.requires("root")

COUNTERS = {
    "python": (sys.executable, ".py", """
        import sys, time
        n = 0
        log = open(sys.argv[1] + "/log", "a", buffering=1)
        while True:
            n += 1
            log.write(f"{n}\\n")
            time.sleep(0.01)
    """),
    "bash": ("bash", ".sh", """
        n=0
        while true; do n=$((n+1)); echo "$n"; sleep 0.02; done | sed -u 's/^/x/' | while read -r line; do
            echo "${line#x}"
        done >>"$1/log"
    """),
    "perl": ("perl", ".pl", """
        open(my $log, ">>", "$ARGV[0]/log") or die; $log->autoflush(1); my $n = 0;
        while (1) { $n++; print $log "$n\\n"; select(undef, undef, undef, 0.01); }
    """),
    "node": ("node", ".js", """
        const fs = require("fs"); let n = 0;
        const fd = fs.openSync(process.argv[2] + "/log", "a");
        setInterval(() => { n++; fs.writeSync(fd, n + "\\n"); }, 10);
    """),
    "java": ("java", ".java", """
        public class job {
            public static void main(String[] args) throws Exception {
                var log = new java.io.FileOutputStream(args[0] + "/log", true);
                for (int n = 1;; n++) { log.write((n + "\\n").getBytes()); Thread.sleep(10); }
            }
        }
    """),
}  # fmt: skip

THREADS = """
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t turn = PTHREAD_COND_INITIALIZER;
static long n;
static int fd;
/* Each of the 100 threads counts only when it is its turn: one that is lost stops all. */
static void *count(void *arg)
{
	long me = (long)arg;
	pthread_mutex_lock(&lock);
	for (;;) {
		while (n % 100 != me)
			pthread_cond_wait(&turn, &lock);
		n++;
		char text[32];
		int size = snprintf(text, sizeof(text), "%ld\\n", n);
		if (write(fd, text, size) != size)
			return NULL;
		usleep(500);
		pthread_cond_broadcast(&turn);
	}
}
int main(int argc, char **argv)
{
	char path[4096];
	snprintf(path, sizeof(path), "%s/log", argv[argc - 1]);
	fd = open(path, O_WRONLY | O_CREAT | O_APPEND, 0644);
	for (long i = 1; i < 100; i++) {
		pthread_t thread;
		pthread_create(&thread, NULL, count, (void *)i);
	}
	count(0);
}
"""


def numbers(job, start: int = 0) -> list[int]:
    path = job.directory / "log"
    if not path.exists():
        return []
    return [int(word) for word in path.read_bytes()[start:].split(b"\n")[:-1]]


def size(job) -> int:
    return (job.directory / "log").stat().st_size


def kill_all(job) -> None:
    """SIGKILL to the whole tree, at once."""
    pids = signal_tree(job.pid)
    wait_until(lambda: reap_all() or all(state(pid) in {"", "Z"} for pid in pids), "the job dead")
    wait_until(lambda: reap_all() or not any(state(pid) for pid in pids), "the job reaped")


def go_through(job) -> None:
    wait_until(lambda: len(numbers(job)) > 5, "the job counting", 60)
    brackets = []
    for _ in range(3):
        low = numbers(job)[-1]
        job.take()
        brackets.append((low, numbers(job)[-1]))
        at = numbers(job)[-1]
        wait_until(lambda at=at: numbers(job)[-1] > at + 3, "the job going on after the take")
    seen = numbers(job)
    assert seen == list(range(1, len(seen) + 1)), "the takes disturbed the count"
    assert [point["parent"] for point in job.points[1:]] == [point["id"] for point in job.points[:2]]
    for index in (1, 0, 2, 1):
        kill_all(job)
        end = size(job)
        job.rollback(job.points[index]["id"])
        wait_until(lambda end=end: len(numbers(job, end)) > 5, "the job counting after the rollback")
        new = numbers(job, end)
        low, high = brackets[index]
        assert low < new[0] <= high + 1
        assert new == list(range(new[0], new[0] + len(new)))
    # The chain goes on from the point rolled back to, and a living job is replaced.
    assert job.take()["parent"] == job.points[1]["id"]
    end = size(job)
    job.rollback(job.points[0]["id"])
    wait_until(lambda: any(n <= brackets[0][1] + 1 for n in numbers(job, end)), "the living job replaced")


@pytest.mark.parametrize("name", COUNTERS)
def test_counter(name, job):
    program, suffix, text = COUNTERS[name]
    if not any(os.access(f"{folder}/{program}", os.X_OK) for folder in ("", *os.environ["PATH"].split(":"))):
        pytest.skip(f"no {program} here")
    job.directory.mkdir()
    source = job.directory / f"job{suffix}"
    source.write_text(textwrap.dedent(text).lstrip())
    job.start([program, source])
    go_through(job)


def test_hundred_threads(job, tmp_path):
    source = tmp_path / "threads.c"
    source.write_text(THREADS)
    subprocess.run(["gcc", "-O2", "-pthread", "-o", tmp_path / "threads", source], check=True)
    job.start([tmp_path / "threads"])
    go_through(job)
    assert job.points[0]["nr_tasks"] == 100


RUST = """
use std::{env, fs, io::Write, sync::mpsc, thread, time::Duration};

fn main() {
    let path = env::args().last().unwrap() + "/log";
    let mut log = fs::OpenOptions::new().create(true).append(true).open(path).unwrap();
    let (send, receive) = mpsc::sync_channel::<u64>(4);
    thread::spawn(move || for n in 1.. { send.send(n).unwrap(); thread::sleep(Duration::from_millis(5)); });
    for n in receive { writeln!(log, "{n}").unwrap(); }
}
"""


@pytest.mark.requires("program:rustc")
def test_rust(job, tmp_path):
    source = tmp_path / "job.rs"
    source.write_text(RUST)
    subprocess.run(["rustc", "-O", "-o", tmp_path / "rust", source], check=True)
    job.start([tmp_path / "rust"])
    go_through(job)


# Workers


def text_file(path: pathlib.Path, nr_lines: int) -> None:
    dice = random.Random(7)
    path.write_text("".join(f"{dice.random()} {dice.getrandbits(60):x}\n" for _ in range(nr_lines)))


def work(job, command: str, nr_lines: int = 200_000) -> None:
    """Start `command` in the job's directory (with a file called input), kill it by a take half way, bring it back."""
    job.directory.mkdir()
    text_file(job.directory / "input", nr_lines)
    job.start(["bash", "-c", f"{command}; echo $? >status.tmp; mv status.tmp status", "worker"])
    wait_until(lambda: sum(ticks(pid) for pid in tree(job.pid)) > 30, "the worker having worked for 0.3 s")
    assert not (job.directory / "status").exists(), "too fast to be interrupted"
    job.take()
    job.take("--kill")
    job.rollback()
    wait_until(
        lambda: (job.directory / "status").exists() or not is_running(job.pid), "the worker's end", 120
    )
    assert (job.directory / "status").read_text() == "0\n", job.said()
    reap(job.pid)


def test_xz(job):
    work(job, "xz -T1 -6 -k input")
    back = subprocess.run(["xz", "-dc", job.directory / "input.xz"], capture_output=True, check=True).stdout
    assert back == (job.directory / "input").read_bytes()


def test_sort(job):
    work(
        job,
        "for i in 1 2 3 4 5 6 7 8 9 10 11 12; do sort --parallel=2 -S 8M -T . -k2 input >output; done",
        600_000,
    )
    expected = subprocess.run(
        ["sort", "-k2", job.directory / "input"], capture_output=True, check=True, env=os.environ
    ).stdout
    assert (job.directory / "output").read_bytes() == expected


@pytest.mark.requires("program:g++")
def test_make(job):
    job.directory.mkdir(parents=True)
    for number in range(6):
        (job.directory / f"part{number}.cc").write_text(
            f"#include <regex>\n#include <string>\nbool part{number}(const std::string &s) "
            f'{{ return std::regex_match(s, std::regex("(a|b){{{number},}}")); }}\n'
        )
    (job.directory / "main.cc").write_text(
        "#include <string>\n"
        + "".join(f"bool part{n}(const std::string &);\n" for n in range(6))
        + "int main() { std::string s(3, 'a'); return "
        + " + ".join(f"part{n}(s)" for n in range(6))
        + "; }\n"
    )
    parts = " ".join(f"part{n}.o" for n in range(6))
    (job.directory / "Makefile").write_text(f"all: main.o {parts}\n\tg++ -o all main.o {parts}\n")
    (job.directory / "input").write_text("")
    job.directory.rename(job.directory.with_name("made"))
    made = job.directory.with_name("made")
    work(job, f"cp -r {made}/* . && TMPDIR=$PWD make -j2", 1)
    assert subprocess.run([job.directory / "all"], check=False).returncode == 4
    assert snap("verify", store=job.store)["ok"]
