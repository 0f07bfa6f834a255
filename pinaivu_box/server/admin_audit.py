"""`GET /v1/admin/audit`."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct
from starlette.requests import Request

from pinaivu_box.errors import InvalidBody
from pinaivu_box.ledger.views import called, targets
from pinaivu_box.server.context import box_of
from pinaivu_box.store import audit
from pinaivu_box.store.views import AuditEntry, audit_view, parse_time


class AuditPage(Struct, frozen=True, forbid_unknown_fields=True):
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


async def list_audit_entries(request: Request, query: AuditPage) -> AuditList:
    try:
        since = 0 if query.since is None else parse_time(query.since)
    except ValueError as error:
        raise InvalidBody(str(error), loc=("query", "since")) from None
    database = box_of(request).database
    entries = await audit.ls(
        database,
        since=since,
        targets=None if query.target is None else await targets(database, query.target),
        after=query.after,
        limit=query.limit + 1,
    )
    names = await called(database, entries)
    views = [audit_view(entry, names) for entry in entries[: query.limit]]
    return AuditList(views, len(entries) > query.limit)
