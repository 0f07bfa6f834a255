"""Who witnesses whose log in a network: all members while they are few, else those whom rendezvous
hashing picks (Thaler and Ravishankar, 1998).  Everybody computes the same from the roster, and when
a member comes or goes, few logs change one witness."""

from __future__ import annotations

import hashlib
from collections.abc import Collection

MAX_ALL = 16  # members, up to which all witness all
PICKED = 8


def witnesses_of(log: str, members: Collection[str]) -> set[str]:
    """Of the log of that box, which is none of them; all are node ids."""
    others = set(members) - {log}
    if len(members) <= MAX_ALL:
        return others
    return set(sorted(others, key=lambda witness: _weight(log, witness))[-PICKED:])


def _weight(log: str, witness: str) -> bytes:
    return hashlib.sha256(f"pinaivu/witness\n{log}\n{witness}".encode()).digest()
