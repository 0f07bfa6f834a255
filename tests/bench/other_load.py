"""What share of the processors others took meanwhile: other programs, and the hypervisor (steal);
and programs that take it on purpose.

Linux counts a process's time to the tick, so runs should take seconds.  The time of interrupts is
left out: nearly all of it is the loopback traffic of the runs themselves.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

_USER, _NICE, _SYSTEM, _STEAL = 0, 1, 2, 7  # of the line `cpu` in /proc/stat
_PARENT, _TIMES = 1, slice(11, 15)  # of /proc/PID/stat behind the name: own, then waited-for ones


class OtherLoad:
    """From the moment when it is made."""

    def __init__(self) -> None:
        self._machine, self._own = _machine(), _own()

    def share(self) -> float:
        """Of all processors' time since then, what was not this process's or its children's."""
        taken, whole = (now - then for now, then in zip(_machine(), self._machine, strict=True))
        return max(0.0, taken - (_own() - self._own)) / max(1, whole)


def _machine() -> tuple[int, int]:
    """Ticks that were taken, and all that there were."""
    first = Path("/proc/stat").read_text().partition("\n")[0]
    ticks = [int(field) for field in first.split()[1:9]]
    return sum(ticks[kind] for kind in (_USER, _NICE, _SYSTEM, _STEAL)), sum(ticks)


def _own() -> int:
    """Ticks of this process and all below it."""
    parents, ticks = {}, {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has just ended
        pid = int(path.parent.name)
        parents[pid], ticks[pid] = int(fields[_PARENT]), sum(map(int, fields[_TIMES]))
    family = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= more
    return sum(ticks.get(pid, 0) for pid in family)


@contextlib.contextmanager
def neighbours(count: int) -> Iterator[None]:
    """So many loops that compute and never wait, at this process's priority; `OtherLoad` does not
    count them."""
    loops = [subprocess.Popen(["sh", "-c", "while :; do :; done"]) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()
