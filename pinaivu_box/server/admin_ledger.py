"""`/v1/admin/ledger`: what `pinaivu ledger` does, over HTTP."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct
from starlette.requests import Request
from starlette.responses import Response

from pinaivu_box.errors import Conflict, PeeringError
from pinaivu_box.ledger import claims, views
from pinaivu_box.ledger import statement as ledger_statement
from pinaivu_box.server.admin import answer, box_of, by, query


class EntryPage(Struct, frozen=True, forbid_unknown_fields=True):
    """The newest so many; `statement`: only what is in that one."""

    limit: Annotated[int, Meta(ge=1, le=1000)] = 100
    statement: str | None = None


class StatementQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """`peer`: a name or an id."""

    peer: str | None = None


class BalanceList(Struct, frozen=True):
    data: list[views.BalanceView]
    object: str = "list"
    request_id: str = ""


class EntryList(Struct, frozen=True):
    data: list[views.EntryView]
    object: str = "list"
    request_id: str = ""


class ForgivenView(Struct, frozen=True):
    """So many entries that the peer had not accepted were written off, and what they came to, by
    currency."""

    entries: int
    amounts: dict[str, str]
    request_id: str = ""


class StatementList(Struct, frozen=True):
    data: list[views.StatementView]
    object: str = "list"
    request_id: str = ""


async def ls(request: Request) -> Response:
    box = box_of(request)
    found = await views.all_balances(box.database, box.config.peering)
    return answer(request, BalanceList(found))


async def entries(request: Request) -> Response:
    page, database = query(request, EntryPage), box_of(request).database
    peer = await _peer(request, request.path_params["peer"])
    found = await ledger_statement.of_peer(
        database, peer, limit=page.limit, statement=page.statement
    )
    return answer(request, EntryList([views.entry_view(one) for one in found]))


async def all_statements(request: Request) -> Response:
    asked, database = query(request, StatementQuery), box_of(request).database
    peer = None if asked.peer is None else await _peer(request, asked.peer)
    return answer(request, StatementList(await views.all_statements(database, peer)))


async def settle(request: Request) -> Response:
    """Raises Conflict if the peer cannot be reached, or breaks off."""
    box = box_of(request)
    peer = await _peer(request, request.path_params["peer"])
    if box.network is None:
        raise Conflict(
            "Settling needs a link to the peer, and peering is off on this box: start it with "
            "'pinaivu serve --peering'."
        )
    try:
        outcome = await box.ledger.settle(
            peer, await box.network.open(peer, "ledger"), by=by(request)
        )
    except PeeringError as error:
        raise Conflict(error.message) from error
    return answer(request, views.settled_view(outcome, await views.names(box.database)))


async def forgive(request: Request) -> Response:
    database = box_of(request).database
    peer = await _peer(request, request.path_params["peer"])
    made = await claims.forgive(database, peer, by(request))
    return answer(request, ForgivenView(made.entries, made.amounts))


async def paid(request: Request) -> Response:
    """Raises NotFound."""
    database, statement = box_of(request).database, request.path_params["statement"]
    await ledger_statement.pay(database, statement, by(request))
    found = await views.all_statements(database)
    return answer(request, next(one for one in found if one.id == statement))


async def _peer(request: Request, text: str) -> str:
    """The node_id of the peer that is named so.  Raises PeerNotFound."""
    box = box_of(request)
    return await views.find(box.database, text, box.identity.node_id)
