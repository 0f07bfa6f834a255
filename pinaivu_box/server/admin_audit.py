"""`GET /v1/admin/audit`."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct
from starlette.requests import Request

from pinaivu_box.admin import audit
from pinaivu_box.admin.views import AuditEntry, parse_time
from pinaivu_box.errors import InvalidBody
from pinaivu_box.server.context import box_of


class AuditQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """`since`: a date, or a date and time.  `target`: the id or name of a key, an account or a
    peer."""

    limit: Annotated[int, Meta(ge=1, le=1000)] = 100
    after: Annotated[int, Meta(ge=0, le=2**63 - 1)] | None = None
    since: str | None = None
    target: str | None = None


class AuditList(Struct, frozen=True):
    data: list[AuditEntry]
    has_more: bool
    object: str = "list"
    request_id: str = ""


async def list_audit_entries(request: Request, query: AuditQuery) -> AuditList:
    try:
        since = 0 if query.since is None else parse_time(query.since)
    except ValueError as error:
        raise InvalidBody(str(error), loc=("query", "since")) from None
    page = await audit.ls(
        box_of(request).database,
        since=since,
        target=query.target,
        after=query.after,
        limit=query.limit,
    )
    return AuditList(page.data, page.has_more)
