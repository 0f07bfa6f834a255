"""What is free in the heap goes back to the system."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import ctypes
from pathlib import Path
from pinaivu_box import heap

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


blocks = [libc.malloc(8000) for _ in range(10_000)]
for block in blocks:
    ctypes.memset(block, 1, 8000)
for block in blocks[:-1]:  # the last one keeps the end of the heap
    libc.free(block)
before = resident()
heap.trim()
print(before - resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be asked")
def test_memory_between_what_stays_is_given_back() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=180, check=True
    )
    assert int(done.stdout) > 50_000_000
