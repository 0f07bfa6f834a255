"""The pages for admins under `/admin`, but for the audit trail."""

from __future__ import annotations

from typing import get_args

from msgspec import Struct
from starlette.requests import Request
from starlette.responses import HTMLResponse

from pinaivu_box.admin.receipt_table import MAX_CSV_LINES
from pinaivu_box.engine.messages import KvType
from pinaivu_box.ledger.views import BalanceView, all_balances
from pinaivu_box.models import catalog
from pinaivu_box.peering_config import RoutingPolicy
from pinaivu_box.policy import LOCAL_ONLY, SCOPES
from pinaivu_box.registry.reference import host_of
from pinaivu_box.server import (
    admin_accounts,
    admin_box,
    admin_keys,
    admin_models,
    admin_peers,
)
from pinaivu_box.server.admin_keys import KeyQuery
from pinaivu_box.server.admin_models import KnownQuery, ModelToShow
from pinaivu_box.server.context import box_of
from pinaivu_box.server.models import list_engines
from pinaivu_box.server.pages.render import page
from pinaivu_box.server.pages.shown import query_of, shown_list
from pinaivu_box.server.paging import PageQuery
from pinaivu_box.server.receipts import ReceiptQuery, list_lines
from pinaivu_box.server.sessions import require_admin
from pinaivu_box.store.accounts import OWNER

_KEYS, _ACCOUNTS, _RECEIPTS = 40, 50, 50  # on a page
_MAX_QUERY = 200
_RECEIPT_FILTERS = ("model", "key", "account", "start_date", "end_date")


async def engines(request: Request) -> HTMLResponse:
    require_admin(request)
    listed = await admin_box.list_devices(request)
    return page(
        request,
        "admin/engines.html",
        devices=listed.data,
        backends=listed.backends,
        failure=listed.failure,
        engines=(await list_engines(request)).data,
        upstreams=(await admin_box.list_upstreams(request)).data,
        has_models=bool(box_of(request).catalog.models),
    )


class ModelsQuery(Struct, frozen=True):
    """`q`: words to look for among the known models."""

    q: str = ""


class ModelQuery(Struct, frozen=True):
    model: str = ""


async def models(request: Request, query: ModelsQuery) -> HTMLResponse:
    require_admin(request)
    box, words = box_of(request), query.q[:_MAX_QUERY]
    files = await admin_models.list_model_files(request)
    known = await admin_models.list_known_models(request, KnownQuery(words))
    return page(
        request,
        "admin/models.html",
        models=files.data,
        not_served=files.not_served,
        known=known.data,
        available=known.available,
        words=words,
        folder=str(catalog.directory(box.config, box.home)),
        peering=box.network is not None,
        hub=host_of(box.config.registry.hub),
    )


async def model(request: Request, query: ModelQuery) -> HTMLResponse:
    """Raises ModelNotFound."""
    require_admin(request)
    box = box_of(request)
    shown = await admin_models.show(request, ModelToShow(query.model))
    state = next((each for each in admin_models.list_views(box) if each.id == shown.model), None)
    return page(
        request,
        "admin/model.html",
        model=shown,
        state=state,
        kv_types=get_args(KvType),
    )


class KeysQuery(Struct, frozen=True):
    """`q`: the beginning of names or secrets; `show`: all, or only those that are not revoked."""

    account: str = ""
    q: str = ""
    show: str = ""
    after: str = ""


async def keys(request: Request, query: KeysQuery) -> HTMLResponse:
    require_admin(request)
    every = query.show == "all"
    wanted = KeyQuery(
        limit=_KEYS,
        after=query.after,
        account=query.account,
        q=query.q[:_MAX_QUERY],
        usable=not every,
    )
    filters = {"account": query.account, "q": query.q, "show": query.show}
    listing = admin_keys.list_keys(request, wanted)
    return page(
        request,
        "admin/keys.html",
        listed=await shown_list(listing, filters, query.after),
        query=query,
        every=every,
        filtered=bool(query.q or query.account),
        scopes=(*SCOPES, LOCAL_ONLY),
        routing=get_args(RoutingPolicy),
    )


class AccountsQuery(Struct, frozen=True):
    """`after`: the name of the last account of the page before."""

    after: str = ""


async def accounts(request: Request, query: AccountsQuery) -> HTMLResponse:
    require_admin(request)
    wanted = PageQuery(limit=_ACCOUNTS, after=query.after)
    listed = await admin_accounts.list_accounts(request, wanted)
    return page(
        request,
        "admin/accounts.html",
        accounts=listed.data,
        owner=OWNER,
        next=query_of(after=listed.data[-1].name) if listed.has_more else "",
        first="?" if query.after else "",
        signup=box_of(request).config.login.signup,
    )


async def peers(request: Request) -> HTMLResponse:
    require_admin(request)
    box = box_of(request)
    if box.network is None:
        return page(request, "admin/peers_off.html", why=admin_peers.OFF)
    listed = await admin_peers.list_peers(request)
    balances: dict[str, list[BalanceView]] = {}
    for balance in await all_balances(box.database, box.config.peering):
        balances.setdefault(balance.peer, []).append(balance)
    return page(
        request,
        "admin/peers.html",
        own=listed.own,
        peers=listed.data,
        balances=balances,
        serve=box.config.peering.serve,
        has_models=bool(box.catalog.models),
    )


class ReceiptsPageQuery(Struct, frozen=True):
    """As `ReceiptQuery`, as a form sends it."""

    model: str = ""
    key: str = ""
    account: str = ""
    start_date: str = ""
    end_date: str = ""
    after: str = ""


async def receipts(request: Request, query: ReceiptsPageQuery) -> HTMLResponse:
    require_admin(request)
    filters = {name: getattr(query, name) for name in _RECEIPT_FILTERS}
    wanted = ReceiptQuery(limit=_RECEIPTS, after=query.after, **filters)
    listing = list_lines(request, wanted)
    return page(
        request,
        "admin/receipts.html",
        listed=await shown_list(listing, filters, query.after, "request_id"),
        query=query,
        filtered=any(filters.values()),
        models=[model.id for model in box_of(request).catalog.models],
        csv=query_of(**filters, format="csv"),
        max_csv_lines=MAX_CSV_LINES,
    )
