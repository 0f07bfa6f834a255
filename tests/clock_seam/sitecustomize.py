"""A wall clock that a test sets: Python runs this first where PYTHONPATH has this folder.

For machines without libfaketime.  `TEST_CLOCK` is a file with the seconds that it is ahead.
"""

import os
import time
from pathlib import Path


def _ahead() -> int:
    return int(Path(os.environ["TEST_CLOCK"]).read_text())


_time, _time_ns = time.time, time.time_ns
time.time = lambda: _time() + _ahead()
time.time_ns = lambda: _time_ns() + _ahead() * 1_000_000_000
