"""Boxes that failed are left alone for a while, longer each time, then tried with one request."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from random import Random

from pinaivu_box import backoff

FIRST_SECONDS = 1.0
LONGEST_SECONDS = 300.0
_PROBE_SECONDS = 30.0  # a probe that says nothing by then is forgotten


class CircuitBreaker:
    def __init__(self, clock: Callable[[], float], random: Random) -> None:
        self._clock, self._random = clock, random
        self._failures: dict[str, int] = {}
        self._failed: dict[str, float] = {}  # when, the last time
        self._until: dict[str, float] = {}
        self._probing: dict[str, float] = {}  # until when

    def failed(self, node_id: str, sent: float = math.inf) -> float:
        """Seconds that it rests now: doubled with every failure in a row, and jittered by a half
        either way so that not all boxes come back to it at once.  What was `sent` before the last
        failure fails with it: a box that dies with eight requests has died once."""
        now = self._clock()
        if sent <= self._failed.get(node_id, -math.inf):
            return max(0.0, self._until[node_id] - now)
        self._failed[node_id] = now
        failures = self._failures[node_id] = self._failures.get(node_id, 0) + 1
        seconds = backoff.delay(failures, FIRST_SECONDS, LONGEST_SECONDS, self._random)
        self._until[node_id] = now + seconds
        self._probing.pop(node_id, None)
        return seconds

    def sent(self, node_id: str) -> float:
        """A request goes there, now; if it had failed, this is the probe and others wait for it."""
        if node_id in self._failures:
            self._probing[node_id] = self._clock() + _PROBE_SECONDS
        return self._clock()

    def served(self, node_id: str) -> None:
        """It answered well: all is forgiven."""
        for state in (self._failures, self._failed, self._until, self._probing):
            state.pop(node_id, None)

    def ends(self) -> Collection[float]:
        """When the boxes that failed may be tried again."""
        return self._until.values()

    def why(self, node_id: str) -> str | None:
        """Why it is left alone now, in a few words, or None."""
        if node_id not in self._failures:
            return None
        now = self._clock()
        if now < self._until[node_id]:
            times = self._failures[node_id]
            return f"failed {times} time{'s' * (times > 1)} in a row and rests"
        if now < self._probing.get(node_id, now):
            return "failed lately and is being tried with one request"
        return None
