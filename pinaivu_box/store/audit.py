"""The audit trail: who changed what, when, from where.  The database lets nobody change a row."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import msgspec

from pinaivu_box.store.database import Database, SqlStatement
from pinaivu_box.store.times import now_ms, time_text

_MAX_NAMESAKES = 1000  # keys of one name that are looked for


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


ERASED = "erased"  # stands for a name that is to be forgotten
_NAMELESS = (
    f"json_replace(detail, '$.name', '{ERASED}', '$.account', '{ERASED}',"
    f" '$.before.name', '{ERASED}', '$.after.name', '{ERASED}')"
)


def record(by: Actor, action: str, target: str, **detail: Any) -> SqlStatement:
    """The statement that records an action, for the transaction of the action and right after it:
    it records nothing if the statement before it has changed nothing."""
    text = msgspec.json.encode(detail).decode()
    return (
        "INSERT INTO audit (at, actor, source, action, target, detail)"
        " SELECT ?, ?, ?, ?, ?, ? WHERE changes() > 0",
        (now_ms(), by.name, by.source, action, target, text),
    )


def note(by: Actor, action: str, target: str, **detail: Any) -> SqlStatement:
    """The statement that records an action outside the database."""
    text = msgspec.json.encode(detail).decode()
    return (
        "INSERT INTO audit (at, actor, source, action, target, detail) VALUES (?, ?, ?, ?, ?, ?)",
        (now_ms(), by.name, by.source, action, target, text),
    )


def forget_names(account_id: str, name: str) -> tuple[SqlStatement, ...]:
    """The statements that replace an account's name, and those of its keys, in what was recorded.
    The trail allows no other change (see the trigger in schema.sql)."""
    return (
        (
            # Each by an index.  Sessions, which are gone, name the account that began them.
            f"UPDATE audit SET detail = {_NAMELESS} WHERE id IN ("
            "SELECT id FROM audit WHERE target = ?1"
            " UNION SELECT id FROM audit"
            "  WHERE target IN (SELECT id FROM keys WHERE account_id = ?1)"
            " UNION SELECT id FROM audit"
            "  WHERE actor = ?1 AND detail ->> '$.account' IN (?1, ?2))",
            (account_id, name),
        ),
    )


def _name_of(column: str) -> str:
    """The present name of a key or an account, in SQL."""
    return (
        f"coalesce((SELECT name FROM keys WHERE id = {column} AND name <> ''),"
        f" (SELECT name FROM accounts WHERE id = {column})) AS {column}_name"
    )


def listing(
    *,
    targets: Collection[str] | None,
    actors: Collection[str] | None,
    action: str | None,
    since: int,
    until: int | None,
    after: int | None,
    limit: int,
) -> SqlStatement:
    """The statement that finds a page of entries, the newest first; targets and actors by id."""
    conditions, values = ["at >= ?"], list[Any]([since])
    for column, ids in (("target", targets), ("actor", actors)):
        if ids is not None:  # with a single one, the index has them in order
            conditions.append(f"{column} IN ({', '.join('?' * len(ids))})")
            values += ids
    if until is not None:
        conditions.append("at < ?")
        values.append(until)
    if action is not None:
        conditions.append("(action = ? OR substr(action, 1, ?) = ?)")
        values += [action, len(action) + 1, f"{action}."]
    if after is not None:
        conditions.append("id < ?")
        values.append(after)
    return (
        "SELECT id, at, actor, source, action, target, detail,"
        f" {_name_of('actor')}, {_name_of('target')} FROM audit"
        f" WHERE {' AND '.join(conditions)} ORDER BY id DESC LIMIT ?",
        (*values, limit),
    )


async def _ids(database: Database, names: Collection[str]) -> list[str]:
    """The ids of the keys and accounts of these names."""
    marks = ", ".join("?" * len(names))
    rows = await database.scan(
        f"SELECT id FROM keys WHERE name IN ({marks})"
        f" UNION SELECT id FROM accounts WHERE name IN ({marks})",
        (*names, *names),
    )
    return [row["id"] for row in rows][:_MAX_NAMESAKES]


async def ls(
    database: Database,
    *,
    since: int = 0,
    until: int | None = None,
    actors: Collection[str] | None = None,
    action: str | None = None,
    targets: Collection[str] | None = None,
    after: int | None = None,
    limit: int = 100,
) -> list[AuditEntry]:
    """The newest `limit` entries since a time, before `until` and before the entry `after`, newest
    first; with `targets`, ids or names of keys and accounts, only what was done to these, with
    `actors` only what these did, and with an `action` ("key", or "key.create") only that."""
    if targets is not None:
        targets = [*targets, *await _ids(database, targets)]
    if actors is not None:
        actors = await _ids(database, actors) or actors
    statement = listing(
        targets=targets,
        actors=actors,
        action=action,
        since=since,
        until=until,
        after=after,
        limit=limit,
    )
    rows = await database.scan(*statement)
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
