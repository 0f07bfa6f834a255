"""Statements: what two boxes have signed off, and the entries that no statement contains yet."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from decimal import Decimal
from hashlib import sha256
from typing import Annotated, Any

import msgspec
import rfc8785
from msgspec import Meta, Struct

from pinaivu_box.errors import EntryRefused, ProtocolError, RowNotFound
from pinaivu_box.ledger.reconcile import EntryTree
from pinaivu_box.receipts.receipt import canonical
from pinaivu_box.store import audit
from pinaivu_box.store.audit import Actor
from pinaivu_box.store.database import Database, Row
from pinaivu_box.store.times import now_ms
from pinaivu_box.text import TIME, whole

DOMAIN = "pinaivu/statement/v1"
VERSION = 1
_SUMMARY = "rowid, served_by_us, request_id, leg, choice, currency, amount, proof_sha256"
_SELECT = (
    "SELECT id, peer, sequence, ledger_statements.at, signed, ours, theirs, ledger_paid.at"
    " FROM ledger_statements LEFT JOIN ledger_paid ON statement = id"
)
_OPEN = "peer = ?1 AND statement IS NULL AND acceptance <> x''"


class Statement(Struct, frozen=True):
    """What both sign, as RFC 8785 JSON: these and no other entries lie between the two boxes since
    the statement before.

    `previous` is the SHA-256 of that statement's bytes in hex, `between` both node ids, sorted.
    `upto` is the last request id that it covers, "" for all.  `served` has by node id and currency
    what that box served, in decimal text.  `at` is the proposer's clock.
    """

    sequence: int
    previous: str
    between: list[str]
    upto: Annotated[str, Meta(pattern=whole("[!-~]{0,128}"))]
    entries: int
    entries_sha256: str
    served: dict[str, dict[str, str]]
    at: Annotated[str, Meta(pattern=TIME)]
    v: int = VERSION


class StoredStatement(Struct, frozen=True):
    """`signed` are the exact bytes under both signatures, `at` Unix milliseconds.  `paid_at` is
    when this side's operator noted that what it leaves over was paid."""

    id: str
    peer: str
    sequence: int
    at: int
    signed: bytes
    ours: bytes
    theirs: bytes
    paid_at: int | None = None


def compose(
    tree: EntryTree, between: Iterable[str], last: StoredStatement | None, upto: str, at: str
) -> Statement:
    """The statement over those entries that follows `last`, if there is one."""
    names = sorted(between)
    return Statement(
        sequence=last.sequence + 1 if last else 1,
        previous=sha256(last.signed).hexdigest() if last else "",
        between=names,
        upto=upto,
        entries=len(tree.entries),
        entries_sha256=tree.hash().hex(),
        served=tree.served(names),
        at=at,
    )


def read(signed: bytes) -> Statement:
    """Decode the bytes of a statement.

    Raises ProtocolError, also if they are not the canonical bytes of what they say.
    """
    try:
        statement = msgspec.json.decode(signed, type=Statement)
        if statement.v != VERSION or canonical(statement) != signed:
            raise ValueError(f"it is not of version {VERSION}, or not canonical")
    except (ValueError, RecursionError, rfc8785.CanonicalizationError) as error:
        raise ProtocolError(f"a statement is not valid: {error}") from error
    return statement


def statement_id(signed: bytes) -> str:
    return "stmt_" + sha256(signed).hexdigest()[:24]


def net(served: dict[str, dict[str, Any]], us: str) -> Iterator[tuple[str, Decimal]]:
    """What the other box owes `us` by a statement, in each currency; below 0 what we owe."""
    (other,) = served.keys() - {us}
    for currency in sorted(served[us].keys() | served[other].keys()):
        by_us, by_other = (Decimal(served[node].get(currency, "0")) for node in (us, other))
        yield currency, by_us - by_other


async def ls(database: Database, peer: str | None = None) -> list[StoredStatement]:
    """All statements, or those with a peer, the newest first."""
    rows = await database.scan(
        f"{_SELECT} WHERE ?1 IS NULL OR peer = ?1 ORDER BY ledger_statements.at DESC,"
        " sequence DESC",
        (peer,),
    )
    return [StoredStatement(*row) for row in rows]


async def get(database: Database, peer: str, sequence: int) -> StoredStatement | None:
    rows = await database.read(f"{_SELECT} WHERE peer = ? AND sequence = ?", (peer, sequence))
    return StoredStatement(*rows[0]) if rows else None


async def last(database: Database, peer: str) -> StoredStatement | None:
    rows = await database.read(f"{_SELECT} WHERE peer = ? ORDER BY sequence DESC LIMIT 1", (peer,))
    return StoredStatement(*rows[0]) if rows else None


async def cut(database: Database, peer: str, limit: int) -> str:
    """The request id up to which about `limit` entries are in no statement; "" if that is all."""
    rows = await database.scan(
        f"SELECT request_id FROM ledger_entries WHERE {_OPEN}"
        " ORDER BY request_id LIMIT 1 OFFSET ?2",
        (peer, limit - 1),
    )
    return str(rows[0][0]) if rows else ""


async def open_entries(database: Database, peer: str, upto: str) -> list[Row]:
    """The rowid and the summary of each accepted entry without a statement, up to that request."""
    return await database.scan(
        f"SELECT {_SUMMARY} FROM ledger_entries WHERE {_OPEN} AND (?2 = '' OR request_id <= ?2)",
        (peer, upto),
    )


async def entries_of(database: Database, statement: str) -> list[Row]:
    """The rowid and the summary of each entry of a statement."""
    return await database.scan(
        f"SELECT {_SUMMARY} FROM ledger_entries WHERE statement = ?", (statement,)
    )


async def settle(
    database: Database, statement: StoredStatement, rowids: Sequence[int], by: Actor
) -> None:
    """Write a statement and mark its entries with it, in one transaction.

    Raises EntryRefused, and changes nothing, if one of them is in a statement already or if this is
    not the next statement with that peer.
    """
    try:
        _, written, _ = await database.write(
            (
                "UPDATE ledger_entries SET statement = ?1 WHERE peer = ?2 AND statement IS NULL"
                " AND acceptance <> x'' AND rowid IN (SELECT value FROM json_each(?3))",
                (statement.id, statement.peer, msgspec.json.encode(rowids).decode()),
            ),
            # If this writes nothing, the entries refer to nothing, and all of it is undone.
            (
                "INSERT INTO ledger_statements (id, peer, sequence, at, signed, ours, theirs)"
                " SELECT ?1, ?2, ?3, ?4, ?5, ?6, ?7 WHERE"
                " ?8 = (SELECT count(*) FROM ledger_entries WHERE statement = ?1) AND ?3 = 1 + ("
                "SELECT coalesce(max(sequence), 0) FROM ledger_statements WHERE peer = ?2)",
                (*msgspec.structs.astuple(statement)[:7], len(rowids)),
            ),
            audit.record(
                by, "ledger.settle", statement.id, peer=statement.peer, sequence=statement.sequence
            ),
        )
    except sqlite3.IntegrityError:
        written = 0
    if not written:
        raise EntryRefused(
            f"Statement {statement.sequence} does not fit: its entries, or the statement before "
            "it, have changed meanwhile. Settle again."
        )


async def pay(database: Database, statement: str, by: Actor) -> None:
    """Note that what a statement leaves over was paid; doing it again changes nothing.

    Raises RowNotFound.
    """
    await database.write(
        (
            "INSERT INTO ledger_paid SELECT id, ?2 FROM ledger_statements WHERE id = ?1"
            " AND NOT EXISTS (SELECT 1 FROM ledger_paid WHERE statement = ?1)",
            (statement, now_ms()),
        ),
        audit.record(by, "ledger.paid", statement),
    )
    if not await database.read("SELECT 1 FROM ledger_paid WHERE statement = ?", (statement,)):
        raise RowNotFound(
            f"There is no statement {statement}: 'pinaivu ledger statements' lists them."
        )
