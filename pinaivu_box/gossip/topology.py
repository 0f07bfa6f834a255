"""With whom a box keeps links: everybody while they are few, a random handful when they are many.

A random graph of degree 8 stays connected when 30 % of its boxes vanish, and any two of 1,000 are
four or five hops apart.
"""

from __future__ import annotations

from collections.abc import Collection
from random import Random

ALL_LINKED = 16  # members up to which everybody is linked with everybody
FEWEST = 8
MOST = 20


def to_dial(
    me: str, members: Collection[str], busy: Collection[str], links: int, random: Random
) -> list[str]:
    """Whom to call now.  `busy`: linked already, being called, or not to be called yet; `links`
    of them stand or are being made."""
    free = sorted(set(members) - set(busy) - {me})
    if len(members) <= ALL_LINKED:
        return free
    return random.sample(free, min(len(free), max(0, FEWEST - links)))


def to_drop(
    members: Collection[str], idle: Collection[str], links: int, random: Random
) -> list[str]:
    """Which links to end because there are too many; `idle` ones carry no request."""
    if len(members) <= ALL_LINKED or links <= MOST:
        return []
    return random.sample(sorted(idle), min(len(idle), links - MOST))
