"""To whom a box keeps links: to all members while they are few, to random ones when they are many.

A random graph of degree 8 stays connected when 30 % of its nodes fail, and any two of 1,000 are
four or five hops apart.
"""

from __future__ import annotations

from collections.abc import Collection
from random import Random

MAX_FULL_MESH = 16  # members, up to which all are linked to all
MIN_LINKS = 8
MAX_LINKS = 20


def to_dial(
    me: str, members: Collection[str], excluded: Collection[str], links: int, random: Random
) -> list[str]:
    """Return the members to dial now.  `excluded` are linked, being dialed, or not to be dialed
    yet; so many `links` exist or are being made."""
    candidates = sorted(set(members) - set(excluded) - {me})
    if len(members) <= MAX_FULL_MESH:
        return candidates
    return random.sample(candidates, min(len(candidates), max(0, MIN_LINKS - links)))


def to_drop(
    members: Collection[str], idle: Collection[str], links: int, random: Random
) -> list[str]:
    """Return the peers whose links to close because there are too many; `idle` ones carry no
    request."""
    if len(members) <= MAX_FULL_MESH or links <= MAX_LINKS:
        return []
    return random.sample(sorted(idle), min(len(idle), links - MAX_LINKS))
