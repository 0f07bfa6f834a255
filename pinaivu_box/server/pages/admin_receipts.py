"""`/admin/receipts`: the receipts of all accounts."""

from __future__ import annotations

from msgspec import Struct
from starlette.requests import Request
from starlette.responses import HTMLResponse

from pinaivu_box.admin.receipt_table import MAX_CSV_LINES
from pinaivu_box.server import receipts
from pinaivu_box.server.context import box_of
from pinaivu_box.server.pages.admin_page import admin_page, filtered
from pinaivu_box.server.pages.shown import query_of
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
    same = {name: getattr(query, name) for name in _FILTERS}
    wanted = ReceiptQuery(limit=_PAGE, after=query.after, **same)
    listed, problem = await filtered(receipts.list_lines(request, wanted))
    lines = listed[0] if listed else []
    return admin_page(
        request,
        "receipts.html",
        lines=lines,
        problem=problem,
        query=query,
        filtered=any(same.values()),
        models=[model.id for model in box_of(request).catalog.models],
        older=query_of(**same, after=lines[-1].request_id) if listed and listed[1] else "",
        newest=query_of(**same) or "?" if query.after else "",
        csv=query_of(**same, format="csv"),
        max_csv_lines=MAX_CSV_LINES,
    )
