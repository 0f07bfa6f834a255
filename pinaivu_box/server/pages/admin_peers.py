"""`/admin/peers`: the network of this box."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import HTMLResponse

from pinaivu_box.ledger import views
from pinaivu_box.ledger.views import BalanceView
from pinaivu_box.server import admin_peers
from pinaivu_box.server.context import box_of
from pinaivu_box.server.pages.render import page
from pinaivu_box.server.sessions import require_admin


async def peers(request: Request) -> HTMLResponse:
    require_admin(request)
    box = box_of(request)
    if box.network is None:
        return page(request, "admin/peers_off.html", why=admin_peers.OFF)
    listed = await admin_peers.list_peers(request)
    balances: dict[str, list[BalanceView]] = {}
    for balance in await views.all_balances(box.database, box.config.peering):
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
