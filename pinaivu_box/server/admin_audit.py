"""`GET /v1/admin/audit`."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct
from starlette.requests import Request
from starlette.responses import Response

from pinaivu_box.admin import audit
from pinaivu_box.errors import InvalidBody
from pinaivu_box.server.admin import answer, box_of, query
from pinaivu_box.store.views import AuditEntry, parse_time


class AuditPage(Struct, frozen=True, forbid_unknown_fields=True):
    """`since`: a date, or a date and time.  `target`: a key, an account or a peer, by its id or
    name."""

    limit: Annotated[int, Meta(ge=1, le=1000)] = 100
    after: Annotated[int, Meta(ge=0, le=2**63 - 1)] | None = None
    since: str | None = None
    target: str | None = None


class AuditList(Struct, frozen=True):
    data: list[AuditEntry]
    has_more: bool
    object: str = "list"
    request_id: str = ""


async def ls(request: Request) -> Response:
    page = query(request, AuditPage)
    try:
        since = 0 if page.since is None else parse_time(page.since)
    except ValueError as error:
        raise InvalidBody(str(error), loc=("query", "since")) from None
    listed = await audit.ls(
        box_of(request).database,
        since=since,
        target=page.target,
        after=page.after,
        limit=page.limit,
    )
    return answer(request, AuditList(listed.data, listed.has_more))
