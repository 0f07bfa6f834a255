"""A member as this box sees it now, and how one is found by name."""

from __future__ import annotations

import difflib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from pinaivu_box.errors import PeerNotFound, quoted
from pinaivu_box.gossip.adverts import Advert
from pinaivu_box.gossip.loads import ReportedLoad
from pinaivu_box.gossip.protocol import Gossip
from pinaivu_box.membership.roster import Roster, Verdict
from pinaivu_box.membership.signed import node_of
from pinaivu_box.store.peers import Known
from pinaivu_box.transport import wire
from pinaivu_box.transport.connections import Links
from pinaivu_box.transport.transport import LinkFacts, LinkRoute

State = Literal["connected", "connecting", "unreachable", "revoked"]
_NO_NEED = "There is no link yet: one is made when it is needed."
_SHORTEST_PREFIX = 9  # node_ and 4 digits


@dataclass(frozen=True)
class Peer:
    """`why` is a sentence about its `state`.

    `advert` is its newest while it lives, made at `advert_at` of our monotonic clock; `gone`: a
    member says that it lost its link to it.  `since` is when its link began, in Unix seconds.
    `software`, `clock_ahead` (in seconds) and `route` are known while it is connected.  From its
    certificate: `inviter` (a node_id), `admin`, `issued_at` (Unix seconds by the inviter's clock).
    `loads`: of its models, as far as more is known than its advert says.
    """

    node_id: str
    name: str
    state: State
    why: str
    addresses: tuple[str, ...]
    route: LinkRoute | None
    software: str
    clock_ahead: float | None
    since: float | None
    advert: Advert | None
    advert_at: float | None
    gone: bool
    inviter: str
    admin: bool
    issued_at: float | None
    loads: Mapping[str, ReportedLoad] = field(default_factory=dict, hash=False)

    @property
    def advert_age_s(self) -> float | None:
        return None if self.advert_at is None else time.monotonic() - self.advert_at


class NetworkState(NamedTuple):
    """What is looked at; `now` is monotonic."""

    roster: Roster
    gossip: Gossip
    links: Links
    known: Mapping[str, Known]
    now: float


def view(node_id: str, addresses: tuple[str, ...], scene: NetworkState) -> Peer:
    verdict = scene.roster.member(node_id, time.time())
    certificate = scene.roster.certificate(node_id)
    advert = scene.gossip.adverts.get(node_id)
    fresh = advert if advert and advert.until > scene.now else None
    held = scene.links.held.get(node_id) if node_id in scene.gossip.links else None
    link = held.link.facts() if held else None
    called = node_id in scene.known and scene.known[node_id].name
    state, why = _state(verdict, link, scene.links, node_id)
    return Peer(
        node_id=node_id,
        name=called or verdict.name or wire.short(node_id),
        state=state,
        why=why,
        addresses=addresses,
        route=link.route if link else None,
        software=link.software if link else "",
        clock_ahead=link.clock_ahead if link else None,
        since=held.since if held else None,
        advert=fresh.advert if fresh else None,
        advert_at=fresh.sent_at if fresh else None,
        gone=held is None and scene.gossip.adverts.gone(node_id),
        inviter=node_of(certificate.inviter) if certificate else "",
        admin=verdict.admin,
        issued_at=certificate.issued_at / 1000 if certificate else None,
        loads=scene.gossip.loads.of(node_id),
    )


def _state(
    verdict: Verdict, link: LinkFacts | None, links: Links, node_id: str
) -> tuple[State, str]:
    if not verdict.ok:
        return "revoked", f"{verdict.why[:1].upper()}{verdict.why[1:]}."
    if link is not None:
        way = "directly" if link.route.direct else "by a relay"
        return "connected", f"Linked {way} ({link.route.address})."
    if (why := links.why(node_id)) and not links.dialing(node_id):
        return "unreachable", why
    return "connecting", "It is being called." if links.dialing(node_id) else _NO_NEED


def find(peers: Sequence[Peer], text: str) -> Peer:
    """By node_id, the beginning of one, or name.  PeerNotFound."""
    found = [peer for peer in peers if peer.node_id == text] or [
        peer
        for peer in peers
        if peer.name == text or (len(text) >= _SHORTEST_PREFIX and peer.node_id.startswith(text))
    ]
    if len(found) == 1:
        return found[0]
    if found:
        ids = " or ".join(peer.node_id[:17] for peer in found)
        raise PeerNotFound(
            f"{len(found)} peers are called '{quoted(text)}': say {ids}.", param="peer"
        )
    near = difflib.get_close_matches(text[:100], [peer.name for peer in peers], n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    raise PeerNotFound(
        f"There is no peer '{quoted(text)}'.{hint} See 'pinaivu peers ls' for all of them.",
        param="peer",
    )
