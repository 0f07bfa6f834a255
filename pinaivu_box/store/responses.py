"""Responses that were stored (`/v1/responses` with `store`), each under its account."""

from __future__ import annotations

from typing import Any

import msgspec

from pinaivu_box.store.database import Database


class StoredResponse(msgspec.Struct, frozen=True):
    """`input` and `body` are JSON: the items that were asked, and the whole answer."""

    id: str
    account_id: str
    previous_id: str | None
    created_at: int
    input: bytes
    body: bytes


_COLUMNS = ", ".join(StoredResponse.__struct_fields__)


async def insert(database: Database, response: StoredResponse) -> None:
    """Returns once it is on disk."""
    marks = ", ".join("?" * len(StoredResponse.__struct_fields__))
    sql = f"INSERT INTO responses ({_COLUMNS}) VALUES ({marks})"
    await database.write((sql, msgspec.structs.astuple(response)))


async def find(database: Database, response_id: str, account_id: str) -> StoredResponse | None:
    """A response of that account."""
    sql = f"SELECT {_COLUMNS} FROM responses WHERE id = ? AND account_id = ?"
    rows = await database.read(sql, (response_id, account_id))
    return StoredResponse(*rows[0]) if rows else None


async def conversation(
    database: Database, response_id: str, account_id: str
) -> list[dict[str, Any]]:
    """All items that led to a response, and its own, oldest first; empty if it is not there."""
    rows = await database.read(
        """
        WITH RECURSIVE chain (id, previous_id, input, body, depth) AS (
            SELECT id, previous_id, input, body, 0 FROM responses WHERE id = ? AND account_id = ?
            UNION ALL
            SELECT r.id, r.previous_id, r.input, r.body, chain.depth + 1
            FROM responses r JOIN chain ON r.id = chain.previous_id
        )
        SELECT input, body FROM chain ORDER BY depth DESC
        """,
        (response_id, account_id),
    )
    items: list[dict[str, Any]] = []
    for given, body in rows:
        items += msgspec.json.decode(given)
        items += msgspec.json.decode(body)["output"]
    return items


async def delete(database: Database, response_id: str, account_id: str) -> bool:
    """False if there is no such response of that account."""
    sql = "DELETE FROM responses WHERE id = ? AND account_id = ?"
    (changed,) = await database.write((sql, (response_id, account_id)))
    return changed > 0
