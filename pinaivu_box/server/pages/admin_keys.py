"""`/admin/keys`: the API keys of all accounts."""

from __future__ import annotations

from typing import get_args

from msgspec import Struct
from starlette.requests import Request
from starlette.responses import HTMLResponse

from pinaivu_box.config import RoutingPolicy
from pinaivu_box.policy import LOCAL_ONLY, SCOPES
from pinaivu_box.server import admin_keys
from pinaivu_box.server.admin_keys import KeyQuery
from pinaivu_box.server.pages.render import page
from pinaivu_box.server.pages.shown import shown_list
from pinaivu_box.server.sessions import require_admin

_PAGE = 40
_MAX_QUERY = 200


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
        limit=_PAGE,
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
