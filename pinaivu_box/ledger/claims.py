"""What this box served and the peer has not accepted: shown to it, disputed by it, written off."""

from __future__ import annotations

import time
from collections.abc import Mapping

import msgspec
from msgspec import Struct

from pinaivu_box import amount
from pinaivu_box.errors import Conflict
from pinaivu_box.ledger.entry import LedgerEntry
from pinaivu_box.receipts.receipt import Proof, Receipt
from pinaivu_box.store import audit
from pinaivu_box.store.audit import Actor
from pinaivu_box.store.database import Database, Statement
from pinaivu_box.store.requests import find_receipt

_COLUMNS = ", ".join(LedgerEntry.__struct_fields__)
_WAITING = "peer = ?1 AND served_by_us AND acceptance = x'' AND forgiven_at IS NULL"
_receipt, _proof = msgspec.json.Decoder(Receipt), msgspec.json.Decoder(Proof)


class Forgiven(Struct, frozen=True):
    """How many entries were written off, and what they came to, by currency, decimal text."""

    entries: int
    amounts: dict[str, str]


async def waiting(database: Database, peer: str, most: int) -> list[LedgerEntry]:
    """Those that the peer has said nothing of come first, of these the oldest."""
    rows = await database.read(
        f"SELECT {_COLUMNS} FROM ledger_entries WHERE {_WAITING}"
        " ORDER BY disputed IS NOT NULL, at, rowid LIMIT ?2",
        (peer, most),
    )
    return [msgspec.convert(dict(row), LedgerEntry, strict=False) for row in rows]


async def dispute(database: Database, reasons: Mapping[LedgerEntry, str]) -> None:
    """Why the peer does not accept them."""
    if reasons:
        await database.write(*(_disputing(entry, why) for entry, why in reasons.items()))


def _disputing(entry: LedgerEntry, why: str) -> Statement:
    return (
        f"UPDATE ledger_entries SET disputed = ?2 WHERE {_WAITING} AND request_id = ?3"
        " AND leg = ?4 AND choice = ?5",
        (entry.peer, why, entry.request_id, entry.leg, entry.choice),
    )


async def forgive(database: Database, peer: str, by: Actor) -> Forgiven:
    """Write off all that waits: it is held against the peer no longer.  If it accepts one of them
    later, that one counts again.  Raises Conflict."""
    rows = await database.scan(
        f"SELECT rowid, amount, currency FROM ledger_entries WHERE {_WAITING}", (peer,)
    )
    sums: dict[str, int] = {}
    for _, units, currency in rows:
        sums[currency] = sums.get(currency, 0) + units
    made = Forgiven(len(rows), {name: amount.to_text(units) for name, units in sums.items()})
    if not rows:
        return made
    chosen = f"{_WAITING} AND rowid IN (SELECT value FROM json_each(?2))"
    (changed, _) = await database.write(
        (
            f"UPDATE ledger_entries SET forgiven_at = ?3 WHERE {chosen}"
            f" AND ?4 = (SELECT count(*) FROM ledger_entries WHERE {chosen})",
            (
                peer,
                msgspec.json.encode([row[0] for row in rows]).decode(),
                time.time_ns() // 1_000_000,
                len(rows),
            ),
        ),
        audit.record(by, "ledger.forgive", peer, entries=made.entries, amounts=made.amounts),
    )
    if not changed:
        raise Conflict("The peer has accepted some of it meanwhile: look at it, and try again.")
    return made


async def why_unknown(database: Database, entry: LedgerEntry) -> str | None:
    """Why our own books and receipts do not bear out what a peer says that it served us; None if
    they hold that very proof."""
    known = await database.read(
        "SELECT 1 FROM ledger_entries WHERE peer = ? AND NOT served_by_us AND request_id = ?"
        " AND leg = ? AND choice = ? AND proof = ?",
        (entry.peer, entry.request_id, entry.leg, entry.choice, entry.proof),
    )
    if known:
        return None
    stored = await find_receipt(database, entry.request_id, account_id=None)
    if stored is None:
        return "there is no receipt of that request here"
    for signed in _receipt.decode(stored.signed).proofs:
        ours = _proof.decode(signed.signed)
        if (ours.leg, ours.choice) == (entry.leg, entry.choice) and ours.node_id == entry.peer:
            if ours.witness is not None:
                return f"it was lost here after {ours.completion_tokens} tokens"
            same = signed.signed.encode() == entry.proof
            return None if same else "the receipt here has another proof of it"
    return "the receipt here has nothing of it"
