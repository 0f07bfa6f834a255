"""`/admin/receipts`: the receipts of all accounts."""

from __future__ import annotations

from msgspec import Struct
from starlette.requests import Request
from starlette.responses import HTMLResponse

from pinaivu_box.admin.receipt_table import MAX_CSV_LINES
from pinaivu_box.server import receipts
from pinaivu_box.server.context import box_of
from pinaivu_box.server.pages.render import page
from pinaivu_box.server.pages.shown import query_of, shown_list
from pinaivu_box.server.receipts import ReceiptQuery
from pinaivu_box.server.sessions import require_admin

_PAGE = 50
_FILTERS = ("model", "key", "account", "start_date", "end_date")


class ReceiptsPageQuery(Struct, frozen=True):
    """As `ReceiptQuery`, as a form sends it."""

    model: str = ""
    key: str = ""
    account: str = ""
    start_date: str = ""
    end_date: str = ""
    after: str = ""


async def list_receipts(request: Request, query: ReceiptsPageQuery) -> HTMLResponse:
    require_admin(request)
    filters = {name: getattr(query, name) for name in _FILTERS}
    wanted = ReceiptQuery(limit=_PAGE, after=query.after, **filters)
    listing = receipts.list_lines(request, wanted)
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
