"""What the database of a box says that a key has spent."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from decimal import Decimal
from pathlib import Path


def spent(home: Path, key_id: str) -> dict[str, Decimal]:
    """What a key has spent by each account of it: they must agree."""
    uri = f"file:{home / 'pinaivu.db'}?mode=ro"
    with closing(sqlite3.connect(uri, uri=True)) as database:
        receipts = [
            json.loads(row[0])["payment_amount"]
            for row in database.execute("SELECT signed FROM receipts WHERE key_id = ?", (key_id,))
        ]
        (rows,) = database.execute(
            "SELECT coalesce(sum(amount), 0) FROM requests WHERE key_id = ?", (key_id,)
        ).fetchone()
        total, period = database.execute(
            "SELECT amount, spent FROM keys WHERE id = ?", (key_id,)
        ).fetchone()
    unit = Decimal(10) ** -9
    return {
        "receipts": sum((Decimal(text) for text in receipts), Decimal(0)),
        "usage rows": rows * unit,
        "key": total * unit,
        "period": period * unit,
    }
