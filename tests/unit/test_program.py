"""What makes two processes run the same program."""

from __future__ import annotations

import pytest

from checkpoint.program import of_command


def command(*words):
    return b"".join(word.encode() + b"\0" for word in words)


@pytest.mark.parametrize(
    ("exe", "words", "others", "same"),
    [
        ("/usr/bin/sim", ["sim", "--steps", "5"], ["sim", "--resume"], True),
        ("/usr/bin/sim", ["sim"], ["nginx: master process"], True),
        ("/usr/bin/python3.11", ["python3", "a.py", "1"], ["/usr/bin/python3", "a.py", "2"], True),
        ("/usr/bin/python3.11", ["python3", "a.py"], ["python3", "b.py"], False),
        ("/usr/bin/python3.11", ["python3", "-u", "-m", "a"], ["python3", "-u", "-m", "b"], False),
        ("/usr/bin/bash", ["bash", "-c", "x"], ["bash", "-c", "y"], False),
        ("/usr/bin/bash", ["-bash"], ["bash"], True),
        ("/bin/busybox", ["sleep", "5"], ["sleep", "9"], True),
        ("/bin/busybox", ["sleep", "5"], ["httpd", "5"], False),
        ("/usr/lib/jvm/bin/java", ["java", "-Xmx1g", "-jar", "a.jar"], ["java", "-Xmx1g", "-jar", "b.jar"], False),
    ],
)  # fmt: skip
def test_same_program(exe, words, others, same):
    one = of_command(exe.encode(), 0, command(*words))
    other = of_command(exe.encode(), 0, command(*others))
    assert (one == other) is same


def test_user_and_executable():
    sim = of_command(b"/usr/bin/sim", 5, command("sim"))
    assert sim != of_command(b"/usr/bin/sim", 6, command("sim"))
    assert sim != of_command(b"/opt/sim", 5, command("sim"))
    assert sim == of_command(b"/usr/bin/sim (deleted)", 5, command("sim")), "upgraded while it runs"
    assert str(sim) == "/usr/bin/sim of user 5"
