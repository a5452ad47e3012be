"""Interpreters of everyday: taken while they compute, killed, rolled back, their result right in the end.

Those that are absent are skipped; their programs are the same one, whose result is known for any number of steps.
"""

from __future__ import annotations

import os
import textwrap

import pytest

from tests.jobs import is_running, reap, reap_all, state, ticks, tree, wait_until

pytestmark = pytest.mark.requires("root")


# Interpreters: each walks Lehmer's sequence and adds up every 1000th number, until a file called finish is there; a
# number lost or done twice gives another sum.

_MODULUS = 2147483647
INTERPRETERS = {
    "ruby": (".rb", """
        n, x, total = 0, 1, 0
        until File.exist?("finish")
            1000.times { x = x * 16807 % 2147483647 }
            n += 1; total += x
        end
        File.write("result", "#{n} #{total}")
    """),
    "php": (".php", """
        <?php $n = 0; $x = 1; $total = 0;
        while (!file_exists("finish")) {
            for ($i = 0; $i < 1000; $i++) $x = $x * 16807 % 2147483647;
            $n++; $total += $x; clearstatcache();
        }
        file_put_contents("result", "$n $total");
    """),
    "lua5.4": (".lua", """
        local n, x, total = 0, 1, 0
        while true do
            local finish = io.open("finish")
            if finish then break end
            for i = 1, 1000 do x = x * 16807 % 2147483647 end
            n = n + 1; total = total + x
        end
        io.open("result", "w"):write(n, " ", total):close()
    """),
    "gawk": (".awk", """
        #!/usr/bin/gawk -f
        BEGIN {
            x = 1
            while ((getline line < "finish") < 0) {
                for (i = 0; i < 1000; i++) x = x * 16807 % 2147483647
                n++; total += x
            }
            printf "%d %d", n, total >"result"
        }
    """),
    "busybox": (".sh", """
        n=0 x=1 total=0
        until [ -e finish ]; do
            i=0
            while [ $i -lt 1000 ]; do x=$((x * 16807 % 2147483647)) i=$((i + 1)); done
            n=$((n + 1)) total=$((total + x))
        done
        echo $n $total >result
    """),
    "guile": (".scm", """
        (define (walk i x) (if (= i 0) x (walk (- i 1) (modulo (* x 16807) 2147483647))))
        (let loop ((n 0) (x 1) (total 0))
          (if (file-exists? "finish")
              (call-with-output-file "result" (lambda (out) (format out "~a ~a" n total)))
              (let ((x (walk 1000 x))) (loop (+ n 1) x (+ total x)))))
    """),
    "sbcl": (".lisp", """
        (let ((n 0) (x 1) (total 0))
          (loop until (probe-file "finish")
                do (dotimes (i 1000) (setf x (mod (* x 16807) 2147483647)))
                   (incf n) (incf total x))
          (with-open-file (out "result" :direction :output) (format out "~a ~a" n total)))
    """),
    "ocaml": (".ml", """
        let () =
          let n = ref 0 and x = ref 1 and total = ref 0 in
          while not (Sys.file_exists "finish") do
            for _ = 1 to 1000 do x := !x * 16807 mod 2147483647 done;
            incr n; total := !total + !x
          done;
          let out = open_out "result" in
          Printf.fprintf out "%d %d" !n !total; close_out out
    """),
    "escript": (".erl", """
        #!/usr/bin/env escript
        walk(0, X) -> X;
        walk(I, X) -> walk(I - 1, X * 16807 rem 2147483647).
        loop(N, X, Total) ->
            case filelib:is_file("finish") of
                true -> file:write_file("result", io_lib:format("~b ~b", [N, Total]));
                false -> Y = walk(1000, X), loop(N + 1, Y, Total + Y)
            end.
        main(_) -> loop(0, 1, 0).
    """),
}  # fmt: skip
_ARGUMENTS = {"busybox": ["sh"], "gawk": ["-f"], "sbcl": ["--script"], "guile": ["--no-auto-compile"]}


def lehmer(count: int) -> int:
    step = pow(16807, 1000, _MODULUS)
    x, total = 1, 0
    for _ in range(count):
        x = x * step % _MODULUS
        total += x
    return total


def finish(job) -> str:
    """Let the program come to its end; what it wrote as its result."""
    (job.directory / "finish").write_text("")
    result = job.directory / "result"
    wait_until(lambda: not is_running(job.pid), "the end of the program", 60)
    reap(job.pid)
    assert result.exists(), job.said()
    return result.read_text()


@pytest.mark.parametrize("program", INTERPRETERS)
def test_interpreter(program, job):
    if not any(os.access(f"{folder}/{program}", os.X_OK) for folder in os.environ["PATH"].split(":")):
        pytest.skip(f"no {program} here")
    suffix, text = INTERPRETERS[program]
    job.directory.mkdir()
    source = job.directory / f"job{suffix}"
    source.write_text(textwrap.dedent(text).lstrip())
    job.start([program, *_ARGUMENTS.get(program, ()), source])
    worked = lambda least: sum(ticks(pid) for pid in tree(job.pid)) >= least  # noqa: E731
    wait_until(lambda: worked(40), "the program at work", 60)
    job.take()
    wait_until(lambda: worked(60), "the program going on", 60)
    job.take("--kill")
    wait_until(lambda: reap_all() or not state(job.pid), "the job gone")
    for point in (0, 1):
        job.rollback(job.points[point]["id"])
        wait_until(lambda: worked(10), "the program going on after the rollback", 60)
        if point == 0:
            job.take("--kill")
            wait_until(lambda: reap_all() or not state(job.pid), "the job gone")
    count, total = map(int, finish(job).split())
    assert count > 0
    assert total == lehmer(count)
