"""What README tells users to type works as it stands there."""

from __future__ import annotations

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

from tests.jobs import ROOT

pytestmark = pytest.mark.requires("root", "program:unshare")

# In a mount namespace of its own: /opt, /run and /var/lib are the test's, so that the line runs as it is.
MACHINE = r"""
set -e
for folder in /opt /run /var/lib; do mount -t tmpfs tmpfs $folder; done
mkdir -p /opt/snap/bin
ln -s "$SNAP" /opt/snap/bin/snap
cron() {  # what Debian's cron gives a job of /etc/crontab
    set +e
    env -i HOME=/root LOGNAME=root SHELL=/bin/sh PATH=/usr/bin:/bin /bin/sh -c "$LINE" >"$DIR/out" 2>"$DIR/err" </dev/null
    echo "$1 $? $(tr '\n' ' ' <"$DIR/out")|$(tr '\n' ' ' <"$DIR/err")" >>"$DIR/log"
    set -e
}
cron "not started"
setsid sleep 1000 </dev/null >/dev/null 2>&1 &
echo $! >/run/sim.pid
cron "first"
cron "second"
/opt/snap/bin/snap list --job sim --json >"$DIR/list"
kill -9 $(cat /run/sim.pid)
wait
cron "ended"
cron "later"
"""


def crontab_line() -> str:
    """The command of the crontab's line in README; the fields before it are those of /etc/crontab."""
    (line,) = re.findall(r"^    (.*snap take .*--pidfile.*)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    match = re.fullmatch(r"([\d*/,-]+ ){5}root (.*)", line)
    assert match, line
    assert "%" not in line, "cron turns it into a newline"
    return match[2]


def test_the_line_for_cron(tmp_path):
    command = pathlib.Path(sys.executable).with_name("snap")
    done = subprocess.run(
        ["unshare", "--mount", "--propagation", "private", "bash", "-c", MACHINE],
        env=dict(os.environ, SNAP=str(command), LINE=crontab_line(), DIR=str(tmp_path)),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    log = dict(
        re.findall(
            r"^(not started|first|second|ended|later) (.*)$", (tmp_path / "log").read_text(), re.MULTILINE
        )
    )
    assert log["not started"].startswith("4 |snap: there is no pid file /run/sim.pid, and no point"), log
    assert (log["first"], log["second"]) == ("0 |", "0 |"), log
    assert len(json.loads((tmp_path / "list").read_text())["points"]) == 2
    assert re.match(r"8 \|.*has ended", log["ended"]), log
    assert log["later"] == "8 |", "said once"


def test_the_table_of_statuses_is_that_of_the_errors():
    from snapshotter.base import errors
    from snapshotter.cli.output import ReaderGoneError

    text = (ROOT / "README.md").read_text().partition("## Exit status")[2].partition("\n## ")[0]
    listed = {int(number) for number in re.findall(r"^\| (\d+) \|", text, re.MULTILINE)}
    kinds = [errors.SnapshotterError, ReaderGoneError]
    for kind in kinds:
        kinds += kind.__subclasses__() if kind is not ReaderGoneError else []
    known = {kind.exit_status for kind in kinds if kind.__module__.startswith("snapshotter.")}
    killed_by_the_watchdog = 137
    assert listed == known | {0, killed_by_the_watchdog}


def test_the_keeper_is_explained_where_users_look():
    for words in ("keeper of job", "keeper"):
        assert words in (ROOT / "README.md").read_text()
    helped = subprocess.run(
        [sys.executable, "-m", "snapshotter.cli.main", "take", "--help"],
        env=dict(os.environ, PYTHONPATH=str(ROOT)), cwd="/", capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert "A small process called keeper stays beside the job" in helped
