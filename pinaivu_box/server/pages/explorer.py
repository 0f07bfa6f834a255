"""The explorer's pages: they show what `/v1/explorer` returns."""

from __future__ import annotations

import re

import msgspec
from msgspec import Struct
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from pinaivu_box.amount import parse
from pinaivu_box.box import Box
from pinaivu_box.errors import ReceiptNotFound
from pinaivu_box.incidents import DAYS
from pinaivu_box.receipts.receipt import Receipt
from pinaivu_box.server.context import box_of
from pinaivu_box.server.explorer import (
    Visitor,
    names_for,
    network_for,
    receipt_for,
    visitor_of,
)
from pinaivu_box.server.explorer_boxes import NamedBox
from pinaivu_box.server.explorer_network import MAX_INCIDENTS, ExplorerNetwork, UptimeDay
from pinaivu_box.server.pages.render import page
from pinaivu_box.server.paths import forwarded_prefix
from pinaivu_box.server.sessions import require_login
from pinaivu_box.store import requests, transcripts
from pinaivu_box.text import REQUEST_ID

_REQUEST_ID = re.compile(REQUEST_ID)
_RECENT = 25
_BAR_STEP, _BAR_HEIGHT = 8, 36  # of the uptime's chart, in its own units


class SearchQuery(Struct, frozen=True):
    """`id`: a request_id, as somebody typed it."""

    id: str = ""


class RecentReceipt(Struct, frozen=True):
    """`amount` in 10^-9 of the currency."""

    request_id: str
    timestamp: str
    model: str
    node: NamedBox
    tokens: int
    amount: int
    currency: str


class Bar(Struct, frozen=True):
    """A day of the uptime's chart: where it is, how high, and what it says.  Of days that nothing
    is known of there is none."""

    x: int
    y: float
    height: float
    kind: str
    title: str


async def search(request: Request, query: SearchQuery) -> Response:
    visitor = _visitor(request)
    wanted = query.id.strip().lower()
    if _REQUEST_ID.search(wanted):
        return RedirectResponse(f"{forwarded_prefix(request.headers)}/explorer/r/{wanted}", 303)
    return page(
        request,
        "explorer.html",
        wanted=query.id[:200],
        public=visitor.key is None,
        recent=await _recent(request, visitor),
    )


async def receipt(request: Request, request_id: str) -> Response:
    box, visitor = box_of(request), _visitor(request)
    if not _REQUEST_ID.search(request_id):
        raise ReceiptNotFound(f"{request_id[:100]} is not a request_id.")
    shown = await receipt_for(box, visitor, request_id)
    own = await _owner(box, visitor, request_id)
    return page(
        request,
        "explorer_receipt.html",
        shown=shown,
        public=visitor.key is None,
        cost=parse(shown.payment_amount),
        own=own is not None,
        kept=own is not None and await _keeps(box, request_id, own),
        all_hold=all(check.ok for check in shown.checks),
        file_name=f"receipt-{shown.request_id}.json",
    )


async def _owner(box: Box, visitor: Visitor, request_id: str) -> str | None:
    """The visitor's account, if it made the request, so that it gets the openings."""
    if visitor.key is None:
        return None
    account_id = visitor.key.account_id
    found = await requests.find_receipt(box.database, request_id, account_id=account_id)
    return account_id if found is not None else None


async def _keeps(box: Box, request_id: str, account_id: str) -> bool:
    """Whether this box has the transcript."""
    found = await transcripts.find(box.database, request_id, account_id=account_id)
    return found is not None


async def receipt_file(request: Request, request_id: str) -> Response:
    """The receipt as `pinaivu receipts verify` reads it."""
    found = await receipt_for(box_of(request), _visitor(request), request_id)
    if found.receipt is None:
        raise ReceiptNotFound(found.withheld or "")
    headers = {
        "content-disposition": f'attachment; filename="receipt-{found.request_id}.json"',
        "cache-control": "no-store",
        "x-content-type-options": "nosniff",
    }
    data = msgspec.json.encode(found.receipt)
    return Response(data, headers=headers, media_type="application/json")


async def network(request: Request) -> Response:
    visitor = _visitor(request)
    shown = await network_for(box_of(request), visitor)
    known, running = (
        sum(getattr(day, name) for day in shown.uptime) for name in ("known", "running")
    )
    return page(
        request,
        "explorer_network.html",
        shown=shown,
        public=visitor.key is None,
        reachable=_reachable(shown),
        bars=_bars(shown.uptime),
        days=DAYS,
        most_incidents=MAX_INCIDENTS,
        bar_step=_BAR_STEP,
        bar_height=_BAR_HEIGHT,
        share=percent(running, known),
        seen={box.id: percent(box.seen.up, box.seen.known) for box in shown.boxes if box.seen},
    )


def percent(part: int, whole: int) -> str:
    """Never rounded up to 100 %: a minute that is missing is seen."""
    if not whole:
        return "-"
    hundredths = part * 10_000 // whole
    return f"{hundredths / 100:.2f} %" if part < whole else "100 %"


def _visitor(request: Request) -> Visitor:
    """Raises LoginNeeded where one has to log in, Forbidden."""
    state, config = request.scope["state"], box_of(request).config.explorer
    if state.get("key") is None and config.access != "public":
        require_login(request)
    return visitor_of(request)


async def _recent(request: Request, visitor: Visitor) -> list[RecentReceipt]:
    """None for the public, which has to know a request_id."""
    if visitor.key is None:
        return []
    box = box_of(request)
    rows = await requests.list_receipts(box.database, account_id=visitor.account_id, limit=_RECENT)
    names = names_for(box, visitor)
    found = []
    for row in rows:
        signed = msgspec.json.decode(row.signed, type=Receipt)
        found.append(
            RecentReceipt(
                signed.request_id,
                signed.timestamp,
                signed.model,
                NamedBox(signed.node_id, names.get(signed.node_id, "")),
                signed.usage.prompt_tokens + signed.usage.completion_tokens,
                parse(signed.payment_amount),
                signed.currency,
            )
        )
    return found


def _reachable(shown: ExplorerNetwork) -> int:
    return sum(box.state in ("this box", "connected") or bool(box.models) for box in shown.boxes)


def _bars(days: list[UptimeDay]) -> list[Bar]:
    bars = []
    for number, day in enumerate(days):
        height = round(_BAR_HEIGHT * day.running / max(1, day.known), 2)
        share = percent(day.running, day.known)
        kind = "ok" if day.running * 100 >= day.known * 99 else "warn" if day.running else "bad"
        x = (DAYS - len(days) + number) * _BAR_STEP
        bars.append(Bar(x, _BAR_HEIGHT - height, height, kind, f"{day.day}: {share}"))
    return bars
