"""`GET /v1/admin/audit`."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct
from starlette.requests import Request
from starlette.responses import Response

from pinaivu_box.errors import InvalidBody
from pinaivu_box.ledger.views import called, targets
from pinaivu_box.server.admin import answer, box_of, query
from pinaivu_box.store import audit
from pinaivu_box.store.views import AuditEntry, audit_view, parse_time


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
    database = box_of(request).database
    found = await audit.ls(
        database,
        since=since,
        targets=None if page.target is None else await targets(database, page.target),
        after=page.after,
        limit=page.limit + 1,
    )
    names = await called(database, found)
    data = [audit_view(entry, names) for entry in found[: page.limit]]
    return answer(request, AuditList(data, len(found) > page.limit))
