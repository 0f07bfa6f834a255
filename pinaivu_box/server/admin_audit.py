"""`GET /v1/admin/audit`."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct
from starlette.requests import Request

from pinaivu_box.admin import lists
from pinaivu_box.admin.lists import AuditList
from pinaivu_box.admin.views import parse_time
from pinaivu_box.server.context import box_of, named_field


class AuditQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """`since` and `until` (not included): a date, or a date and time.  `target`: the id or name of
    a key, an account or a peer, `actor` that of a key or an account.  `action`: "key.create", or
    "key" for all that is done to keys.  Empty parameters count as absent."""

    limit: Annotated[int, Meta(ge=1, le=1000)] = 100
    after: Annotated[int, Meta(ge=0, le=2**63 - 1)] | None = None
    since: str | None = None
    target: str | None = None
    until: str | None = None
    actor: str | None = None
    action: str | None = None


async def list_audit_entries(request: Request, query: AuditQuery) -> AuditList:
    with named_field("query", "since"):
        since = parse_time(query.since) if query.since else 0
    with named_field("query", "until"):
        until = parse_time(query.until) if query.until else None
    return await lists.list_audit_entries(
        box_of(request).database,
        since=since,
        until=until,
        actor=query.actor or None,
        action=query.action or None,
        target=query.target or None,
        after=query.after,
        limit=query.limit,
    )
