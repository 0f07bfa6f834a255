"""Stored responses (`/v1/responses` with `store`), each of an account.

A key has room for a number of them: beyond that its oldest are deleted, as are those that are old
(`retention`).  A conversation that has lost a part in one of these ways cannot go on; one of which
a user has deleted a part begins after it.
"""

from __future__ import annotations

import msgspec

from pinaivu_box.errors import ConversationTooLong, ResponseNotCompleted, RowNotFound
from pinaivu_box.store.database import Database, SqlStatement

QUEUED = "queued"
STOPPED = "The box was stopped before this response was complete: send the request again."
_MAX_DELETED_ROWS = 500  # in one transaction


class StoredResponse(msgspec.Struct, frozen=True):
    """`input` and `body` are JSON: the items that were sent, and the whole answer, which contains
    its `status` too.  A background response is QUEUED until it has ended.  `stored_by` is the key's
    id."""

    id: str
    account_id: str
    previous_id: str | None
    created_at: int
    input: bytes
    body: bytes
    stored_by: str
    status: str


_CANNOT_GO_ON = {
    QUEUED: "has not ended yet: go on with it once it is completed",
    "failed": "has failed: go on with the one before it, or send its messages again",
}
_COLUMNS = ", ".join(StoredResponse.__struct_fields__)

# A response and those before it in its conversation, of one account (?2), until their size is over
# a limit (?3); `size` is of all up to that one.
_CHAIN = """
    WITH RECURSIVE chain (id, previous_id, depth, size) AS (
        SELECT id, previous_id, 0, length(input) + length(body)
        FROM responses WHERE id = ?1 AND account_id = ?2
        UNION ALL
        SELECT r.id, r.previous_id, chain.depth + 1,
               chain.size + length(r.input) + length(r.body)
        FROM responses AS r JOIN chain ON r.id = chain.previous_id
        WHERE r.account_id = ?2 AND chain.size <= ?3
    )
"""
# The oldest of a key that are over its limits; never the one that is being stored, nor one that is
# still running.
_EVICT = """
    DELETE FROM responses WHERE rowid IN (
        SELECT rowid FROM (
            SELECT rowid, row_number() OVER oldest AS n,
                   sum(bytes) OVER oldest - bytes AS before
            FROM (
                SELECT rowid, bytes, created_at FROM responses
                WHERE stored_by = ?1 AND id <> ?2 AND status <> 'queued'
                ORDER BY created_at, rowid LIMIT ?5
            )
            WINDOW oldest AS (ORDER BY created_at, rowid)
        ), (SELECT count AS kept, bytes AS size FROM response_sums WHERE key_id = ?1)
        WHERE n <= kept - ?3 OR before < size - ?4
    )
"""
FAIL_UNFINISHED = """
    UPDATE responses SET status = 'failed', body = CAST(json_set(
        CAST(body AS TEXT), '$.status', 'failed',
        '$.error', json_object('code', ?1, 'message', ?2)
    ) AS BLOB) WHERE status = 'queued'
"""
FAIL_ONE = f"{FAIL_UNFINISHED} AND id = ?3"


async def insert(
    database: Database, response: StoredResponse, *, max_count: int, max_bytes: int
) -> None:
    """Store a response and delete the key's oldest beyond its limits; it is on disk on return.
    Nothing is stored for an account that was removed."""
    sql = (
        f"INSERT INTO responses ({_COLUMNS}) SELECT ?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8"
        " FROM accounts WHERE id = ?2 AND removed_at IS NULL"
    )
    statement = sql, msgspec.structs.astuple(response)
    await _write_and_evict(database, statement, response, max_count, max_bytes)


async def finish(
    database: Database, response: StoredResponse, events: bytes, *, max_count: int, max_bytes: int
) -> None:
    """Store the end of a QUEUED response and the events of its stream (zlib), as `insert` does;
    nothing if it was deleted meanwhile."""
    statement = (
        "UPDATE responses SET status = ?, body = ?, events = ? WHERE id = ?",
        (response.status, response.body, events, response.id),
    )
    await _write_and_evict(database, statement, response, max_count, max_bytes)


async def fail_unfinished(database: Database) -> None:
    """Mark what is QUEUED as failed: when a box starts, the process that ran it is gone."""
    await database.write((FAIL_UNFINISHED, ("server_error", STOPPED)))


async def fail(database: Database, response_id: str, why: str) -> None:
    """Mark a QUEUED response, whose answer cannot be written, as failed."""
    await database.write((FAIL_ONE, ("server_error", why, response_id)))


async def events_of(database: Database, response_id: str, account_id: str) -> bytes | None:
    """The events of a response's stream (zlib); None if it has none."""
    sql = "SELECT events FROM responses WHERE id = ? AND account_id = ?"
    rows = await database.read(sql, (response_id, account_id))
    return rows[0]["events"] if rows else None


async def _write_and_evict(
    database: Database,
    statement: SqlStatement,
    response: StoredResponse,
    max_count: int,
    max_bytes: int,
) -> None:
    evict = (_EVICT, (response.stored_by, response.id, max_count, max_bytes, _MAX_DELETED_ROWS))
    _, gone = await database.write(statement, evict)
    while gone == _MAX_DELETED_ROWS:
        (gone,) = await database.write(evict)


async def find(database: Database, response_id: str, account_id: str) -> StoredResponse | None:
    """The response with that id, if it is of that account."""
    sql = f"SELECT {_COLUMNS} FROM responses WHERE id = ? AND account_id = ?"
    rows = await database.read(sql, (response_id, account_id))
    return StoredResponse(*rows[0]) if rows else None


async def conversation_size(
    database: Database, response_id: str, account_id: str, max_bytes: int
) -> int:
    """The bytes that `conversation` would read; it counts no further than one response beyond
    `max_bytes`."""
    sql = f"{_CHAIN} SELECT coalesce(max(size), 0) AS size FROM chain"
    rows = await database.read(sql, (response_id, account_id, max_bytes))
    return int(rows[0]["size"])


async def conversation(
    database: Database, response_id: str, account_id: str, max_bytes: int
) -> list[tuple[bytes, bytes]]:
    """The input and the body of a response and of all before it in its conversation, oldest first;
    empty if there is no such response.

    Raises RowNotFound if the beginning is not stored any more, ConversationTooLong if they have
    more than `max_bytes`, ResponseNotCompleted if the response has not ended, or failed.
    """
    rows = await database.read(
        f"{_CHAIN} SELECT r.previous_id, r.input, r.body, r.status, chain.size"
        " FROM chain JOIN responses AS r USING (id) ORDER BY depth DESC",
        (response_id, account_id, max_bytes),
    )
    if rows and rows[0]["size"] > max_bytes:
        raise ConversationTooLong(
            f"The conversation so far has over {max_bytes} bytes, which is all that is accepted: "
            "begin a new one."
        )
    if rows and rows[0]["previous_id"] is not None:
        raise RowNotFound(
            f"The conversation that led to '{response_id}' is not stored from its beginning any "
            f"more ('{rows[0]['previous_id']}' is gone): send its messages, or begin a new one."
        )
    if rows and (why := _CANNOT_GO_ON.get(rows[-1]["status"])):
        raise ResponseNotCompleted(f"The response '{response_id}' {why}.")
    return [(bytes(row["input"]), bytes(row["body"])) for row in rows]


async def delete(database: Database, response_id: str, account_id: str) -> bool:
    """Delete a response; False if there is no such one of that account.  A conversation that went
    on after it then begins there."""
    changed, _ = await database.write(
        ("DELETE FROM responses WHERE id = ?1 AND account_id = ?2", (response_id, account_id)),
        (
            "UPDATE responses SET previous_id = NULL WHERE previous_id = ?1 AND changes() > 0",
            (response_id,),
        ),
    )
    return changed > 0
