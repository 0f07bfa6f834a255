"""Exponential backoff: how long to wait before something that failed is tried again."""

from __future__ import annotations

from random import Random

_MAX_DOUBLINGS = 32  # beyond that a float only grows


def delay(failures: int, first: float, longest: float, random: Random | None = None) -> float:
    """Seconds to wait after so many failures in a row (at least 1): `first`, doubled with each
    further failure, at most `longest`.  With `random` it is multiplied by 0.5 to 1.5, so that
    those who failed together do not come back together."""
    seconds = min(longest, first * 2.0 ** min(failures - 1, _MAX_DOUBLINGS))
    return seconds if random is None else seconds * random.uniform(0.5, 1.5)
