"""Jobs for the tests of the command line."""

import sys

import pytest

from tests.counting import COUNTER, count
from tests.jobs import wait_until


@pytest.fixture
def counter(job):
    """A job that counts in a file."""
    job.start([sys.executable, "-c", COUNTER])
    wait_until(lambda: count(job) > 3, "the counter counting")
    return job
