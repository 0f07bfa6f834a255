"""Checks the stored transcripts: can each be read, and is it that of its receipt?"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import msgspec

from pinaivu_box.doctor.check import Check
from pinaivu_box.receipts import transcript
from pinaivu_box.receipts.receipt import Proof, Receipt
from pinaivu_box.receipts.transcript import mismatch, openings_of
from pinaivu_box.receipts.transcript_sealing import KEY_BYTES, SEAL_BYTES
from pinaivu_box.receipts.verify import read_statement
from pinaivu_box.store import integrity

_NAME = "transcripts"
_FIRST_VERSION = 7  # of the schema, that has them
_ROWS = (
    "SELECT t.request_id, t.sealed_to, t.body, r.signed, r.opening FROM transcripts AS t"
    " LEFT JOIN receipts AS r USING (request_id) ORDER BY t.rowid"
)
_TODO = "audits of these requests need them: restore a backup that has them, or let them be"


def all_of(home: Path) -> Iterator[Check]:
    counts, wrong = _stored(home / "pinaivu.db")
    for why, (request_id, count) in wrong.items():
        more = f" (and {count - 1:,} more)" if count > 1 else ""
        yield Check(_NAME, "failed", f"that of {request_id}{more} {why}", _TODO)
    if not any(counts.values()):
        yield Check(_NAME, "ok", "none are stored")
    elif not wrong:
        plain = f"{counts['plain']:,} in clear, which their receipts commit to"
        yield Check(_NAME, "ok", f"{plain}; {counts['sealed']:,} sealed, for who has the key")


def _stored(path: Path) -> tuple[dict[str, int], dict[str, tuple[str, int]]]:
    """As `_examined`.  Raises sqlite3.Error."""
    if path.exists():
        with integrity.reading(path) as connection:
            if connection.execute("PRAGMA user_version").fetchone()[0] >= _FIRST_VERSION:
                return _examined(connection)
    return {"plain": 0, "sealed": 0}, {}


def _examined(
    connection: sqlite3.Connection,
) -> tuple[dict[str, int], dict[str, tuple[str, int]]]:
    """How many there are of each kind; and by what is wrong, as the end of a clause, the first
    request and the number of them."""
    counts = {"plain": 0, "sealed": 0}
    wrong: dict[str, tuple[str, int]] = {}
    with closing(connection.execute(_ROWS)) as rows:
        for request_id, sealed_to, body, signed, opening in rows:
            counts["plain" if sealed_to is None else "sealed"] += 1
            if why := _fault(request_id, sealed_to, body, signed, opening):
                first, count = wrong.get(why, (request_id, 0))
                wrong[why] = first, count + 1
    return counts, wrong


def _fault(
    request_id: str,
    sealed_to: bytes | None,
    body: bytes,
    signed: bytes | None,
    opening: bytes | None,
) -> str:
    """What is wrong with one; empty if nothing is that can be seen without the key."""
    if signed is None:
        return "has no receipt"
    if sealed_to is not None:
        right = len(sealed_to) == KEY_BYTES and len(body) > SEAL_BYTES
        return "" if right else "is sealed in no way that can be opened"
    try:
        recorded = transcript.decode(body)
    except ValueError:
        return "cannot be read"
    if recorded.request_id != request_id:
        return "is that of another request"
    try:
        proofs = msgspec.json.decode(signed, type=Receipt).proofs
        statements = [read_statement(one) for one in proofs]
        openings = openings_of(msgspec.json.decode(opening or b"{}"), statements)
    except (ValueError, RecursionError):
        return "has a receipt that cannot be read"
    for statement, pair in zip(statements, openings, strict=True):
        if isinstance(statement, Proof) and mismatch(recorded, statement, *pair):
            return "is not what its receipt commits to"
    return ""
