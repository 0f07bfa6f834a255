"""Statements between two boxes: what both have signed off, and which entries are in none yet."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Sequence

import msgspec
from msgspec import Struct

from pinaivu_box.errors import EntryRefused, NotFound
from pinaivu_box.ledger.entry import LedgerEntry
from pinaivu_box.store import audit
from pinaivu_box.store.audit import Actor
from pinaivu_box.store.database import Database, Row

_COLUMNS = ", ".join(LedgerEntry.__struct_fields__)
_ITEM = "rowid, served_by_us, request_id, leg, choice, currency, amount, proof_sha256"
_OPEN = "peer = ?1 AND statement IS NULL AND acceptance <> x''"


class StoredStatement(Struct, frozen=True):
    """`signed` are the exact bytes under both signatures; `at` Unix milliseconds; `paid_at` if this
    side's operator says that what it leaves over was made good."""

    id: str
    peer: str
    sequence: int
    at: int
    signed: bytes
    ours: bytes
    theirs: bytes
    paid_at: int | None = None


class StoredEntry(LedgerEntry, frozen=True, kw_only=True):
    """`statement`: the id of the one that has it.  `forgiven_at`: when it was written off."""

    prompt_paid: bool
    statement: str | None
    forgiven_at: int | None


async def ls(database: Database, peer: str | None = None) -> list[StoredStatement]:
    """The newest first."""
    rows = await database.scan(
        "SELECT id, peer, sequence, ledger_statements.at, signed, ours, theirs, ledger_paid.at"
        " FROM ledger_statements LEFT JOIN ledger_paid ON statement = id"
        " WHERE ?1 IS NULL OR peer = ?1 ORDER BY ledger_statements.at DESC, sequence DESC",
        (peer,),
    )
    return [StoredStatement(*row) for row in rows]


async def get(database: Database, peer: str, sequence: int) -> StoredStatement | None:
    rows = await database.read(
        "SELECT id, peer, sequence, at, signed, ours, theirs FROM ledger_statements"
        " WHERE peer = ? AND sequence = ?",
        (peer, sequence),
    )
    return StoredStatement(*rows[0]) if rows else None


async def last(database: Database, peer: str) -> StoredStatement | None:
    rows = await database.read(
        "SELECT max(sequence) FROM ledger_statements WHERE peer = ?", (peer,)
    )
    return await get(database, peer, rows[0][0] or 0)


async def cut(database: Database, peer: str, most: int) -> str:
    """Up to which request id there are about `most` entries without a statement; "" if that is all
    of them."""
    rows = await database.scan(
        f"SELECT request_id FROM ledger_entries WHERE {_OPEN}"
        " ORDER BY request_id LIMIT 1 OFFSET ?2",
        (peer, most - 1),
    )
    return str(rows[0][0]) if rows else ""


async def open_items(database: Database, peer: str, upto: str) -> list[Row]:
    """Accepted entries without a statement, in short (with `rowid`), up to that cut."""
    return await database.scan(
        f"SELECT {_ITEM} FROM ledger_entries WHERE {_OPEN} AND (?2 = '' OR request_id <= ?2)",
        (peer, upto),
    )


async def items_of(database: Database, statement: str) -> list[Row]:
    return await database.scan(
        f"SELECT {_ITEM} FROM ledger_entries WHERE statement = ?", (statement,)
    )


async def entries(database: Database, rows: Sequence[int]) -> dict[int, LedgerEntry]:
    """By their rowids."""
    found = await database.read(
        f"SELECT rowid, {_COLUMNS} FROM ledger_entries"
        " WHERE rowid IN (SELECT value FROM json_each(?))",
        (msgspec.json.encode(rows).decode(),),
    )
    return {row[0]: msgspec.convert(dict(row), LedgerEntry, strict=False) for row in found}


async def of_peer(
    database: Database, peer: str, *, limit: int, statement: str | None = None
) -> list[StoredEntry]:
    """A peer's newest entries, the newest first; of one statement, if it is given."""
    found = await database.scan(
        f"SELECT {_COLUMNS}, prompt_paid, statement, forgiven_at FROM ledger_entries"
        " WHERE peer = ?1 AND (?2 IS NULL OR statement = ?2) ORDER BY at DESC, rowid DESC LIMIT ?3",
        (peer, statement, limit),
    )
    return [msgspec.convert(dict(row), StoredEntry, strict=False) for row in found]


async def statement_of(database: Database, entry: LedgerEntry) -> str | None:
    """The id of the statement that an entry is in."""
    rows = await database.read(
        "SELECT statement FROM ledger_entries WHERE peer = ? AND served_by_us = ?"
        " AND request_id = ? AND leg = ? AND choice = ?",
        (entry.peer, entry.served_by_us, entry.request_id, entry.leg, entry.choice),
    )
    return rows[0][0] if rows else None


async def settle(database: Database, made: StoredStatement, rows: Sequence[int], by: Actor) -> None:
    """The statement, and all its entries marked with it, in one transaction.

    Raises EntryRefused, and changes nothing, if one of them is in a statement already or if this is
    not the next one with that peer.
    """
    try:
        _, written, _ = await database.write(
            (
                "UPDATE ledger_entries SET statement = ?1 WHERE peer = ?2 AND statement IS NULL"
                " AND acceptance <> x'' AND rowid IN (SELECT value FROM json_each(?3))",
                (made.id, made.peer, msgspec.json.encode(rows).decode()),
            ),
            # If this writes nothing, the entries refer to nothing, and all of it is undone.
            (
                "INSERT INTO ledger_statements (id, peer, sequence, at, signed, ours, theirs)"
                " SELECT ?1, ?2, ?3, ?4, ?5, ?6, ?7 WHERE"
                " ?8 = (SELECT count(*) FROM ledger_entries WHERE statement = ?1) AND ?3 = 1 + ("
                "SELECT coalesce(max(sequence), 0) FROM ledger_statements WHERE peer = ?2)",
                (*msgspec.structs.astuple(made)[:7], len(rows)),
            ),
            audit.record(by, "ledger.settle", made.id, peer=made.peer, sequence=made.sequence),
        )
    except sqlite3.IntegrityError:
        written = 0
    if not written:
        raise EntryRefused(
            f"Statement {made.sequence} does not fit: its entries, or the statement before it, "
            "have changed meanwhile. Settle again."
        )


async def pay(database: Database, statement: str, by: Actor) -> None:
    """What it left over was made good, says this side's operator; again changes nothing.  Raises
    NotFound."""
    await database.write(
        (
            "INSERT INTO ledger_paid SELECT id, ?2 FROM ledger_statements WHERE id = ?1"
            " AND NOT EXISTS (SELECT 1 FROM ledger_paid WHERE statement = ?1)",
            (statement, time.time_ns() // 1_000_000),
        ),
        audit.record(by, "ledger.paid", statement),
    )
    if not await database.read("SELECT 1 FROM ledger_paid WHERE statement = ?", (statement,)):
        raise NotFound(
            f"There is no statement {statement}: 'pinaivu ledger statements' lists them."
        )
