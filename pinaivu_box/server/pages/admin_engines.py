"""`/admin/engines`: the devices, and the engines on them."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import HTMLResponse

from pinaivu_box.server import admin_devices, admin_upstreams, models
from pinaivu_box.server.context import box_of
from pinaivu_box.server.pages.render import page
from pinaivu_box.server.sessions import require_admin


async def engines(request: Request) -> HTMLResponse:
    require_admin(request)
    listed = await admin_devices.list_devices(request)
    return page(
        request,
        "admin/engines.html",
        devices=listed.data,
        backends=listed.backends,
        failure=listed.failure,
        engines=(await models.list_engines(request)).data,
        upstreams=(await admin_upstreams.list_upstreams(request)).data,
        has_models=bool(box_of(request).catalog.models),
    )
