"""How many tokens an engine computes in a second, from its counter."""

from __future__ import annotations

import time
from collections import deque

_WINDOW_SECONDS = 10.0
_SAMPLE_SECONDS = 0.5


class Throughput:
    """Of the last ten seconds.  `note` takes the number of tokens since the engine started."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, int]] = deque(
            maxlen=round(_WINDOW_SECONDS / _SAMPLE_SECONDS) + 1
        )
        self._last = 0.0, 0
        self._next_sample = 0.0

    def note(self, tokens: int) -> None:
        now = time.monotonic()
        self._last = now, tokens
        if now >= self._next_sample:
            self._samples.append(self._last)
            self._next_sample = now + _SAMPLE_SECONDS

    @property
    def tokens_per_s(self) -> float:
        now = time.monotonic()
        begin = next((each for each in self._samples if now - each[0] <= _WINDOW_SECONDS), None)
        if begin is None:
            return 0.0
        return (self._last[1] - begin[1]) / max(1.0, now - begin[0])
