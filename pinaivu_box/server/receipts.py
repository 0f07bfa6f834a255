"""`GET /v1/receipts` and `GET /v1/receipts/{request_id}`."""

from __future__ import annotations

import msgspec
from msgspec import Struct
from starlette.requests import Request
from starlette.responses import Response

from pinaivu_box.box import Box
from pinaivu_box.errors import ReceiptNotFound
from pinaivu_box.receipts.receipt import ReceiptView, view
from pinaivu_box.server.admin import Page, answer, box_of, query
from pinaivu_box.server.auth import key_of
from pinaivu_box.server.envelope import JSON
from pinaivu_box.server.usage import key_id
from pinaivu_box.store.requests import ListedReceipt, find_receipt, list_receipts


class ReceiptPage(Page, frozen=True):
    """`after`: the request_id of the last one of the page before.  `key`: by its name or id.  What
    is empty is not asked for."""

    model: str | None = None
    key: str | None = None


class ReceiptOfKey(ReceiptView, frozen=True, kw_only=True):
    """As `GET /v1/receipts/{request_id}` shows it, without what opens its commitments; `key` is the
    id of the key that made the request."""

    key: str
    key_name: str


class ReceiptList(Struct, frozen=True):
    """The newest first."""

    data: list[ReceiptOfKey]
    has_more: bool
    object: str = "list"
    request_id: str = ""


async def receipts(request: Request) -> Response:
    """A key sees the receipts of its account, an admin key all."""
    page, box, key = query(request, ReceiptPage), box_of(request), key_of(request)
    whose = None if key.admin else key.account_id
    found = await list_receipts(
        box.database,
        account_id=whose,
        key_id=await key_id(box, page.key, whose) if page.key else None,
        model=page.model or None,
        after=page.after,
        limit=page.limit + 1,
    )
    data = [_listed(one) for one in found[: page.limit]]
    return answer(request, ReceiptList(data, len(found) > page.limit))


async def receipt(request: Request) -> Response:
    """A key sees the receipts of its account, an admin key all (without the openings of others:
    those are for the owner)."""
    box: Box = request.app.state.box
    key = key_of(request)
    request_id = request.path_params["request_id"]
    mine = await find_receipt(box.database, request_id, account_id=key.account_id)
    found = mine or (
        await find_receipt(box.database, request_id, account_id=None) if key.admin else None
    )
    if found is None:
        raise ReceiptNotFound(
            f"There is no receipt of {request_id} for this key: check the request_id, and ask "
            "with a key of the account that made the request."
        )
    return JSON(view(found.signed, found.signature, mine.opening if mine else None))


def _listed(one: ListedReceipt) -> ReceiptOfKey:
    shown = msgspec.structs.asdict(view(one.signed, one.signature, None))
    return ReceiptOfKey(**shown, key=one.key_id, key_name=one.key_name)
