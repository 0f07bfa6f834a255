"""`/v1/receipts`.  A key sees the receipts of its account, an admin key all."""

from __future__ import annotations

import msgspec
from starlette.requests import Request

from pinaivu_box.admin.lists import Page, page_of
from pinaivu_box.errors import ReceiptNotFound
from pinaivu_box.receipts.receipt import ReceiptView, view
from pinaivu_box.server.auth import key_of
from pinaivu_box.server.context import box_of
from pinaivu_box.server.paging import PageQuery
from pinaivu_box.server.usage import key_id
from pinaivu_box.store import requests
from pinaivu_box.store.requests import ListedReceipt


class ReceiptQuery(PageQuery, frozen=True):
    """`after`: the request_id of the last receipt of the page before.  `key`: a name or an id.
    Empty parameters count as absent."""

    model: str | None = None
    key: str | None = None


class ReceiptOfKey(ReceiptView, frozen=True, kw_only=True):
    """As `GET /v1/receipts/{request_id}` shows it, without what opens its commitments; `key` is the
    id of the key that made the request."""

    key: str
    key_name: str


class ReceiptList(Page[ReceiptOfKey], frozen=True):
    """The newest first."""


async def list_receipts(request: Request, query: ReceiptQuery) -> ReceiptList:
    box, key = box_of(request), key_of(request)
    account_id = None if key.admin else key.account_id
    rows = await requests.list_receipts(
        box.database,
        account_id=account_id,
        key_id=await key_id(box, query.key, account_id) if query.key else None,
        model=query.model or None,
        after=query.after,
        limit=query.limit + 1,
    )
    return page_of(ReceiptList, [_listed(row) for row in rows], query.limit)


async def get_receipt(request: Request, request_id: str) -> ReceiptView:
    """An admin key does not get the openings of other accounts: those are for their owners."""
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
    return view(receipt.signed, receipt.signature, own.opening if own else None)


def _listed(row: ListedReceipt) -> ReceiptOfKey:
    fields = msgspec.structs.asdict(view(row.signed, row.signature, None))
    return ReceiptOfKey(**fields, key=row.key_id, key_name=row.key_name)
