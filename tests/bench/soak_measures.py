"""What a soak records of processes and files, and the verdict that follows from it."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import NamedTuple

import msgspec

MOST_GROWTH = 0.02
_GRAVE = (["warning"], ["error"])  # of a log line, the second word
_KILOBYTES = ("Rss", "Pss", "Anonymous")  # fields of smaps_rollup


class Sample(msgspec.Struct, frozen=True, array_like=True):
    """A process `at` so many seconds after the beginning: memory in kB, open file descriptors,
    threads, and the CPU time that it has taken so far."""

    at: float
    pid: int
    rss: int
    pss: int
    anonymous: int
    descriptors: int
    threads: int
    cpu_seconds: float


class DiskSample(msgspec.Struct, frozen=True, array_like=True):
    """The bytes of a database and of its WAL, in how many seconds the script itself wrote a small
    file beside them, and the machine's load of the last minute."""

    at: float
    database: int
    wal: int
    write_seconds: float
    load: float


class Growth(NamedTuple):
    """What became of the memory of one process.  The first quarter of the time is warming up:
    caches fill.  `share` compares the medians of the last and of the second quarter; `fitted` is
    by how much a straight line through the second half rises, both as shares."""

    second_quarter: float
    last_quarter: float
    fitted: float

    @property
    def share(self) -> float:
        return self.last_quarter / self.second_quarter - 1

    @property
    def flat(self) -> bool:
        return self.share <= MOST_GROWTH


def sample(pid: int, at: float) -> Sample | None:
    """None if the process has ended."""
    folder = Path(f"/proc/{pid}")
    try:
        rollup = (folder / "smaps_rollup").read_text().splitlines()
        sizes = dict(line.split(":", 1) for line in rollup[1:])
        rss, pss, anonymous = (int(sizes[name].split()[0]) for name in _KILOBYTES)
        status = (folder / "stat").read_text().rpartition(")")[2].split()
        open_now = sum(1 for _ in (folder / "fd").iterdir())
    except (OSError, KeyError):
        return None
    cpu = (int(status[11]) + int(status[12])) / os.sysconf("SC_CLK_TCK")
    return Sample(round(at, 1), pid, rss, pss, anonymous, open_now, int(status[17]), cpu)


def descriptors(pid: int) -> Counter[str]:
    """How many file descriptors of each kind a process has open; files by their path.  Not the two
    pipes of each child: sandboxes are started when they are first needed, and stay."""
    kinds: Counter[str] = Counter()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            target = str(entry.readlink())
            kinds[target if target.startswith("/") else target.partition(":")[0]] += 1
    kinds["pipe"] -= 2 * len(list(children(pid)))
    return kinds


def left_open(before: Counter[str], after: Counter[str]) -> dict[str, int]:
    """Descriptors that there are more of."""
    return dict(after - before)


def disk(database: Path, at: float) -> DiskSample:
    wal = database.with_name(database.name + "-wal")
    sizes = [path.stat().st_size if path.exists() else 0 for path in (database, wal)]
    began = time.monotonic()
    with tempfile.TemporaryFile(dir=database.parent.parent) as file:
        file.write(bytes(4096))
        file.flush()
        os.fsync(file.fileno())
    took, load = round(time.monotonic() - began, 3), round(os.getloadavg()[0], 1)
    return DiskSample(round(at, 1), sizes[0], sizes[1], took, load)


def growth(samples: Sequence[Sample], field: str = "rss") -> Growth | None:
    """Of one process; None if there are too few samples to say.

    >>> flat = [Sample(n, 1, 100, 100, 100, 9, 2, 0.0) for n in range(40)]
    >>> growth(flat)
    Growth(second_quarter=100.0, last_quarter=100.0, fitted=0.0)
    """
    if len(samples) < 16:
        return None
    first, last = samples[0].at, samples[-1].at
    quarter = (last - first) / 4
    values = [(each.at - first, float(getattr(each, field))) for each in samples]
    second = [value for at, value in values if quarter <= at < 2 * quarter]
    fourth = [value for at, value in values if at >= 3 * quarter]
    return Growth(median(second), median(fourth), _rise([v for v in values if v[0] >= 2 * quarter]))


def _rise(points: Sequence[tuple[float, float]]) -> float:
    """By which share a line fitted by least squares rises from the first to the last of them."""
    mean_at, mean = fmean(at for at, _ in points), fmean(value for _, value in points)
    spread = sum((at - mean_at) ** 2 for at, _ in points)
    slope = sum((at - mean_at) * (value - mean) for at, value in points) / spread
    return slope * (points[-1][0] - points[0][0]) / mean


def children(pid: int) -> Iterator[int]:
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):
            yield from map(int, (task / "children").read_text().split())


class Answers(msgspec.Struct):
    """How the requests of clients ended: `answered` and `cut` (whose client left) have the ids that
    the client saw; `refused` the reasons why others were not served, and `turned_away` those of
    them that somebody could have served; `lost` what should not happen.  `failed_ids` are of those
    that ended in the middle."""

    sent: int = 0
    answered: set[str] = msgspec.field(default_factory=set)
    cut: set[str] = msgspec.field(default_factory=set)
    cut_early: int = 0  # before there was an id
    refused: Counter[str] = msgspec.field(default_factory=Counter)
    turned_away: Counter[str] = msgspec.field(default_factory=Counter)
    failed_ids: set[str] = msgspec.field(default_factory=set)
    lost: list[str] = msgspec.field(default_factory=list)

    @property
    def accounted(self) -> int:
        ended = len(self.answered) + len(self.cut) + self.cut_early + len(self.lost)
        return ended + self.refused.total() + self.turned_away.total()


def plain(message: str) -> str:
    """A message without its numbers and ids, so that those of one kind are counted together.

    >>> plain("node_1a2b3c4d stalled: nothing came for 4.0 s")
    'node_N stalled: nothing came for N s'
    """
    return re.sub(r"\d+(\.\d+)?", "N", re.sub(r"(?<=_)[0-9a-z]{8,64}\b", "N", message))[:200]


def warnings(log: str, most: int = 20) -> Counter[str]:
    """The warnings and errors in the log of a box, by their text; the most frequent ones."""
    lines = (line.split(maxsplit=2) for line in log.splitlines())
    texts = (f"{words[1]} {plain(words[2])}" for words in lines if words[1:2] in _GRAVE)
    return Counter(dict(Counter(texts).most_common(most)))


def wrong_receipts(answers: Answers, receipts: set[str]) -> list[str]:
    """What does not fit between what clients were told and what is on disk."""
    found = []
    if missing := answers.answered - receipts:
        found.append(f"{len(missing)} answers have no receipt, such as {min(missing)}")
    if missing := answers.cut - receipts:
        found.append(f"{len(missing)} streams that clients left have no receipt: {min(missing)}")
    unknown = receipts - answers.answered - answers.cut - answers.failed_ids
    if len(unknown) > answers.cut_early:
        found.append(
            f"{len(unknown)} receipts are of requests whose id no client has, and "
            f"{answers.cut_early} clients left before they had one"
        )
    if answers.accounted != answers.sent:
        found.append(f"{answers.sent} requests were sent, and {answers.accounted} ended")
    return found
