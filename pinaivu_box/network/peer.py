"""Peers as this box sees them now, and as the admin API and `pinaivu peers --json` show them.

In views, times are RFC 3339 in UTC, durations seconds unless their name says otherwise, prices
decimal text.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

from msgspec import UNSET, Struct, UnsetType
from msgspec.structs import asdict

from pinaivu_box.amount import Prices
from pinaivu_box.gossip.adverts import Advert, Offer
from pinaivu_box.gossip.loads import ReportedLoad
from pinaivu_box.gossip.protocol import Gossip
from pinaivu_box.membership.records import node_of
from pinaivu_box.membership.roster import Verdict
from pinaivu_box.store.peer_settings import PeerLimits
from pinaivu_box.store.peers import KnownPeer
from pinaivu_box.text import sentence, utc_text
from pinaivu_box.transport import wire
from pinaivu_box.transport.connections import LinkManager
from pinaivu_box.transport.link import LinkView

State = Literal["connected", "connecting", "unreachable", "revoked"]
_NOT_NEEDED = "There is no link yet: one is made when it is needed."


@dataclass(frozen=True)
class Peer:
    """`why` is a sentence about its `state`.

    `advert` is its newest until that expires, sent at `advert_at` of our monotonic clock; `gone`: a
    member reports that it lost its link to it.  `software`, `clock_ahead` (in seconds) and `route`
    are known while it is connected.  From its certificate: `inviter` (a node id), `admin`,
    `issued_at` (Unix seconds by the inviter's clock).  `loads`: of its models, as far as they are
    newer than its advert.
    """

    node_id: str
    name: str
    state: State
    why: str
    addresses: tuple[str, ...]
    route: LinkView | None
    software: str
    clock_ahead: float | None
    advert: Advert | None
    advert_at: float | None
    gone: bool
    inviter: str
    admin: bool
    issued_at: float | None
    loads: Mapping[str, ReportedLoad] = field(hash=False)


def view(
    node_id: str,
    addresses: tuple[str, ...],
    gossip: Gossip,
    links: LinkManager,
    known: Mapping[str, KnownPeer],
) -> Peer:
    """Return a peer as it is now."""
    verdict = gossip.roster.member(node_id, time.time())
    certificate = gossip.roster.certificate(node_id)
    advert = gossip.adverts.get(node_id)
    if advert and advert.expires_at <= time.monotonic():
        advert = None
    link = links.by_peer.get(node_id) if node_id in gossip.links else None
    route = link.route() if link else None
    local_name = node_id in known and known[node_id].name
    state, why = _state(verdict, route, links, node_id)
    return Peer(
        node_id=node_id,
        name=local_name or verdict.name or wire.short(node_id),
        state=state,
        why=why,
        addresses=addresses,
        route=route,
        software=link.software if link else "",
        clock_ahead=link.clock_ahead if link else None,
        advert=advert.advert if advert else None,
        advert_at=advert.sent_at if advert else None,
        gone=link is None and gossip.adverts.gone(node_id),
        inviter=node_of(certificate.inviter) if certificate else "",
        admin=verdict.admin,
        issued_at=certificate.issued_at / 1000 if certificate else None,
        loads=gossip.loads.of(node_id),
    )


def _state(
    verdict: Verdict, route: LinkView | None, links: LinkManager, node_id: str
) -> tuple[State, str]:
    if not verdict.ok:
        return "revoked", sentence(verdict.why)
    if route is not None:
        way = "directly" if route.direct else "by a relay"
        return "connected", f"Linked {way} ({route.address})."
    if (why := links.last_error(node_id)) and not links.is_dialing(node_id):
        return "unreachable", why
    return "connecting", "It is being dialed." if links.is_dialing(node_id) else _NOT_NEEDED


class OfferView(Struct, frozen=True):
    """A model that a box offers, with its load as it reported it last: `sequences` are its places,
    of which so many are free, and `queue` requests wait.  `ttft_ms` and `tokens_per_s` as that box
    measured them.  `price` is for 1,000 tokens."""

    id: str
    digest: str
    sequences: int
    sequences_free: int
    kv_free: int
    queue: int
    ttft_ms: int
    tokens_per_s: int
    price: Prices


class Opinion(Struct, frozen=True):
    """This box's own opinion of a peer, from 0 to 1, and what it is based on."""

    value: float
    why: str


class UseView(Struct, frozen=True):
    """What a peer may use of this box, by its own `limits` or else by `[peering.serve]`, and what
    it uses: `running` requests, `tokens` of the last minute, and what it `owes`, including the
    running requests and what it has not accepted, which is `unaccepted`.  null: no limit.
    `open`: the current time is within its `hours`."""

    max_parallel: int
    running: int
    tokens_per_minute: int | None
    tokens: int
    credit_limit: str | None
    owes: str
    beyond: str
    models: tuple[str, ...]
    hours: str
    open: bool
    unaccepted: str = "0"


class CostView(Struct, frozen=True):
    """What this box pays a peer: `received` is the price of all that it ever received, of which it
    `owes` a part; `max_debt` is the most it may owe, null for no limit.  `too_dear`: models of the
    peer that this box does not use because their price is over `[peering] max_price`."""

    received: str
    owes: str
    max_debt: str | None
    too_dear: list[str]


class AuditsView(Struct, frozen=True):
    """How many of the legs that the peer served were computed again here, and in how many of these
    something else came out; of the `failed` those that were `disproved` to the bit.  `undecided`
    are further ones that were to be computed again, and nothing can be said of them."""

    count: int = 0
    failed: int = 0
    disproved: int = 0
    undecided: int = 0


class LogAlarm(Struct, frozen=True):
    """What is wrong with a peer's log: `kind` is "fork" (proven by the evidence of that `id`),
    "unproven", "no-statement" or "restart"; `detail` is a sentence."""

    id: str
    kind: str
    found_at: str
    detail: str


class RefusalView(Struct, frozen=True):
    """The peer's latest refusal of a request of this box, `age` seconds ago."""

    message: str
    age: float


class PeerView(Struct, frozen=True):
    """A peer.  `why` explains its `state`.  `clock_ahead`: by how much its clock was ahead of ours
    when the link began.  `advert_age`: the age of its latest advert; null if there is none, and
    then `models` is empty.  `gone`: other members report that they lost it.  `refusal`: its
    latest, if it has not served a request of this box since.  `log_alarms`: what is wrong with its
    log, as far as this box knows."""

    id: str
    name: str
    state: str
    why: str
    link: LinkView | None
    software: str
    clock_ahead: float | None
    addresses: list[str]
    models: list[OfferView]
    currency: str
    draining: bool
    gone: bool
    advert_age: float | None
    reputation: Opinion | None
    admin: bool
    invited_by: str
    member_since: str | None
    limits: PeerLimits
    use: UseView | None = None
    refusal: RefusalView | None = None
    cost: CostView | None = None
    audits: AuditsView = AuditsView()
    log_alarms: list[LogAlarm] = []
    request_id: str | UnsetType = UNSET


class OwnModel(OfferView, frozen=True):
    """A model that this box offers, as its own advert has it."""


class OwnView(Struct, frozen=True):
    """This box as its peers see it, by its advert.  `state`: "alone" (in no network), "member" or
    "revoked", which `why` explains.  What they think of it (its reputation with each) they keep to
    themselves."""

    id: str
    name: str
    network: str
    software: str
    addresses: list[str]
    relay: str
    models: list[OwnModel]
    state: Literal["alone", "member", "revoked"] = "member"
    why: str = ""
    currency: str = ""
    draining: bool = False


NOT_AUDITED = AuditsView()


def peer_view(
    peer: Peer,
    inviter: str,
    limits: PeerLimits,
    reputation: Opinion | None = None,
    use: UseView | None = None,
    refusal: RefusalView | None = None,
    *,
    cost: CostView | None = None,
    audits: AuditsView = NOT_AUDITED,
    log_alarms: list[LogAlarm] | None = None,
) -> PeerView:
    advert = peer.advert
    return PeerView(
        id=peer.node_id,
        name=peer.name,
        state=peer.state,
        why=peer.why,
        link=peer.route,
        software=peer.software,
        clock_ahead=peer.clock_ahead,
        addresses=list(peer.addresses),
        models=[] if advert is None else [offer_view(each, peer.loads) for each in advert.models],
        currency="" if advert is None else advert.currency,
        draining=advert is not None and advert.draining,
        gone=peer.gone,
        advert_age=None if peer.advert_at is None else time.monotonic() - peer.advert_at,
        reputation=reputation,
        admin=peer.admin,
        invited_by=inviter,
        member_since=None if peer.issued_at is None else utc_text(peer.issued_at),
        limits=limits,
        use=use,
        refusal=refusal,
        cost=cost,
        audits=audits,
        log_alarms=log_alarms or [],
    )


def own_model(offer: Offer) -> OwnModel:
    """Return an offer of this box as it is shown."""
    return OwnModel(**asdict(offer_view(offer)))


def offer_view(offer: Offer, loads: Mapping[str, ReportedLoad] = MappingProxyType({})) -> OfferView:
    """Return an offer as it is shown, with the newer of its loads."""
    fields = {name: getattr(offer, name) for name in OfferView.__struct_fields__}
    if (reported := loads.get(offer.id)) is not None:
        fields |= asdict(reported.load)
    return OfferView(**{**fields, "digest": offer.digest.hex()})
