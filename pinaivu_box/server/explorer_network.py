"""The network as the explorer shows it: boxes, models, capacity, uptime, incidents; no prices."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime

from msgspec import Struct

from pinaivu_box.box import Box
from pinaivu_box.incidents import DayOfUptime, PeerUptime
from pinaivu_box.network.peer import Peer
from pinaivu_box.store import incidents
from pinaivu_box.store.incidents import Incident
from pinaivu_box.store.times import time_text

MAX_INCIDENTS = 200


class ModelCapacity(Struct, frozen=True):
    """Of the `sequences` that can run at a time so many are free; `queue` requests wait."""

    id: str
    sequences: int
    sequences_free: int
    queue: int


class SeenUptime(Struct, frozen=True):
    """What this box saw of a peer: of the `known` seconds in which it ran itself, at most 90 days
    and not before `since`, when they first had a link, it was without the peer in all but `up`.

    It is without a peer from when their link breaks until one of the network has heard of it again.
    What it cannot see counts as up: a peer that was shut down on purpose, was away already when
    this box started, or has lost its link to others only.
    """

    since: str
    known: int
    up: int


class ExplorerBox(Struct, frozen=True):
    """`state`: "this box", or as in `GET /v1/admin/peers`.  `name` is empty where the visitor may
    not know it.  `seen` is null for this box, and for one that it never had a link with."""

    id: str
    name: str
    state: str
    draining: bool
    models: list[ModelCapacity]
    seen: SeenUptime | None = None


class ExplorerModel(Struct, frozen=True):
    """A model, and the boxes that offer it together."""

    id: str
    boxes: int
    sequences: int
    sequences_free: int
    queue: int


class UptimeDay(Struct, frozen=True):
    """A day in UTC: of its `known` seconds this box ran in `running`."""

    day: str
    known: int
    running: int


class IncidentView(Struct, frozen=True):
    """`kind`: "engine" (it died; `subject` is its model), "peer" (lost; `subject` is its node
    id) or "errors" (more than 1 % of a minute's requests were answered with 503).  Without an
    `ended_at` it goes on."""

    kind: str
    subject: str
    subject_name: str
    began_at: str
    ended_at: str | None
    detail: str


class ExplorerNetwork(Struct, frozen=True, kw_only=True):
    """`uptime` is that of this box for up to 90 days, the oldest first: from when it was started
    and when it was last seen to run; a box that was stopped on purpose did not run either."""

    object: str = "explorer.network"
    boxes: list[ExplorerBox]
    models: list[ExplorerModel]
    uptime: list[UptimeDay]
    incidents: list[IncidentView]
    request_id: str = ""


async def explorer_network(
    box: Box, names: Mapping[str, str], serves: Callable[[str], bool]
) -> ExplorerNetwork:
    """`names` of boxes by node id, as far as the visitor may know them; `serves`: which models it
    may know of."""
    peers = box.network.peers() if box.network is not None else []
    uptime = await box.incidents.uptime()
    boxes = [_own(box, names, serves)]
    boxes += [
        _peer(peer, names, serves, uptime.peers.get(peer.node_id))
        for peer in peers
        if peer.state != "revoked"
    ]
    recent = await incidents.recent(box.database, MAX_INCIDENTS)
    return ExplorerNetwork(
        boxes=boxes,
        models=_models(boxes),
        uptime=[_day(day) for day in uptime.days],
        incidents=[
            _incident(one, names) for one in recent if one.kind != "engine" or serves(one.subject)
        ],
    )


def _own(box: Box, names: Mapping[str, str], serves: Callable[[str], bool]) -> ExplorerBox:
    models = []
    for model in box.catalog.models:
        if serves(model.id):
            places, load = box.load.places(model.id), box.load.of(model.id)
            models.append(ModelCapacity(model.id, places, load.sequences_free, load.queue))
    node_id = box.identity.node_id
    name = names.get(node_id, "")
    return ExplorerBox(node_id, name, "this box", box.admission.draining, models)


def _peer(
    peer: Peer,
    names: Mapping[str, str],
    serves: Callable[[str], bool],
    seen: PeerUptime | None,
) -> ExplorerBox:
    advert = peer.advert
    offers = advert.models if advert is not None else ()
    models = [
        ModelCapacity(offer.id, offer.sequences, offer.sequences_free, offer.queue)
        for offer in offers
        if serves(offer.id)
    ]
    name = names.get(peer.node_id, "")
    draining = advert is not None and advert.draining
    shown = None
    if seen is not None:
        shown = SeenUptime(time_text(seen.since) or "", seen.known, seen.up)
    return ExplorerBox(peer.node_id, name, peer.state, draining, models, shown)


def _models(boxes: Iterable[ExplorerBox]) -> list[ExplorerModel]:
    """By their ids."""
    offers: dict[str, list[ModelCapacity]] = {}
    for box in boxes:
        for model in box.models:
            offers.setdefault(model.id, []).append(model)
    return [
        ExplorerModel(
            model_id,
            len(found),
            sum(each.sequences for each in found),
            sum(each.sequences_free for each in found),
            sum(each.queue for each in found),
        )
        for model_id, found in sorted(offers.items())
    ]


def _day(day: DayOfUptime) -> UptimeDay:
    date = datetime.fromtimestamp(day.began_at / 1000, UTC).date().isoformat()
    return UptimeDay(date, day.known, day.running)


def _incident(incident: Incident, names: Mapping[str, str]) -> IncidentView:
    return IncidentView(
        incident.kind,
        incident.subject,
        names.get(incident.subject, ""),
        time_text(incident.began_at) or "",
        time_text(incident.ended_at),
        incident.detail,
    )
