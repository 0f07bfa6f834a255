"""`GET /v1/usage`: what a key (an admin key: everybody) has used."""

from __future__ import annotations

from datetime import UTC, datetime

from starlette.requests import Request
from starlette.responses import Response

from pinaivu_box.box import Box
from pinaivu_box.errors import InvalidBody
from pinaivu_box.server.auth import key_of
from pinaivu_box.server.envelope import JSON
from pinaivu_box.store import requests
from pinaivu_box.store.usage_report import report

DAY_MS = 86_400_000
PARAMETERS = ("start_date", "end_date", "model")


async def usage(request: Request) -> Response:
    box: Box = request.app.state.box
    key = key_of(request)
    given = request.query_params
    for name in given:
        if name not in PARAMETERS:
            raise InvalidBody(
                f"'{name}' is not a parameter here: use {', '.join(PARAMETERS)}",
                loc=("query", name),
                kind="value_error.extra",
            )
    start = parse_date("start_date", given.get("start_date"))
    end = parse_date("end_date", given.get("end_date"))
    if start and end and end < start:
        raise InvalidBody("end_date is before start_date", loc=("query", "end_date"))
    rows = await requests.usage(
        box.database,
        key_id=None if key.admin else key.id,
        since=to_ms(start) if start else None,
        until=to_ms(end) + DAY_MS if end else None,  # the end date is included
        model=given.get("model"),
    )
    return JSON(report(rows, request.scope["state"]["request_id"], box.config.pricing.currency))


def parse_date(name: str, text: str | None) -> datetime | None:
    """`YYYY-MM-DD`, midnight UTC; None stays None.  Raises InvalidBody."""
    if text is None:
        return None
    try:
        return datetime.strptime(text, "%Y-%m-%d").replace(tzinfo=UTC)
    except ValueError:
        raise InvalidBody(
            f"'{text}' is not a date: write it as YYYY-MM-DD", loc=("query", name)
        ) from None


def to_ms(moment: datetime) -> int:
    return int(moment.timestamp() * 1000)
