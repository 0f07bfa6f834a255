"""The audit trail: who changed what, when, from where.  The database lets nobody change a row."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import msgspec

from pinaivu_box.store.database import Database, Row, SqlStatement
from pinaivu_box.store.times import now_ms


class Actor(msgspec.Struct, frozen=True):
    """`name` is a key's id or `cli:USER`, `source` an IP address or `local`."""

    name: str
    source: str


BOX = Actor("box", "local")  # of itself


class AuditRow(msgspec.Struct, frozen=True):
    """`at` in Unix milliseconds; `detail` has what was set."""

    id: int
    at: int
    actor: str
    source: str
    action: str
    target: str
    detail: dict[str, Any]


def record(by: Actor, action: str, target: str, **detail: Any) -> SqlStatement:
    """The statement that records an action, for the transaction of the action and right after it:
    it records nothing if the statement before it has changed nothing."""
    text = msgspec.json.encode(detail).decode()
    return (
        "INSERT INTO audit (at, actor, source, action, target, detail)"
        " SELECT ?, ?, ?, ?, ?, ? WHERE changes() > 0",
        (now_ms(), by.name, by.source, action, target, text),
    )


async def ls(
    database: Database,
    *,
    since: int = 0,
    targets: Collection[str] | None = None,
    after: int | None = None,
    limit: int = 100,
) -> list[AuditRow]:
    """The newest `limit` entries since a time and before the entry `after`, newest first; with
    `targets`, ids or names of keys and accounts, only what was done to these."""
    named = None if targets is None else msgspec.json.encode(list(targets)).decode()
    them = "(SELECT value FROM json_each(?2))"
    rows = await database.scan(
        "SELECT id, at, actor, source, action, target, detail FROM audit"
        f" WHERE at >= ?1 AND (?2 IS NULL OR target IN {them}"
        f"  OR target IN (SELECT id FROM keys WHERE name IN {them})"
        f"  OR target IN (SELECT id FROM accounts WHERE name IN {them}))"
        " AND (?3 IS NULL OR id < ?3) ORDER BY id DESC LIMIT ?4",
        (since, named, after, limit),
    )
    return [_entry(row) for row in rows]


async def names(database: Database, entries: Iterable[AuditRow]) -> dict[str, str]:
    """The names of the keys and accounts in these entries, by id."""
    ids = {text for entry in entries for text in (entry.actor, entry.target)}
    rows = await database.scan(
        "SELECT id, name FROM keys WHERE id IN (SELECT value FROM json_each(?1)) AND name <> ''"
        " UNION ALL SELECT id, name FROM accounts WHERE id IN (SELECT value FROM json_each(?1))",
        (msgspec.json.encode(sorted(ids)).decode(),),
    )
    return {row["id"]: row["name"] for row in rows}


def _entry(row: Row) -> AuditRow:
    return AuditRow(**{**dict(row), "detail": msgspec.json.decode(row["detail"])})
