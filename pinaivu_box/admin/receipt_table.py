"""Receipts as the lines of a table, for lists and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import AsyncIterator
from typing import Any

import msgspec
from msgspec import Struct

from pinaivu_box.admin.usage_report import cell
from pinaivu_box.store import requests
from pinaivu_box.store.database import Database
from pinaivu_box.store.requests import ListedReceipt

MAX_CSV_LINES = 100_000
_PAGE = 1000


class _Usage(Struct, frozen=True):
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


class _Signed(Struct, frozen=True):
    """What a line shows of the bytes of a receipt."""

    request_id: str
    timestamp: str
    node_id: str
    model: str
    finish_reason: str
    payment_amount: str
    currency: str
    usage: _Usage


class ReceiptLine(Struct, frozen=True):
    """A receipt in a table, unchecked."""

    request_id: str
    timestamp: str
    key: str
    key_name: str
    account_name: str
    model: str
    node_id: str
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    amount: str
    currency: str
    finish_reason: str


_decoder = msgspec.json.Decoder(_Signed)


def line_of(row: ListedReceipt) -> ReceiptLine:
    signed = _decoder.decode(row.signed)
    return ReceiptLine(
        request_id=signed.request_id,
        timestamp=signed.timestamp,
        key=row.key_id,
        key_name=row.key_name,
        account_name=row.account_name,
        model=signed.model,
        node_id=signed.node_id,
        prompt_tokens=signed.usage.prompt_tokens,
        cached_tokens=signed.usage.cached_tokens,
        completion_tokens=signed.usage.completion_tokens,
        amount=signed.payment_amount,
        currency=signed.currency,
        finish_reason=signed.finish_reason,
    )


async def csv_lines(
    database: Database, *, after: str | None = None, **selection: Any
) -> AsyncIterator[str]:
    """RFC 4180, the newest first, a page at a time: the table is never in memory as a whole.
    `selection` is for `requests.list_receipts`."""
    yield _text([ReceiptLine.__struct_fields__])
    after = after or None
    for _ in range(MAX_CSV_LINES // _PAGE):
        rows = await requests.list_receipts(database, after=after, limit=_PAGE, **selection)
        if rows:
            lines = [line_of(row) for row in rows]
            yield _text([map(cell, map(str, msgspec.structs.astuple(line))) for line in lines])
            after = lines[-1].request_id
        if len(rows) < _PAGE:
            return


def _text(lines: list[Any]) -> str:
    file = io.StringIO()
    csv.writer(file).writerows(lines)
    return file.getvalue()
