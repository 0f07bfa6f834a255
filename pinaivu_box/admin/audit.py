"""The audit trail as the admin API and `pinaivu audit` show it."""

from __future__ import annotations

from pinaivu_box.admin.page import Page, page_of
from pinaivu_box.ledger.views import called, targets
from pinaivu_box.store import audit
from pinaivu_box.store.database import Database
from pinaivu_box.store.views import AuditEntry, audit_view


async def ls(
    database: Database,
    *,
    since: int = 0,
    target: str | None = None,
    after: int | None = None,
    limit: int,
) -> Page[AuditEntry]:
    """The newest entries since a time (Unix milliseconds), before the entry `after`.

    `target` is a key, an account or a peer, by name or id.
    """
    found = await audit.ls(
        database,
        since=since,
        targets=None if target is None else await targets(database, target),
        after=after,
        limit=limit + 1,
    )
    names = await called(database, found)
    return page_of(found, limit, lambda entry: audit_view(entry, names))
