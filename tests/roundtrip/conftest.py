"""Fixtures that several files here share."""

from __future__ import annotations

import subprocess

import pytest

from tests.jobs import reap_all, signal_tree, state, wait_until


@pytest.fixture
def start(tmp_path):
    """Start a job in a session of its own; kills its tree at the end."""
    roots = []

    def run(*command, **options):
        options.setdefault("start_new_session", True)
        with open(tmp_path / "out", "ab") as out:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, cwd=tmp_path, **options
            )
        process.returncode = 0
        roots.append(process.pid)
        return process.pid

    yield run
    for root in roots:
        signal_tree(root)
    wait_until(lambda: reap_all() or not any(map(state, roots)), "jobs gone")
