"""Responses that were stored (`/v1/responses` with `store`), each under its account.

A key has room for so many of them: where it is full, its oldest go.  They also go when they are old
(`retention`).  A conversation that has lost a part in one of these ways is not gone on with; one of
which somebody has deleted a part begins after that.
"""

from __future__ import annotations

import msgspec

from pinaivu_box.errors import BadRequest, BodyTooLarge, NotFound
from pinaivu_box.store.database import Database, Statement

QUEUED = "queued"
STOPPED = "The box was stopped before this response was complete: send the request again."
_AT_ONCE = 500  # rows that are deleted in one transaction


class StoredResponse(msgspec.Struct, frozen=True):
    """`input` and `body` are JSON: the items that were asked, and the whole answer, which says its
    `status` too.  One that runs in the background is QUEUED until it has ended.  `stored_by` is the
    key's id; "" in rows of an earlier schema."""

    id: str
    account_id: str
    previous_id: str | None
    created_at: int
    input: bytes
    body: bytes
    stored_by: str
    status: str


_NOT_GONE_ON_WITH = {
    QUEUED: "has not ended yet: go on with it once it is completed",
    "failed": "has failed: go on with the one before it, or send its messages again",
}
_COLUMNS = ", ".join(StoredResponse.__struct_fields__)


# The oldest of a key that are too many, or too much; never the newest, which is being stored, nor
# what still runs.
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
    database: Database, response: StoredResponse, *, most: int, most_bytes: int
) -> None:
    """Returns once it is on disk, and the key has no more than that stored."""
    marks = ", ".join("?" * len(StoredResponse.__struct_fields__))
    sql = f"INSERT INTO responses ({_COLUMNS}) VALUES ({marks})"
    statement = sql, msgspec.structs.astuple(response)
    await _write_and_evict(database, statement, response, most, most_bytes)


async def finish(
    database: Database, response: StoredResponse, events: bytes, *, most: int, most_bytes: int
) -> None:
    """What became of one that was QUEUED, with the events of its stream (zlib); nothing is kept of
    one that was deleted meanwhile.  Returns as `insert` does."""
    statement = (
        "UPDATE responses SET status = ?, body = ?, events = ? WHERE id = ?",
        (response.status, response.body, events, response.id),
    )
    await _write_and_evict(database, statement, response, most, most_bytes)


async def fail_unfinished(database: Database) -> None:
    """To be called when a box starts: what is QUEUED ended with the box before."""
    await database.write((FAIL_UNFINISHED, ("server_error", STOPPED)))


async def fail(database: Database, response_id: str, why: str) -> None:
    """The end of one that is QUEUED and whose answer cannot be written."""
    await database.write((FAIL_ONE, ("server_error", why, response_id)))


async def events_of(database: Database, response_id: str, account_id: str) -> bytes | None:
    """See `finish`; None if none were kept."""
    sql = "SELECT events FROM responses WHERE id = ? AND account_id = ?"
    rows = await database.read(sql, (response_id, account_id))
    return rows[0]["events"] if rows else None


async def _write_and_evict(
    database: Database, statement: Statement, response: StoredResponse, most: int, most_bytes: int
) -> None:
    evict = (_EVICT, (response.stored_by, response.id, most, most_bytes, _AT_ONCE))
    _, gone = await database.write(statement, evict)
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
            SELECT previous_id, length(input) + length(body)
            FROM responses WHERE id = ?1 AND account_id = ?2
            UNION ALL
            SELECT r.previous_id, chain.size + length(r.input) + length(r.body)
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
    `most` bytes, BadRequest if the response has not ended, or failed.
    """
    rows = await database.read(
        """
        WITH RECURSIVE chain (id, previous_id, input, body, status, depth, size) AS (
            SELECT id, previous_id, input, body, status, 0, length(input) + length(body)
            FROM responses WHERE id = ?1 AND account_id = ?2
            UNION ALL
            SELECT r.id, r.previous_id, r.input, r.body, r.status, chain.depth + 1,
                   chain.size + length(r.input) + length(r.body)
            FROM responses r JOIN chain ON r.id = chain.previous_id
            WHERE r.account_id = ?2 AND chain.size <= ?3
        )
        SELECT previous_id, input, body, status, size FROM chain ORDER BY depth DESC
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
    if rows and (why := _NOT_GONE_ON_WITH.get(rows[-1]["status"])):
        raise BadRequest(f"The response '{response_id}' {why}.", param="previous_response_id")
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
