"""`/v1/admin/ledger`: what this box and its peers owe each other."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct
from starlette.requests import Request

from pinaivu_box.errors import Conflict, PeeringError
from pinaivu_box.ledger import claims, views
from pinaivu_box.ledger import entry as ledger_entry
from pinaivu_box.ledger import statement as ledger_statement
from pinaivu_box.ledger.session import PURPOSE
from pinaivu_box.server.context import actor_of, box_of
from pinaivu_box.server.paging import ListAnswer


class EntryQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """The newest `limit` entries; with `statement` only those in that statement."""

    limit: Annotated[int, Meta(ge=1, le=1000)] = 100
    statement: str | None = None


class StatementQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """`peer`: a name or a node id."""

    peer: str | None = None


class BalanceList(ListAnswer, frozen=True):
    data: list[views.BalanceView]


class EntryList(ListAnswer, frozen=True):
    data: list[views.EntryView]


class ForgivenView(Struct, frozen=True):
    """The number of entries that were written off, none of which the peer had accepted, and their
    sums by currency."""

    entries: int
    amounts: dict[str, str]
    request_id: str = ""


class StatementList(ListAnswer, frozen=True):
    data: list[views.StatementView]


class DisproofList(ListAnswer, frozen=True):
    """The newest first."""

    data: list[views.DisproofView]


async def list_balances(request: Request) -> BalanceList:
    box = box_of(request)
    return BalanceList(await views.all_balances(box.database, box.config.peering))


async def list_entries(request: Request, peer: str, query: EntryQuery) -> EntryList:
    database = box_of(request).database
    node_id = await _node_id(request, peer)
    entries = await ledger_entry.of_peer(
        database, node_id, limit=query.limit, statement=query.statement
    )
    return EntryList([views.entry_view(entry) for entry in entries])


async def list_statements(request: Request, query: StatementQuery) -> StatementList:
    node_id = None if query.peer is None else await _node_id(request, query.peer)
    return StatementList(await views.all_statements(box_of(request).database, node_id))


async def list_disproofs(request: Request, query: StatementQuery) -> DisproofList:
    node_id = None if query.peer is None else await _node_id(request, query.peer)
    return DisproofList(await views.all_disproofs(box_of(request).database, node_id))


async def settle(request: Request, peer: str) -> views.SettledView:
    """Raises PeerNotFound, and Conflict if the peer cannot be reached or breaks off."""
    box = box_of(request)
    node_id = await _node_id(request, peer)
    if box.network is None:
        raise Conflict(
            "Settling needs a connection to the peer, and peering is off on this box: start it "
            "with 'pinaivu serve --peering'."
        )
    try:
        stream = await box.network.open(node_id, PURPOSE)
        outcome = await box.ledger.settle(node_id, stream, by=actor_of(request))
    except PeeringError as error:
        raise Conflict(error.message) from error
    return await views.settled_view(box.database, outcome)


async def forgive(request: Request, peer: str) -> ForgivenView:
    database = box_of(request).database
    node_id = await _node_id(request, peer)
    forgiven = await claims.forgive(database, node_id, actor_of(request))
    return ForgivenView(forgiven.entries, forgiven.amounts)


async def mark_paid(request: Request, statement: str) -> views.StatementView:
    """Raises NotFound."""
    database = box_of(request).database
    await ledger_statement.pay(database, statement, actor_of(request))
    all_statements = await views.all_statements(database)
    return next(view for view in all_statements if view.id == statement)


async def _node_id(request: Request, name: str) -> str:
    """The node id of the peer with that name or id.  Raises PeerNotFound."""
    box = box_of(request)
    return await views.find(box.database, name, box.identity.node_id)
