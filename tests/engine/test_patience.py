"""OpenMP's threads spin for long, or hardly at all."""

from __future__ import annotations

import subprocess
import sys

import pytest

from pinaivu_box.engine import patience

TEAMS = """
import ctypes, os, time
openmp = ctypes.CDLL("libgomp.so.1")
from pinaivu_box.engine.patience import Patience

def threads(wanted):
    deadline = time.monotonic() + 60
    while (count := len(os.listdir("/proc/self/task"))) != wanted and time.monotonic() < deadline:
        time.sleep(0.01)
    return count

before = len(os.listdir("/proc/self/task"))
patience = Patience(openmp.omp_get_num_procs())
assert patience.adjustable
patience.set(patient=True)
assert threads(before) == before
for _ in range(2):
    patience.set(patient=False)
    patience.set(patient=False)
    assert threads(before + 2) == before + 2  # one more than there are processors, and its master
    patience.set(patient=True)
    assert threads(before) == before
"""


@pytest.mark.skipif(sys.platform != "linux", reason="GNU's OpenMP")
def test_impatience_is_a_team_more_than_there_are_processors() -> None:
    """In a process of its own, which has no other threads."""
    done = subprocess.run(
        [sys.executable, "-c", TEAMS], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr


def test_threads_of_this_process_have_waited_for_some_time_or_none() -> None:
    first = patience.waited_seconds()
    assert 0 <= first <= patience.waited_seconds()
