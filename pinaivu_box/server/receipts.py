"""`GET /v1/receipts/{request_id}`."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from pinaivu_box.box import Box
from pinaivu_box.errors import ReceiptNotFound
from pinaivu_box.receipts.receipt import view
from pinaivu_box.server.auth import key_of
from pinaivu_box.server.envelope import JSON
from pinaivu_box.store.requests import find_receipt


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
