"""`/admin/accounts`."""

from __future__ import annotations

from msgspec import Struct
from starlette.requests import Request
from starlette.responses import HTMLResponse

from pinaivu_box.server import admin_accounts
from pinaivu_box.server.context import box_of
from pinaivu_box.server.pages.render import page
from pinaivu_box.server.pages.shown import query_of
from pinaivu_box.server.paging import PageQuery
from pinaivu_box.server.sessions import require_admin
from pinaivu_box.store.accounts import OWNER

_PAGE = 50


class AccountsQuery(Struct, frozen=True):
    """`after`: the name of the last account of the page before."""

    after: str = ""


async def accounts(request: Request, query: AccountsQuery) -> HTMLResponse:
    require_admin(request)
    wanted = PageQuery(limit=_PAGE, after=query.after)
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
