"""`/v1/admin/peers`: what `pinaivu peers` does, over HTTP."""

from __future__ import annotations

import time
from collections.abc import Awaitable
from typing import Annotated, TypeVar

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType
from starlette.requests import Request
from starlette.responses import Response

from pinaivu_box import amount
from pinaivu_box.box import Box
from pinaivu_box.config import is_host_port, parse_span
from pinaivu_box.errors import (
    Conflict,
    InvalidBody,
    PeeringError,
    PeerUnreachable,
    Unreachable,
)
from pinaivu_box.ledger import entry
from pinaivu_box.ledger.entry import Balance
from pinaivu_box.membership.records import Name
from pinaivu_box.membership.tickets import MAX_USES, TicketInvalid
from pinaivu_box.membership.tickets import decode as decode_ticket
from pinaivu_box.network import peer as views
from pinaivu_box.network.network import Network
from pinaivu_box.network.peer import OwnView, Peer, PeerView
from pinaivu_box.policy import LONGEST_LIFE
from pinaivu_box.receipts.receipt import utc_text
from pinaivu_box.server.admin import answer, body, box_of, by
from pinaivu_box.store import peer_settings
from pinaivu_box.store.peer_settings import PeerSettings

T = TypeVar("T")
OFF = (
    "Peering is off on this box: start it with 'pinaivu serve --peering', or set enabled = true "
    "under [peering] in its configuration and start it anew."
)


class Invite(Struct, frozen=True):
    """`name` is what the newcomer will be called; `expires` is from now ("1h").  `admin`: it may
    invite and remove others as this box does."""

    name: Name | None = None
    expires: str = "1h"
    uses: Annotated[int, Meta(ge=1, le=MAX_USES)] = 1
    admin: bool = False


class NewInvitation(Struct, frozen=True):
    """`ticket` holds a secret: it is shown only now."""

    ticket: str
    expires_at: str
    uses: int
    name: str | None
    admin: bool
    request_id: str = ""


class JoinBody(Struct, frozen=True):
    """`at`: addresses (HOST:PORT) of the inviter that its ticket does not know."""

    ticket: str
    at: Annotated[tuple[Annotated[str, Meta(max_length=100)], ...], Meta(max_length=4)] = ()


class LimitChanges(Struct, frozen=True, forbid_unknown_fields=True):
    """What this peer may ask of us; null puts a setting back to what `[peering]` says."""

    max_parallel: Annotated[int, Meta(ge=0)] | UnsetType | None = UNSET
    tokens_per_minute: Annotated[int, Meta(ge=0)] | UnsetType | None = UNSET
    credit_limit: str | UnsetType | None = UNSET
    models: tuple[str, ...] | UnsetType | None = UNSET
    hours: str | UnsetType | None = UNSET
    blocked: Annotated[str, Meta(min_length=1, max_length=200)] | UnsetType | None = UNSET


class ChangePeer(Struct, frozen=True):
    """What is given is changed.  `name` is ours alone; null: as its certificate calls it."""

    name: Name | UnsetType | None = UNSET
    limits: LimitChanges = LimitChanges()


class RemoveBody(Struct, frozen=True):
    """All members are told the `reason`."""

    reason: Annotated[str, Meta(max_length=200)] = ""


class PeerList(Struct, frozen=True):
    """`own`: this box as the others see it."""

    own: OwnView
    data: list[PeerView]
    object: str = "list"
    request_id: str = ""


class Left(Struct, frozen=True):
    """The network that this box was in."""

    network: str
    request_id: str = ""


async def ls(request: Request) -> Response:
    network, box = _network(request), box_of(request)
    own = network.own_view(box.offers.describe().models, box.config.peering.relay)
    return answer(request, PeerList(own, await _views(request, network.peers())))


async def invite(request: Request) -> Response:
    given = await body(request, Invite, empty=b"{}")
    network = _network(request)
    try:
        seconds = parse_span(given.expires)
        if not 0 < seconds <= LONGEST_LIFE:
            raise ValueError("it is more than 0 and at most 36500d")
    except ValueError as error:
        raise InvalidBody(str(error), loc=("body", "expires")) from None
    ticket = await _asked(network.invite(given.name, seconds, given.uses, given.admin, by(request)))
    ends = utc_text(decode_ticket(ticket).expires_at)
    return answer(request, NewInvitation(ticket, ends, given.uses, given.name, given.admin))


async def join(request: Request) -> Response:
    given = await body(request, JoinBody)
    network = _network(request)
    try:
        decode_ticket(given.ticket)
    except TicketInvalid as error:
        raise InvalidBody(str(error), loc=("body", "ticket")) from None
    for number, address in enumerate(given.at):
        if not is_host_port(address):
            raise InvalidBody(f"'{address}' is not HOST:PORT", loc=("body", "at", number))
    peer = await _asked(network.join(given.ticket, by(request), given.at))
    return answer(request, await _view(request, peer))


async def get(request: Request) -> Response:
    return answer(request, await _view(request, _named(request)))


async def change(request: Request) -> Response:
    given = await body(request, ChangePeer)
    box, network, peer = box_of(request), _network(request), _named(request)
    name = None if given.name is UNSET else given.name or ""
    if name:
        _check_free(name, peer, network)
    changes = {
        name: value
        for name, value in msgspec.structs.asdict(given.limits).items()
        if value is not UNSET
    }
    try:
        await peer_settings.edit(box.database, peer.node_id, by(request), name=name, limits=changes)
    except ValueError as error:
        raise InvalidBody(str(error), loc=("body", "limits")) from None
    if box.books is not None:
        box.books.changed()
    await network.renamed()
    return answer(request, await _view(request, network.peer(peer.node_id)))


async def remove(request: Request) -> Response:
    given = await body(request, RemoveBody, empty=b"{}")
    network, peer = _network(request), _named(request)
    gone = await _asked(network.remove(peer.node_id, given.reason, by(request)))
    return answer(request, await _view(request, gone))


async def leave(request: Request) -> Response:
    network = _network(request)
    left = network.network_id
    if left is None:
        raise Conflict("This box belongs to no network: there is none to leave.")
    await network.leave(by(request))
    return answer(request, Left(left))


def _network(request: Request) -> Network:
    """Raises Conflict."""
    network = box_of(request).network
    if network is None:
        raise Conflict(OFF)
    return network


def _named(request: Request) -> Peer:
    """Raises PeerNotFound."""
    return _network(request).peer(request.path_params["peer"])


def _check_free(name: str, peer: Peer, network: Network) -> None:
    """Raises Conflict if another is called so."""
    if any(one.name == name and one.node_id != peer.node_id for one in network.peers()):
        raise Conflict(f"Another peer is called {name}: choose another name.")


async def _asked(doing: Awaitable[T]) -> T:
    """Raises PeerUnreachable, Conflict."""
    try:
        return await doing
    except Unreachable as error:
        raise PeerUnreachable(error.message) from error
    except (PeeringError, ValueError) as error:
        raise Conflict(str(error)) from error


async def _view(request: Request, peer: Peer) -> PeerView:
    return (await _views(request, [peer]))[0]


async def _dealings(
    box: Box, peer: str
) -> tuple[views.OpinionView, views.UseView, views.RefusalView | None] | tuple[()]:
    """What we think of a peer, what it has of this box, and what it refused us with."""
    if box.pool is None:
        return ()
    opinion, guests = box.pool.reputation, box.pool.serving.guests
    terms, use = await guests.terms(peer), guests.use(peer)
    owed = await guests.owes(peer, box.config.pricing.currency)
    refused = box.pool.candidates.refusals.get(peer)
    return (
        views.OpinionView(opinion.score(peer), opinion.why(peer)),
        views.UseView(
            max_parallel=terms.max_parallel,
            running=use.running,
            tokens_per_minute=terms.tokens_per_minute,
            tokens=use.tokens.used(time.monotonic()),
            credit_limit=None if terms.credit is None else amount.to_text(terms.credit),
            owes=amount.to_text(owed.total),
            unaccepted=amount.to_text(owed.unaccepted),
            beyond="idle" if terms.idle_beyond else "refuse",
            models=terms.models,
            hours=terms.hours,
            open=terms.open,
        ),
        refused and views.RefusalView(refused[0], time.monotonic() - refused[1]),
    )


def _cost(box: Box, peer: Peer, balances: dict[str, Balance]) -> views.CostView:
    config = box.config
    mine = balances.get(config.pricing.currency, Balance())
    offers = peer.advert.models if peer.advert else ()
    ceilings = None if box.pool is None else box.pool.candidates.ceilings
    return views.CostView(
        received=amount.to_text(mine.received),
        owes=amount.to_text(mine.owed_to_peer),
        max_debt=config.peering.max_debt or None,
        too_dear=[one.id for one in offers if ceilings and ceilings.too_dear(one.price)],
    )


async def _views(request: Request, shown: list[Peer]) -> list[PeerView]:
    network = _network(request)
    names = {one.node_id: one.name for one in network.peers()} | {network.node_id: "this box"}
    settings = await peer_settings.ls(box_of(request).database)
    balances = await entry.balances(box_of(request).database)
    return [
        views.peer_view(
            peer,
            names.get(peer.inviter, peer.inviter),
            settings.get(peer.node_id, PeerSettings()).limits,
            *await _dealings(box_of(request), peer.node_id),
            cost=_cost(box_of(request), peer, balances.get(peer.node_id, {})),
        )
        for peer in shown
    ]
