"""The audit trail: who changed what, when, from where.  The database lets nobody change a row."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import msgspec

from pinaivu_box.store.database import Database, SqlStatement
from pinaivu_box.store.times import now_ms, time_text


class Actor(msgspec.Struct, frozen=True):
    """`name` is a key's id or `cli:USER`, `source` an IP address or `local`."""

    name: str
    source: str


BOX = Actor("box", "local")  # of itself


class AuditEntry(msgspec.Struct, frozen=True):
    """An action of `actor` (a key's id, or cli:USER) at an RFC 3339 time; `detail` has what was
    set.  `actor_name` and `target_name` are their present names, null if they have none."""

    id: int
    at: str
    actor: str
    source: str
    action: str
    target: str
    detail: dict[str, Any]
    actor_name: str | None = None
    target_name: str | None = None


def record(by: Actor, action: str, target: str, **detail: Any) -> SqlStatement:
    """The statement that records an action, for the transaction of the action and right after it:
    it records nothing if the statement before it has changed nothing."""
    text = msgspec.json.encode(detail).decode()
    return (
        "INSERT INTO audit (at, actor, source, action, target, detail)"
        " SELECT ?, ?, ?, ?, ?, ? WHERE changes() > 0",
        (now_ms(), by.name, by.source, action, target, text),
    )


def _name_of(column: str) -> str:
    """The present name of a key or an account, in SQL."""
    return (
        f"coalesce((SELECT name FROM keys WHERE id = {column} AND name <> ''),"
        f" (SELECT name FROM accounts WHERE id = {column})) AS {column}_name"
    )


async def ls(
    database: Database,
    *,
    since: int = 0,
    targets: Collection[str] | None = None,
    after: int | None = None,
    limit: int = 100,
) -> list[AuditEntry]:
    """The newest `limit` entries since a time and before the entry `after`, newest first; with
    `targets`, ids or names of keys and accounts, only what was done to these."""
    named = None if targets is None else msgspec.json.encode(list(targets)).decode()
    wanted = "(SELECT value FROM json_each(?2))"
    rows = await database.scan(
        "SELECT id, at, actor, source, action, target, detail,"
        f" {_name_of('actor')}, {_name_of('target')} FROM audit"
        f" WHERE at >= ?1 AND (?2 IS NULL OR target IN {wanted}"
        f"  OR target IN (SELECT id FROM keys WHERE name IN {wanted})"
        f"  OR target IN (SELECT id FROM accounts WHERE name IN {wanted}))"
        " AND (?3 IS NULL OR id < ?3) ORDER BY id DESC LIMIT ?4",
        (since, named, after, limit),
    )
    return [
        AuditEntry(
            **{
                **dict(row),
                "at": time_text(row["at"]),
                "detail": msgspec.json.decode(row["detail"]),
            }
        )
        for row in rows
    ]
