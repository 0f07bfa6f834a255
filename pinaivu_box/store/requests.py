"""Usage rows and receipts: one of each per request, written together."""

from __future__ import annotations

import msgspec
from ulid import ULID

from pinaivu_box.store import keys, log, transcripts
from pinaivu_box.store.database import Database, SqlStatement
from pinaivu_box.store.transcripts import StoredTranscript


class RequestRow(msgspec.Struct, frozen=True):
    """What a request used.  Times in milliseconds, `amount` in 10^-9 of the currency."""

    request_id: str
    key_id: str
    created_at: int
    model: str
    node_id: str
    finish_reason: str
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    amount: int
    queue_ms: int | None
    ttft_ms: int | None
    total_ms: int


class StoredReceipt(msgspec.Struct, frozen=True):
    """The exact signed bytes, the 64-byte signature over them, and the JSON of the openings."""

    signed: bytes
    signature: bytes
    opening: bytes


async def store_request(
    database: Database,
    row: RequestRow,
    receipt: StoredReceipt,
    period: int = 0,
    transcript: StoredTranscript | None = None,
) -> None:
    """Store the usage row, the receipt and the transcript of a request, append the entry of the
    receipt to the log and add it all to the key's counters, in one transaction; it is on disk on
    return.

    Triggers add it to the sums of usage (schema.sql).  `period` is as in `keys.charge`.
    """
    tokens = row.prompt_tokens + row.completion_tokens
    fields = row.__struct_fields__
    await database.write(
        (
            f"INSERT INTO requests ({', '.join(fields)}) VALUES ({', '.join('?' * len(fields))})",
            msgspec.structs.astuple(row),
        ),
        log.append(receipt.signed),
        (
            "INSERT INTO receipts (request_id, key_id, account_id, model, created_at,"
            " signed, signature, opening, log_entry)"
            " VALUES (?1, ?2, (SELECT account_id FROM keys WHERE id = ?2), ?3, ?4, ?5, ?6, ?7,"
            " last_insert_rowid())",
            (
                *(row.request_id, row.key_id, row.model, row.created_at),
                *msgspec.structs.astuple(receipt),
            ),
        ),
        keys.charge(row.key_id, tokens=tokens, amount=row.amount, at=row.created_at, period=period),
        *(() if transcript is None else (transcripts.storing(row.request_id, transcript),)),
    )


async def find_receipt(
    database: Database, request_id: str, *, account_id: str | None
) -> StoredReceipt | None:
    """The receipt of a request, if it is of that account; of any account if that is None."""
    rows = await database.read(
        "SELECT signed, signature, opening FROM receipts JOIN keys ON keys.id = key_id"
        " WHERE request_id = ? AND (? IS NULL OR keys.account_id = ?)",
        (request_id, account_id, account_id),
    )
    return StoredReceipt(*rows[0]) if rows else None


class ListedReceipt(msgspec.Struct, frozen=True):
    """A receipt in a list; `key_name` may be empty, and so may be `account_name` if the account was
    erased."""

    key_id: str
    key_name: str
    account_name: str
    signed: bytes
    signature: bytes


_AFTER_ALL_IDS = "s"  # ids begin with req_
_TIME_CHARACTERS = 10  # of a ULID


def listing(
    account_id: str | None,
    key_id: str | None,
    model: str | None,
    after: str | None,
    limit: int,
    since: int = 0,
) -> SqlStatement:
    """The statement that finds a page of receipts, the newest first."""
    conditions: dict[str, str] = {}
    if key_id is not None:
        conditions["key_id = ?"] = key_id
    if account_id is not None:
        # The + keeps SQLite from the account's index: it would read more of it than of the key's.
        conditions["account_id = ?" if key_id is None else "+account_id = ?"] = account_id
    if model is not None:
        alone = key_id is None and account_id is None
        conditions["model = ?" if alone else "+model = ?"] = model
    conditions["request_id < ?"] = after or _AFTER_ALL_IDS
    if since:
        conditions["request_id >= ?"] = id_at(since)
    return (
        "SELECT key_id, (SELECT name FROM keys WHERE id = key_id) AS key_name,"
        " coalesce((SELECT name FROM accounts WHERE id = receipts.account_id), '') AS account_name,"
        " signed, signature"
        f" FROM receipts WHERE {' AND '.join(conditions)} ORDER BY request_id DESC LIMIT ?",
        (*conditions.values(), limit),
    )


def id_at(at: int) -> str:
    """What is before the ids of all requests that came at that time (Unix milliseconds) or later,
    and after those of earlier ones."""
    return f"req_{ULID.from_timestamp(max(0, at) / 1000)}".lower()[: len("req_") + _TIME_CHARACTERS]


async def list_receipts(
    database: Database,
    *,
    account_id: str | None = None,
    key_id: str | None = None,
    model: str | None = None,
    since: int = 0,
    until: int | None = None,
    after: str | None = None,
    limit: int = 100,
) -> list[ListedReceipt]:
    """The newest `limit` receipts before that of the request `after`, newest first; of an account,
    a key and a model where they are given, since a time and before `until` (Unix milliseconds)."""
    if until is not None:
        after = min(after or _AFTER_ALL_IDS, id_at(until))
    rows = await database.scan(*listing(account_id, key_id, model, after, limit, since))
    return [ListedReceipt(*row) for row in rows]


SINCE = (
    "SELECT created_at, prompt_tokens + completion_tokens FROM requests"
    " WHERE key_id = ? AND created_at > ? AND created_at <= ? ORDER BY created_at"
)


async def between(database: Database, key_id: str, then: int, until: int) -> list[tuple[int, int]]:
    """The time and the tokens of each request of a key after `then` and up to `until` (Unix
    milliseconds)."""
    return [tuple(row) for row in await database.read(SINCE, (key_id, then, until))]
