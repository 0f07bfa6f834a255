"""`/v1/receipts`.  A key sees the receipts of its account, an admin key all."""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from pinaivu_box.admin import receipt_table
from pinaivu_box.admin.lists import Page, page_of
from pinaivu_box.admin.receipt_table import ReceiptLine
from pinaivu_box.admin.usage_report import DAY_MS, parse_day
from pinaivu_box.errors import ReceiptNotFound, TranscriptNotFound
from pinaivu_box.receipts.receipt import ReceiptView, view
from pinaivu_box.receipts.transcript_view import TranscriptView, transcript_view
from pinaivu_box.server.auth import key_of
from pinaivu_box.server.context import box_of, named_field
from pinaivu_box.server.paging import PageQuery
from pinaivu_box.server.usage import account_id, key_id
from pinaivu_box.store import requests, transcripts
from pinaivu_box.store.requests import ListedReceipt, StoredReceipt


class ReceiptQuery(PageQuery, frozen=True):
    """`after`: the request_id of the last receipt of the page before.  `key` and `account`: a name
    or an id.  Days are in UTC, and `end_date` is included.  Empty parameters count as absent.

    With the format `csv` there is a line for each receipt, up to 100,000, whatever `limit` says."""

    model: str | None = None
    key: str | None = None
    account: str | None = None
    start_date: str | None = None
    end_date: str | None = None
    format: Literal["json", "csv"] = "json"


class ReceiptOfKey(ReceiptView, frozen=True, kw_only=True):
    """As `GET /v1/receipts/{request_id}` shows it, without what opens its commitments; `key` is the
    id of the key that made the request."""

    key: str
    key_name: str


class ReceiptList(Page[ReceiptOfKey], frozen=True):
    """The newest first."""


async def list_receipts(request: Request, query: ReceiptQuery) -> ReceiptList | Response:
    """Raises InvalidBody, Forbidden, NotFound."""
    box = box_of(request)
    selection = await _selection(request, query)
    if query.format == "csv":
        lines = receipt_table.csv_lines(box.database, after=query.after, **selection)
        headers = {"content-disposition": 'attachment; filename="receipts.csv"'}
        return StreamingResponse(lines, headers=headers, media_type="text/csv")
    rows = await requests.list_receipts(
        box.database, after=query.after or None, limit=query.limit + 1, **selection
    )
    return page_of(ReceiptList, [_listed(row) for row in rows], query.limit)


async def list_lines(request: Request, query: ReceiptQuery) -> Page[ReceiptLine]:
    """A page of receipts as lines of a table.  Raises InvalidBody, Forbidden, NotFound."""
    rows = await requests.list_receipts(
        box_of(request).database,
        after=query.after or None,
        limit=query.limit + 1,
        **await _selection(request, query),
    )
    return page_of(Page, [receipt_table.line_of(row) for row in rows], query.limit)


async def _selection(request: Request, query: ReceiptQuery) -> dict[str, Any]:
    """What `requests.list_receipts` is to select."""
    box, key = box_of(request), key_of(request)
    with named_field("query", "start_date"):
        since = parse_day(query.start_date) if query.start_date else 0
    with named_field("query", "end_date"):
        until = parse_day(query.end_date) + DAY_MS if query.end_date else None
    account = await account_id(box, key, query.account or None)
    return {
        "account_id": account,
        "key_id": await key_id(box, query.key, account) if query.key else None,
        "model": query.model or None,
        "since": since,
        "until": until,
    }


async def get_receipt(request: Request, request_id: str) -> ReceiptView:
    """An admin key does not get the openings of other accounts: those are for their owners."""
    receipt, is_own = await receipt_of(request, request_id)
    proof = await box_of(request).receipt_log.inclusion(request_id)
    opening = receipt.opening if is_own else None
    return view(receipt.signed, receipt.signature, opening, proof)


async def receipt_of(request: Request, request_id: str) -> tuple[StoredReceipt, bool]:
    """The receipt if the key may see it, and whether its account made the request.  Raises
    ReceiptNotFound."""
    database, key = box_of(request).database, key_of(request)
    own = await requests.find_receipt(database, request_id, account_id=key.account_id)
    receipt = own or (
        await requests.find_receipt(database, request_id, account_id=None) if key.admin else None
    )
    if receipt is None:
        raise ReceiptNotFound(
            f"There is no receipt of {request_id} for this key: check the request_id, and use a "
            "key of the account that made the request."
        )
    return receipt, own is not None


async def get_transcript(request: Request, request_id: str) -> TranscriptView:
    """As it is stored: a sealed one is opened by who has the secret, not here.

    Only the account's own keys get it, no admin key of another.  Raises TranscriptNotFound.
    """
    database, key = box_of(request).database, key_of(request)
    stored = await transcripts.find(database, request_id, account_id=key.account_id)
    if stored is None:
        raise TranscriptNotFound(
            f"There is no transcript of {request_id[:100]} for this key: boxes keep none unless "
            "[receipts] transcripts says so, and none of vectors, images and upstreams."
        )
    return transcript_view(request_id, stored.body, stored.sealed_to)


def _listed(row: ListedReceipt) -> ReceiptOfKey:
    fields = msgspec.structs.asdict(view(row.signed, row.signature, None))
    return ReceiptOfKey(**fields, key=row.key_id, key_name=row.key_name)
