"""`/dashboard`: the box at a glance, for admins; `/dashboard/figures` is the part that is read
again while it is looked at."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from pinaivu_box.admin.overview import PERIODS, Overview, Period, overview
from pinaivu_box.box import Box
from pinaivu_box.server.admin_events import NodeNames, finished_view, now_view
from pinaivu_box.server.context import box_of
from pinaivu_box.server.pages import usage_charts
from pinaivu_box.server.pages.kept_overviews import KeptOverviews
from pinaivu_box.server.pages.render import page
from pinaivu_box.server.sessions import require_admin
from pinaivu_box.store.times import now_ms
from pinaivu_box.store.usage import By

_PARTS: tuple[By, ...] = ("model", "node", "key", "account")


async def dashboard(request: Request) -> Response:
    require_admin(request)
    box = box_of(request)
    names = await NodeNames(box).read()
    finished = [finished_view(each, box, names) for each in box.requests.activity.finished]
    return page(
        request,
        "dashboard/page.html",
        now=now_view(box, names),
        finished=finished[::-1][:20],
        periods=PERIODS,
        **await _figures(request),
    )


async def figures(request: Request) -> Response:
    require_admin(request)
    return page(request, "dashboard/figures.html", **await _figures(request))


async def _figures(request: Request) -> dict[str, Any]:
    shown = period_of(request)
    found = await overview_of(request, shown, _PARTS)
    return {"period": shown, "overview": found, **charts_of(found, box_of(request))}


async def overview_of(
    request: Request, period: Period, by: tuple[By, ...], account_id: str | None = None
) -> Overview:
    """Of the box, or of an account; if it takes long, one of the last minute."""
    box = box_of(request)
    kept: KeptOverviews = request.app.state.overviews
    return await kept.get(
        (account_id, period),
        lambda: overview(
            box.database, box.identity.node_id, period, by, now_ms(), account_id=account_id
        ),
    )


def charts_of(found: Overview, box: Box) -> dict[str, Any]:
    """What templates need to show an overview."""
    return {
        "charts": usage_charts.charts(found, box.config.pricing.currency),
        "rows": usage_charts.rows(found),
        "figures": usage_charts.figures(found),
        "times_of": usage_charts.times_of,
    }


def period_of(request: Request) -> Period:
    """That of the address; of an unknown one, a day."""
    asked = request.query_params.get("period", "")
    return next((each for each in PERIODS if each == asked), "24h")
