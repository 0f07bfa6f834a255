"""The processors that this process may use, and how busy they are."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from pathlib import Path


def usable_cores() -> int:
    """Physical cores, or fewer if the control group may use less of them."""
    return max(1, math.ceil(min(physical_cores(), quota())))


def physical_cores() -> int:
    """Cores that this process may use, hyper-threads counted once (they do not help matmuls)."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    cores = set()
    for cpu in os.sched_getaffinity(0):
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        cores.add(siblings.read_text().strip() if siblings.exists() else str(cpu))
    return len(cores)


def quota(process: Path = Path("/proc/self"), mount: Path = Path("/sys/fs/cgroup")) -> float:
    """How many processors' time the control groups of this process allow; inf if they do not say.
    `cpu.max` of version 2 and of all groups above, `cpu.cfs_quota_us` of version 1."""
    return min(_quotas(process, mount), default=math.inf)


def _quotas(process: Path, mount: Path) -> Iterator[float]:
    try:
        groups = (process / "cgroup").read_text().splitlines()
    except OSError:
        return
    for group in groups:
        _, controllers, path = group.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        # In a container the path may be the host's, and what is mounted is the group itself.
        root = mount / controllers if controllers else mount
        inner = root / path.lstrip("/")
        for folder in (inner, *inner.parents):
            yield from _limit(folder)
            if folder == root:
                break


def _limit(folder: Path) -> Iterator[float]:
    try:
        if (folder / "cpu.max").exists():
            most, period = (folder / "cpu.max").read_text().split()
        else:
            most = (folder / "cpu.cfs_quota_us").read_text()
            period = (folder / "cpu.cfs_period_us").read_text()
        if most != "max" and int(most) > 0:
            yield int(most) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return


def taken(seconds: float, stat: Path = Path("/proc/stat")) -> float | None:
    """The share of the machine's processor time that is taken by programs, and by other machines on
    the same hardware, during so many seconds; None where the kernel does not say."""
    before = _times(stat)
    time.sleep(seconds)
    after = _times(stat)
    if before is None or after is None or after[1] <= before[1]:
        return None
    return 1 - (after[0] - before[0]) / (after[1] - before[1])


def _times(stat: Path) -> tuple[int, int] | None:
    """Idle time and all time so far, in ticks."""
    try:
        # user, nice, system, idle, iowait, irq, softirq, steal; guests are counted in the first two
        ticks = [int(each) for each in stat.read_text().partition("\n")[0].split()[1:9]]
        return ticks[3] + ticks[4], sum(ticks)
    except (OSError, ValueError, IndexError):
        return None
