"""Usage rows and receipts: one of each per request, written together."""

from __future__ import annotations

import msgspec

from pinaivu_box.store import keys
from pinaivu_box.store.database import Database


class RequestRow(msgspec.Struct, frozen=True):
    """What one request used.  Times in milliseconds, `amount` in 10^-9 of the currency."""

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


async def settle(
    database: Database, row: RequestRow, receipt: StoredReceipt, period: int = 0
) -> None:
    """Usage row, receipt and key's counters in one transaction; returns once it is on disk.

    The sums of usage are the database's own work (migrations).  `period`: see `keys.charge`.
    """
    tokens = row.prompt_tokens + row.completion_tokens
    fields = row.__struct_fields__
    await database.write(
        (
            f"INSERT INTO requests ({', '.join(fields)}) VALUES ({', '.join('?' * len(fields))})",
            msgspec.structs.astuple(row),
        ),
        (
            "INSERT INTO receipts (request_id, key_id, created_at, signed, signature, opening)"
            " VALUES (?, ?, ?, ?, ?, ?)",
            (row.request_id, row.key_id, row.created_at, *msgspec.structs.astuple(receipt)),
        ),
        keys.charge(row.key_id, tokens=tokens, amount=row.amount, at=row.created_at, period=period),
    )


async def find_receipt(
    database: Database, request_id: str, *, account_id: str | None
) -> StoredReceipt | None:
    """The receipt, if it belongs to that account (None: whoever's)."""
    rows = await database.read(
        "SELECT signed, signature, opening FROM receipts JOIN keys ON keys.id = key_id"
        " WHERE request_id = ? AND (? IS NULL OR account_id = ?)",
        (request_id, account_id, account_id),
    )
    return StoredReceipt(*rows[0]) if rows else None


SINCE = (
    "SELECT created_at, prompt_tokens + completion_tokens FROM requests"
    " WHERE key_id = ? AND created_at > ? AND created_at <= ? ORDER BY created_at"
)


async def between(database: Database, key_id: str, then: int, until: int) -> list[tuple[int, int]]:
    """When a key's requests came after one moment and up to another (Unix milliseconds), and their
    tokens."""
    return [tuple(row) for row in await database.read(SINCE, (key_id, then, until))]
