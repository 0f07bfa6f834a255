"""Responses that were stored (`/v1/responses` with `store`), each under its account.

A key has room for so many of them: where it is full, its oldest go.  They also go when they are old
(`retention`).  A conversation that has lost a part in one of these ways is not gone on with; one of
which somebody has deleted a part begins after that.
"""

from __future__ import annotations

import msgspec

from pinaivu_box.errors import BodyTooLarge, NotFound
from pinaivu_box.store.database import Database

_AT_ONCE = 500  # rows that are deleted in one transaction


class StoredResponse(msgspec.Struct, frozen=True):
    """`input` and `body` are JSON: the items that were asked, and the whole answer.  `stored_by`
    is the key's id; "" in rows of an earlier schema."""

    id: str
    account_id: str
    previous_id: str | None
    created_at: int
    input: bytes
    body: bytes
    stored_by: str


_COLUMNS = ", ".join(StoredResponse.__struct_fields__)


# The oldest of a key that are too many, or too much; never the newest, which is being stored.
_EVICT = """
    DELETE FROM responses WHERE rowid IN (
        SELECT rowid FROM (
            SELECT rowid, row_number() OVER oldest AS n,
                   sum(bytes) OVER oldest - bytes AS before
            FROM (
                SELECT rowid, bytes, created_at FROM responses
                WHERE stored_by = ?1 AND id <> ?2 ORDER BY created_at, rowid LIMIT ?5
            )
            WINDOW oldest AS (ORDER BY created_at, rowid)
        ), (SELECT count AS kept, bytes AS size FROM response_sums WHERE key_id = ?1)
        WHERE n <= kept - ?3 OR before < size - ?4
    )
"""


async def insert(
    database: Database, response: StoredResponse, *, most: int, most_bytes: int
) -> None:
    """Returns once it is on disk, and the key has no more than that stored."""
    marks = ", ".join("?" * len(StoredResponse.__struct_fields__))
    sql = f"INSERT INTO responses ({_COLUMNS}) VALUES ({marks})"
    parameters = (response.stored_by, response.id, most, most_bytes, _AT_ONCE)
    evict = (_EVICT, parameters)
    *_, gone = await database.write((sql, msgspec.structs.astuple(response)), evict)
    while gone == _AT_ONCE:
        (gone,) = await database.write(evict)


async def find(database: Database, response_id: str, account_id: str) -> StoredResponse | None:
    """A response of that account."""
    sql = f"SELECT {_COLUMNS} FROM responses WHERE id = ? AND account_id = ?"
    rows = await database.read(sql, (response_id, account_id))
    return StoredResponse(*rows[0]) if rows else None


async def conversation_size(
    database: Database, response_id: str, account_id: str, most: int
) -> int:
    """How many bytes `conversation` would read, at most a response more than `most`."""
    rows = await database.read(
        """
        WITH RECURSIVE chain (previous_id, size) AS (
            SELECT previous_id, bytes FROM responses WHERE id = ?1 AND account_id = ?2
            UNION ALL
            SELECT r.previous_id, chain.size + r.bytes
            FROM responses r JOIN chain ON r.id = chain.previous_id
            WHERE r.account_id = ?2 AND chain.size <= ?3
        )
        SELECT coalesce(max(size), 0) AS size FROM chain
        """,
        (response_id, account_id, most),
    )
    return int(rows[0]["size"])


async def conversation(
    database: Database, response_id: str, account_id: str, most: int
) -> list[tuple[bytes, bytes]]:
    """Input and body of all responses that led to a response, and its own, oldest first; empty if
    it is not there.

    Raises NotFound if its beginning is not stored any more, BodyTooLarge if they have more than
    `most` bytes.
    """
    rows = await database.read(
        """
        WITH RECURSIVE chain (id, previous_id, input, body, depth, size) AS (
            SELECT id, previous_id, input, body, 0, bytes
            FROM responses WHERE id = ?1 AND account_id = ?2
            UNION ALL
            SELECT r.id, r.previous_id, r.input, r.body, chain.depth + 1, chain.size + r.bytes
            FROM responses r JOIN chain ON r.id = chain.previous_id
            WHERE r.account_id = ?2 AND chain.size <= ?3
        )
        SELECT previous_id, input, body, size FROM chain ORDER BY depth DESC
        """,
        (response_id, account_id, most),
    )
    if rows and rows[0]["size"] > most:
        raise BodyTooLarge(
            f"The conversation so far has over {most} bytes, which is all that is accepted: begin "
            "a new one."
        )
    if rows and rows[0]["previous_id"] is not None:
        raise NotFound(
            f"The conversation that led to '{response_id}' is not stored from its beginning any "
            f"more ('{rows[0]['previous_id']}' is gone): send its messages, or begin a new one."
        )
    return [(bytes(row["input"]), bytes(row["body"])) for row in rows]


async def delete(database: Database, response_id: str, account_id: str) -> bool:
    """False if there is no such response of that account.  A conversation that went on after it
    then begins there."""
    changed, _ = await database.write(
        ("DELETE FROM responses WHERE id = ?1 AND account_id = ?2", (response_id, account_id)),
        (
            "UPDATE responses SET previous_id = NULL WHERE previous_id = ?1 AND changes() > 0",
            (response_id,),
        ),
    )
    return changed > 0
