"""Usage rows and receipts: one of each per request, written together."""

from __future__ import annotations

import msgspec

from pinaivu_box.store import keys
from pinaivu_box.store.database import Database, Statement


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

    request_id: str
    signed: bytes
    signature: bytes
    opening: bytes


class ModelUsage(msgspec.Struct, frozen=True):
    model: str
    requests: int
    prompt_tokens: int
    completion_tokens: int
    amount: int


def _insert(table: str, row: msgspec.Struct) -> Statement:
    fields = row.__struct_fields__
    marks = ", ".join("?" * len(fields))
    return (
        f"INSERT INTO {table} ({', '.join(fields)}) VALUES ({marks})",
        msgspec.structs.astuple(row),
    )


async def settle(database: Database, row: RequestRow, receipt: StoredReceipt) -> None:
    """Usage row, receipt and key's counters in one transaction; returns once it is on disk."""
    tokens = row.prompt_tokens + row.completion_tokens
    await database.write(
        _insert("requests", row),
        _insert("receipts", receipt),
        keys.charge(row.key_id, tokens=tokens, amount=row.amount, now=row.created_at),
    )


async def find_receipt(
    database: Database, request_id: str, *, key_id: str | None
) -> StoredReceipt | None:
    """The receipt, if it belongs to that key (None: whoever's)."""
    fields = ", ".join(f"receipts.{name}" for name in StoredReceipt.__struct_fields__)
    rows = await database.read(
        f"SELECT {fields} FROM receipts JOIN requests USING (request_id)"
        " WHERE request_id = ? AND (? IS NULL OR key_id = ?)",
        (request_id, key_id, key_id),
    )
    return StoredReceipt(**dict(rows[0])) if rows else None


async def usage(
    database: Database,
    *,
    key_id: str | None = None,
    since: int | None = None,
    until: int | None = None,
    model: str | None = None,
) -> list[ModelUsage]:
    """Sums by model of the rows in [since, until), Unix milliseconds."""
    conditions = {
        "key_id = ?": key_id,
        "created_at >= ?": since,
        "created_at < ?": until,
        "model = ?": model,
    }
    given = {text: value for text, value in conditions.items() if value is not None}
    where = f"WHERE {' AND '.join(given)}" if given else ""
    rows = await database.read(
        "SELECT model, count(*) AS requests, sum(prompt_tokens) AS prompt_tokens,"
        " sum(completion_tokens) AS completion_tokens, sum(amount) AS amount"
        f" FROM requests {where} GROUP BY model ORDER BY model",
        tuple(given.values()),
    )
    return [ModelUsage(**dict(row)) for row in rows]
