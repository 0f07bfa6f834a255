"""A peer that cheats, until an audit finds it: with the product's choice of what is audited."""

from __future__ import annotations

from random import Random
from typing import NamedTuple

from msgspec.structs import replace

from pinaivu_box.audits.choice import FIRST_REQUESTS, AuditChoice
from pinaivu_box.config import AuditConfig
from pinaivu_box.store.peer_tables import PeerAudits

GOAL_REQUESTS = 50
_MAX_REQUESTS = 1_000_000


class Cheat(NamedTuple):
    """It cheats in that `share` of its answers, and an audit of such an answer finds it with the
    probability `found`.  `old`: it was honest before, for longer than it is watched."""

    share: float = 1.0
    found: float = 1.0
    old: bool = False


def first_found(cheat: Cheat, random: Random, config: AuditConfig = AuditConfig()) -> int:  # noqa: B008
    """The number of the request, counted from 1, whose audit fails."""
    choice = AuditChoice(random.randbytes(32))
    peer = PeerAudits(watched=FIRST_REQUESTS if cheat.old else 0)
    for number in range(1, _MAX_REQUESTS):
        request_id = f"req_{random.getrandbits(128):032x}"
        chosen = choice.is_chosen(request_id, peer, config)
        if chosen and random.random() < cheat.share * cheat.found:
            return number
        peer = replace(peer, watched=peer.watched + 1)
    return _MAX_REQUESTS
