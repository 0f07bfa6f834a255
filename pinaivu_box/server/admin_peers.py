"""`/v1/admin/peers`: the boxes that this one is in a network with."""

from __future__ import annotations

import io
import time
from collections.abc import Awaitable
from typing import Annotated, TypeVar

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType
from starlette.requests import Request

from pinaivu_box import amount
from pinaivu_box.box import Box
from pinaivu_box.config import parse_span
from pinaivu_box.errors import (
    Conflict,
    InvalidBody,
    PeeringError,
    PeerUnreachable,
    Unreachable,
)
from pinaivu_box.ledger import entry
from pinaivu_box.ledger.entry import Balance
from pinaivu_box.legs.admission import LegAdmission
from pinaivu_box.membership.records import Name
from pinaivu_box.membership.tickets import MAX_USES
from pinaivu_box.membership.tickets import decode as decode_ticket
from pinaivu_box.network import peer as views
from pinaivu_box.network.network import Network
from pinaivu_box.network.peer import OwnView, Peer, PeerView
from pinaivu_box.peering_config import PeeringConfig, is_host_port
from pinaivu_box.policy import LONGEST_LIFE
from pinaivu_box.routing.spending_limits import too_dear
from pinaivu_box.server.context import actor_of, box_of, named_field
from pinaivu_box.server.paging import ListAnswer
from pinaivu_box.store import peer_settings
from pinaivu_box.store.peer_settings import PeerLimits
from pinaivu_box.text import utc_text

T = TypeVar("T")
OFF = (
    "Peering is off on this box: start it with 'pinaivu serve --peering', or set enabled = true "
    "under [peering] in its configuration and restart it."
)


class Invite(Struct, frozen=True):
    """`name` is the name of the new box; `expires` counts from now ("1h").  An `admin` may invite
    and remove other boxes.  `qr`: also draw the ticket."""

    name: Name | None = None
    expires: str = "1h"
    uses: Annotated[int, Meta(ge=1, le=MAX_USES)] = 1
    admin: bool = False
    qr: bool = False


class NewInvitation(Struct, frozen=True):
    """`ticket` holds a secret: it is shown only now.  `qr` is a QR code of it as SVG, if it was
    asked for."""

    ticket: str
    expires_at: str
    uses: int
    name: str | None
    admin: bool
    request_id: str = ""
    qr: str = ""


class Join(Struct, frozen=True):
    """`at`: further addresses (HOST:PORT) of the box that issued the ticket."""

    ticket: str
    at: Annotated[tuple[Annotated[str, Meta(max_length=100)], ...], Meta(max_length=4)] = ()


class LimitChanges(Struct, frozen=True, forbid_unknown_fields=True):
    """What this peer may use; null restores the setting of `[peering]`."""

    max_parallel: Annotated[int, Meta(ge=0)] | UnsetType | None = UNSET
    tokens_per_minute: Annotated[int, Meta(ge=0)] | UnsetType | None = UNSET
    credit_limit: str | UnsetType | None = UNSET
    models: tuple[str, ...] | UnsetType | None = UNSET
    hours: str | UnsetType | None = UNSET
    blocked: Annotated[str, Meta(min_length=1, max_length=200)] | UnsetType | None = UNSET


class ChangePeer(Struct, frozen=True):
    """Only the fields that are present are changed.  `name` is used on this box alone; null
    restores the name in the peer's certificate."""

    name: Name | UnsetType | None = UNSET
    limits: LimitChanges = LimitChanges()


class Remove(Struct, frozen=True):
    """All members see the `reason`."""

    reason: Annotated[str, Meta(max_length=200)] = ""


class PeerList(ListAnswer, frozen=True):
    """`own` is this box as the others see it."""

    own: OwnView
    data: list[PeerView]


class Left(Struct, frozen=True):
    """The id of the network that this box was in."""

    network: str
    request_id: str = ""


_DEFAULT_INVITE = Invite()
_DEFAULT_REMOVAL = Remove()


async def list_peers(request: Request) -> PeerList:
    network, box = network_of(request), box_of(request)
    own = network.own_view(box.offers.describe(), box.config.peering.relay)
    return PeerList(own, await _views(request, network.peers()))


async def invite(request: Request, body: Invite = _DEFAULT_INVITE) -> NewInvitation:
    network = network_of(request)
    with named_field("body", "expires"):
        seconds = parse_span(body.expires)
        if not 0 < seconds <= LONGEST_LIFE:
            raise ValueError("it must be more than 0 and at most 36500d")
    ticket = await _peering(
        network.invite(body.name, seconds, body.uses, body.admin, actor_of(request))
    )
    expires_at = utc_text(decode_ticket(ticket).expires_at)
    drawing = _qr_code(ticket) if body.qr else ""
    return NewInvitation(ticket, expires_at, body.uses, body.name, body.admin, qr=drawing)


def _qr_code(ticket: str) -> str:
    """As SVG without a style of its own, which pages do not allow."""
    import segno  # takes a moment, and few need it

    # A ticket means the same in capitals, of which the code is smaller.
    code, drawing = segno.make(ticket.upper(), error="l"), io.BytesIO()
    code.save(drawing, kind="svg", xmldecl=False, nl=False, light="#fff", omitsize=True)
    return drawing.getvalue().decode()


async def join(request: Request, body: Join) -> PeerView:
    network = network_of(request)
    with named_field("body", "ticket"):
        decode_ticket(body.ticket)
    for number, address in enumerate(body.at):
        if not is_host_port(address):
            raise InvalidBody(f"'{address}' is not HOST:PORT", loc=("body", "at", number))
    inviter = await _peering(network.join(body.ticket, actor_of(request), body.at))
    return await _view(request, inviter)


async def get_peer(request: Request, peer: str) -> PeerView:
    """Raises PeerNotFound."""
    return await _view(request, network_of(request).peer(peer))


async def change_peer(request: Request, peer: str, body: ChangePeer) -> PeerView:
    """Raises PeerNotFound, and Conflict if another peer has the new name."""
    box, network = box_of(request), network_of(request)
    node_id = network.peer(peer).node_id
    name = None if body.name is UNSET else body.name or ""
    if name:
        _check_name_is_free(name, node_id, network)
    changes = msgspec.to_builtins(body.limits)
    with named_field("body", "limits"):
        await peer_settings.edit(
            box.database, node_id, actor_of(request), name=name, limits=changes
        )
    if box.peer_policies is not None:
        box.peer_policies.changed()
    await network.renamed()
    return await _view(request, network.peer(node_id))


async def remove_peer(request: Request, peer: str, body: Remove = _DEFAULT_REMOVAL) -> PeerView:
    """Raises PeerNotFound."""
    network = network_of(request)
    node_id = network.peer(peer).node_id
    removed = await _peering(network.remove(node_id, body.reason, actor_of(request)))
    return await _view(request, removed)


async def leave(request: Request) -> Left:
    """Raises Conflict if this box is in no network."""
    network = network_of(request)
    network_id = network.network_id
    if network_id is None:
        raise Conflict("This box is not a member of a network, so it cannot leave one.")
    await network.leave(actor_of(request))
    return Left(network_id)


def network_of(request: Request) -> Network:
    """Raises Conflict."""
    network = box_of(request).network
    if network is None:
        raise Conflict(OFF)
    return network


def _check_name_is_free(name: str, node_id: str, network: Network) -> None:
    """Raises Conflict if a peer other than `node_id` has that name."""
    if any(peer.name == name and peer.node_id != node_id for peer in network.peers()):
        raise Conflict(f"Another peer is called {name}: choose another name.")


async def _peering(operation: Awaitable[T]) -> T:
    """The result of an operation of the network.  Raises PeerUnreachable, Conflict."""
    try:
        return await operation
    except Unreachable as error:
        raise PeerUnreachable(error.message) from error
    except (PeeringError, ValueError) as error:
        raise Conflict(str(error)) from error


async def _view(request: Request, peer: Peer) -> PeerView:
    return (await _views(request, [peer]))[0]


async def _views(request: Request, peers: list[Peer]) -> list[PeerView]:
    box, network = box_of(request), network_of(request)
    services = box.peer_services
    assert services is not None  # as the network
    names = {peer.node_id: peer.name for peer in network.peers()} | {network.node_id: "this box"}
    limits = await peer_settings.all_limits(box.database)
    balances = await entry.balances(box.database)
    currency = box.config.pricing.currency
    peer_views = []
    for peer in peers:
        node_id = peer.node_id
        refusal = services.candidates.last_refusal(node_id)
        balance = balances.get(node_id, {}).get(currency, Balance())
        view = views.peer_view(
            peer,
            names.get(peer.inviter, peer.inviter),
            limits.get(node_id, PeerLimits()),
            views.Opinion(services.reputation.score(node_id), services.reputation.why(node_id)),
            await _use(services.serving.admission, node_id, currency),
            refusal and views.RefusalView(refusal[0], time.monotonic() - refusal[1]),
            cost=_cost(peer, balance, box.config.peering),
            audits=_audits(box, node_id),
            log_alarms=[
                views.LogAlarm(each.id, each.kind, utc_text(each.found_at / 1000), each.detail)
                for each in box.witnessing.alarms.counting(node_id)
            ],
        )
        peer_views.append(view)
    return peer_views


async def _use(admission: LegAdmission, node_id: str, currency: str) -> views.UseView:
    policy, quota = await admission.policy(node_id), await admission.quotas.of(node_id)
    debt = await admission.debt(node_id, currency)
    credit = policy.credit_limit
    return views.UseView(
        max_parallel=policy.max_parallel,
        running=quota.running,
        tokens_per_minute=policy.tokens_per_minute or None,
        tokens=quota.tokens.used,
        credit_limit=amount.to_text(amount.parse(credit)) if credit else None,
        owes=amount.to_text(debt.total),
        unaccepted=amount.to_text(debt.unaccepted),
        beyond=policy.beyond,
        models=policy.models,
        hours=policy.hours,
        open=policy.open,
    )


def _audits(box: Box, node_id: str) -> views.AuditsView:
    found = None if box.audits is None else box.audits.sampled.audits.get(node_id)
    if found is None:
        return views.NOT_AUDITED
    return views.AuditsView(found.audits, found.failed, found.disproved, found.undecided)


def _cost(peer: Peer, balance: Balance, peering: PeeringConfig) -> views.CostView:
    offers = peer.advert.models if peer.advert else ()
    return views.CostView(
        received=amount.to_text(balance.received),
        owes=amount.to_text(balance.owed_to_peer),
        max_debt=peering.max_debt or None,
        too_dear=[offer.id for offer in offers if too_dear(offer.price, peering)],
    )
