"""Legs that peers have served and audits have proven false: not owed in this box's eyes.

Entries stay as they are, under both signatures, and so do statements: the peer's books have them,
and nobody can take a signature back.  What is disproved is a sum beside them, with the evidence
that an operator shows when it does not pay.
"""

from __future__ import annotations

from msgspec import Struct

from pinaivu_box.store import transcripts
from pinaivu_box.store.database import Database
from pinaivu_box.store.times import now_ms
from pinaivu_box.store.transcripts import StoredTranscript


class StoredDisproof(Struct, frozen=True):
    """`signed` is the text of an `audits.disproof.Disproof` under the 64-byte `signature`.
    `amount` in 10^-9 of the currency, `at` Unix milliseconds."""

    peer: str
    request_id: str
    leg: int
    choice: int
    at: int
    amount: int
    currency: str
    signed: bytes
    signature: bytes


_COLUMNS = ", ".join(StoredDisproof.__struct_fields__)
_LEG = "peer = ?1 AND request_id = ?2 AND leg = ?3 AND choice = ?4"


async def record(
    database: Database,
    leg: tuple[str, str, int, int],
    signed: bytes,
    signature: bytes,
    sealed: StoredTranscript | None,
) -> None:
    """Store the evidence about a `leg`: peer, request id, number, choice.  `sealed` is kept too, if
    the request has no transcript yet.  Recording the same leg again changes nothing."""
    amount = f"coalesce((SELECT {{}} FROM ledger_entries WHERE {_LEG} AND NOT served_by_us), {{}})"
    statement = (
        f"INSERT INTO ledger_disproofs ({_COLUMNS}) SELECT ?1, ?2, ?3, ?4, ?5,"
        f" {amount.format('amount', 0)}, {amount.format('currency', repr(''))}, ?6, ?7"
        f" WHERE NOT EXISTS (SELECT 1 FROM ledger_disproofs WHERE {_LEG})"
    )
    keeping = () if sealed is None else (transcripts.storing_if_missing(leg[1], sealed),)
    await database.write((statement, (*leg, now_ms(), signed, signature)), *keeping)


async def ls(database: Database, peer: str | None = None) -> list[StoredDisproof]:
    """All of them, or those about a peer, the newest first."""
    rows = await database.scan(
        f"SELECT {_COLUMNS} FROM ledger_disproofs WHERE ?1 IS NULL OR peer = ?1"
        " ORDER BY at DESC, rowid DESC",
        (peer,),
    )
    return [StoredDisproof(*row) for row in rows]


async def of_request(database: Database, request_id: str) -> list[StoredDisproof]:
    rows = await database.scan(
        f"SELECT {_COLUMNS} FROM ledger_disproofs WHERE request_id = ? ORDER BY choice, leg",
        (request_id,),
    )
    return [StoredDisproof(*row) for row in rows]
