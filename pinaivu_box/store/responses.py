"""Responses that were stored (`/v1/responses` with `store`), each under its account."""

from __future__ import annotations

import msgspec

from pinaivu_box.errors import BodyTooLarge
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


# All that led to a response, and itself.
_CHAIN = """
    WITH RECURSIVE chain (id, previous_id, depth) AS (
        SELECT id, previous_id, 0 FROM responses WHERE id = ? AND account_id = ?
        UNION ALL
        SELECT r.id, r.previous_id, chain.depth + 1
        FROM responses r JOIN chain ON r.id = chain.previous_id
    )
"""


async def conversation(
    database: Database, response_id: str, account_id: str, most: int
) -> list[tuple[bytes, bytes]]:
    """Input and body of all responses that led to a response, and its own, oldest first; empty if
    it is not there.  Raises BodyTooLarge if they have more than `most` bytes."""
    key = (response_id, account_id)
    sizes = "SELECT SUM(LENGTH(r.input) + LENGTH(r.body)) FROM chain JOIN responses r USING (id)"
    ((size,),) = await database.read(f"{_CHAIN} {sizes}", key)
    if (size or 0) > most:
        raise BodyTooLarge(
            f"The conversation so far has {size} bytes, and {most} are accepted: begin a new one."
        )
    both = "SELECT r.input, r.body FROM chain JOIN responses r USING (id) ORDER BY depth DESC"
    rows = await database.read(f"{_CHAIN} {both}", key)
    return [(bytes(given), bytes(body)) for given, body in rows]


async def delete(database: Database, response_id: str, account_id: str) -> bool:
    """False if there is no such response of that account."""
    sql = "DELETE FROM responses WHERE id = ? AND account_id = ?"
    (changed,) = await database.write((sql, (response_id, account_id)))
    return changed > 0
