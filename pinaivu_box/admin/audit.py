"""The audit trail as the admin API and `pinaivu audit` show it."""

from __future__ import annotations

from pinaivu_box.admin.page import Page, page_of
from pinaivu_box.admin.views import AuditEntry, audit_view
from pinaivu_box.identity import NODE_PREFIX
from pinaivu_box.membership import peer_names
from pinaivu_box.store import audit
from pinaivu_box.store.database import Database


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
    entries = await audit.ls(
        database,
        since=since,
        targets=None if target is None else await _targets(database, target),
        after=after,
        limit=limit + 1,
    )
    names = await audit.names(database, entries)
    if any(entry.target.startswith(NODE_PREFIX) for entry in entries):
        names |= await peer_names.names(database)
    return page_of(entries, limit, lambda entry: audit_view(entry, names))


async def _targets(database: Database, name: str) -> list[str]:
    """That name, and the node ids of the peers that have it."""
    names = await peer_names.names(database)
    return [name, *(node for node, of_peer in names.items() if of_peer == name)]
