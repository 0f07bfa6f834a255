"""Peers as the admin API and `pinaivu peers --json` show them.

Times are RFC 3339 in UTC, durations seconds unless their name says otherwise, prices decimal text.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Literal

from msgspec import UNSET, Struct, UnsetType

from pinaivu_box import __version__
from pinaivu_box.amount import Prices
from pinaivu_box.gossip.adverts import Facts, Offer
from pinaivu_box.network.network import Network
from pinaivu_box.network.peer import Peer
from pinaivu_box.receipts.receipt import utc_text
from pinaivu_box.store.peer_settings import PeerLimits


class LinkView(Struct, frozen=True):
    """`direct`: without a relay.  `rtt_ms`: the latest round trip, if there was one."""

    direct: bool
    address: str
    rtt_ms: float | None


class OfferView(Struct, frozen=True):
    """A model that it offers, with the load of now; `ttft_ms` and `tokens_per_s` as it measured
    them.  `price` is of 1,000 tokens."""

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
    """This box's own, of 0 to 1, and what it rests on."""

    value: float
    why: str


class UseView(Struct, frozen=True):
    """What a peer may have of this box, by its own `limits` or else `[peering.serve]`, and what it
    has: requests that are `running`, `tokens` of the last minute, and what it `owes` with what runs
    and what it has not accepted, which is also told as `unaccepted`.  null: no limit.  `open`:
    within its `hours` now."""

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
    """What this box pays a peer: all that it `received` ever cost, what of that it `owes`, and the
    most it may owe (`max_debt`), null for no limit.  `too_dear`: models that it does not use there,
    for their price is over `[peering] max_price`."""

    received: str
    owes: str
    max_debt: str | None
    too_dear: list[str]


class RefusalView(Struct, frozen=True):
    """What a peer answered instead of serving us, `age` seconds ago."""

    message: str
    age: float


class PeerView(Struct, frozen=True):
    """`why` explains the state.  `clock_ahead`: of ours, when the link began.  `advert_age`: since
    it last said what it offers; without one, `models` is empty.  `gone`: others have lost it.
    `refusal`: its last, if it has not served us since."""

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
    request_id: str | UnsetType = UNSET


class OwnModel(Struct, frozen=True):
    id: str
    digest: str


class OwnView(Struct, frozen=True):
    """This box as its peers see it.  `state`: "alone" in no network, a "member" of one, or
    "revoked", and `why`."""

    id: str
    name: str
    network: str
    software: str
    addresses: list[str]
    relay: str
    models: list[OwnModel]
    state: Literal["alone", "member", "revoked"] = "member"
    why: str = ""


def peer_view(
    peer: Peer,
    inviter: str,
    limits: PeerLimits,
    reputation: Opinion | None = None,
    use: UseView | None = None,
    refusal: RefusalView | None = None,
    *,
    cost: CostView | None = None,
) -> PeerView:
    advert = peer.advert
    return PeerView(
        id=peer.node_id,
        name=peer.name,
        state=peer.state,
        why=peer.why,
        link=None if peer.route is None else LinkView(**asdict(peer.route)),
        software=peer.software,
        clock_ahead=peer.clock_ahead,
        addresses=list(peer.addresses),
        models=[] if advert is None else [_offer_view(offer) for offer in advert.models],
        currency="" if advert is None else advert.currency,
        draining=advert is not None and advert.draining,
        gone=peer.gone,
        advert_age=peer.advert_age_s,
        reputation=reputation,
        admin=peer.admin,
        invited_by=inviter,
        member_since=None if peer.issued_at is None else utc_text(peer.issued_at),
        limits=limits,
        use=use,
        refusal=refusal,
        cost=cost,
    )


def own_view(network: Network, facts: Facts, relay: str) -> OwnView:
    return OwnView(
        id=network.node_id,
        name=network.name,
        network=network.network_id or "",
        software=__version__,
        addresses=network.own_addresses(),
        relay=relay,
        models=[OwnModel(offer.id, offer.digest.hex()) for offer in facts.models],
        state="revoked" if network.revoked else "member" if network.network_id else "alone",
        why=network.revoked,
    )


def _offer_view(offer: Offer) -> OfferView:
    fields = {name: getattr(offer, name) for name in OfferView.__struct_fields__}
    return OfferView(**{**fields, "digest": offer.digest.hex()})
