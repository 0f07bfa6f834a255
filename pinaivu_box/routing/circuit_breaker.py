"""Boxes that failed are left alone for a while, longer each time, then tried with one request."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from random import Random

from pinaivu_box import backoff

FIRST_SECONDS = 1.0
LONGEST_SECONDS = 300.0
_PROBE_SECONDS = 30.0  # a probe that says nothing by then is forgotten


@dataclass
class _PeerFailures:
    """Of one box, in a row."""

    count: int = 0
    latest: float = -math.inf
    until: float = 0.0  # it is left alone
    probing_until: float = -math.inf


class CircuitBreaker:
    def __init__(self, clock: Callable[[], float], random: Random) -> None:
        self._clock, self._random = clock, random
        self._failures: dict[str, _PeerFailures] = {}  # by node id

    def failed(self, node_id: str, sent: float = math.inf) -> float:
        """Seconds that it rests now: doubled with every failure in a row, and jittered by a half
        either way so that not all boxes come back to it at once.  What was `sent` before the last
        failure fails with it: a box that dies with eight requests has died once."""
        now, failures = self._clock(), self._failures.get(node_id, _PeerFailures())
        if sent > failures.latest:
            count = failures.count + 1
            seconds = backoff.delay(count, FIRST_SECONDS, LONGEST_SECONDS, self._random)
            self._failures[node_id] = failures = _PeerFailures(count, now, now + seconds)
        return max(0.0, failures.until - now)

    def sent(self, node_id: str) -> float:
        """A request goes there, now; if it had failed, this is the probe and others wait for it."""
        now = self._clock()
        if node_id in self._failures:
            self._failures[node_id].probing_until = now + _PROBE_SECONDS
        return now

    def served(self, node_id: str) -> None:
        """It answered well: all is forgiven."""
        self._failures.pop(node_id, None)

    def ends(self) -> Iterable[float]:
        """When the boxes that failed may be tried again."""
        return (failures.until for failures in self._failures.values())

    def open(self) -> list[str]:
        """Who is left alone now."""
        now = self._clock()
        return [name for name, failures in self._failures.items() if now < failures.until]

    def why(self, node_id: str) -> str | None:
        """Why it is left alone now, in a few words, or None."""
        failures, now = self._failures.get(node_id), self._clock()
        if failures is not None and now < failures.until:
            times = failures.count
            return f"failed {times} time{'s' * (times > 1)} in a row and is left alone"
        if failures is not None and now < failures.probing_until:
            return "failed lately and is being tried with one request"
        return None
