"""Claims: what this box served and the peer has not accepted, and the same of the peer's.

The box that served a leg shows its proof again.  The other accepts it if its own ledger or receipts
hold that very proof, as after a crash in which the acceptance was lost; otherwise it says why not,
and the box that served can only write the entry off.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from pinaivu_box import amount
from pinaivu_box.errors import EntryRefused, RowConflict
from pinaivu_box.identity import Identity
from pinaivu_box.ledger import entry as ledger_entry
from pinaivu_box.ledger import wire as ledger_wire
from pinaivu_box.ledger.entry import LedgerEntry
from pinaivu_box.receipts.receipt import ACCEPTANCE_DOMAIN, Proof, Receipt
from pinaivu_box.store import audit
from pinaivu_box.store.audit import Actor
from pinaivu_box.store.database import Database
from pinaivu_box.store.requests import find_receipt
from pinaivu_box.store.times import now_ms
from pinaivu_box.transport import wire

_WAITING = "peer = ?1 AND served_by_us AND acceptance = x'' AND forgiven_at IS NULL"
_receipt, _proof = msgspec.json.Decoder(Receipt), msgspec.json.Decoder(Proof)


class Forgiven(Struct, frozen=True):
    """How many entries were written off, and their sums by currency, in decimal text."""

    entries: int
    amounts: dict[str, str]


class ClaimsExchange:
    """The claims of one session.

    `accepted` counts those that have been accepted, on either side; `disputed` has the entries that
    have not, with the reason: ours that the peer does not accept, and its that we do not.
    """

    def __init__(self, identity: Identity, database: Database, peer: str) -> None:
        self.accepted = 0
        self.disputed: dict[LedgerEntry, str] = {}
        self._identity, self._database, self._peer = identity, database, peer
        self._us = identity.node_id
        self._shown: list[LedgerEntry] = []

    async def show(self) -> ledger_wire.ClaimEntries:
        """As many of this box's claims as fit into a frame; the next session shows the others."""
        claims = await waiting(self._database, self._peer, ledger_wire.MAX_ENTRIES)
        self._shown = ledger_wire.fitting(claims)
        return ledger_wire.ClaimEntries([ledger_wire.Claim.of(entry) for entry in self._shown])

    async def take_judgement(self, judged: ledger_wire.Judged) -> None:
        """Record what the peer says of the claims that were shown.

        Raises EntryRefused if an acceptance is not valid.
        """
        disputed = {}
        for entry in self._shown:
            key = entry.summary(self._us).key
            if (signature := judged.accepted.get(key)) is not None:
                accepted = replace(entry, acceptance=signature)
                await ledger_entry.record(self._database, accepted, self._us)
                self.accepted += 1
            elif (reason := judged.disputed.get(key)) is not None:
                disputed[entry] = wire.printable(reason)
        await dispute(self._database, disputed)
        self.disputed |= disputed
        self._shown = []

    async def judge(self, claims: ledger_wire.ClaimEntries) -> ledger_wire.Judged:
        """Accept the peer's claims or say why not; what is accepted is on disk on return."""
        judged = ledger_wire.Judged({}, {})
        for claim in claims.claims:
            entry = claim.entry(self._peer)
            key = entry.summary(self._us).key
            try:
                judged.accepted[key] = await self._accept(entry)
                self.accepted += 1
            except EntryRefused as error:
                reason = error.message[: ledger_wire.MAX_REASON_CHARACTERS]
                self.disputed[entry] = judged.disputed[key] = reason
        return judged

    async def _accept(self, entry: LedgerEntry) -> bytes:
        """Record the entry with this box's signature and return that.  Raises EntryRefused."""
        if (reason := await why_unknown(self._database, entry)) is not None:
            raise EntryRefused(reason)
        signature = self._identity.sign(ACCEPTANCE_DOMAIN, entry.proof)
        accepted = replace(entry, acceptance=signature)
        await ledger_entry.record(self._database, accepted, self._us)
        return signature


async def waiting(database: Database, peer: str, limit: int) -> list[LedgerEntry]:
    """What the peer has not accepted: first what it has said nothing of, of that the oldest."""
    order = "disputed IS NOT NULL, at, rowid"
    return await ledger_entry.where(
        database, f"{_WAITING} ORDER BY {order} LIMIT ?2", (peer, limit)
    )


async def dispute(database: Database, reasons: Mapping[LedgerEntry, str]) -> None:
    """Record why the peer does not accept entries."""
    if reasons:
        disputing = (
            f"UPDATE ledger_entries SET disputed = ?2 WHERE {_WAITING} AND request_id = ?3"
            " AND leg = ?4 AND choice = ?5"
        )
        await database.write(
            *(
                (disputing, (entry.peer, reason, entry.request_id, entry.leg, entry.choice))
                for entry, reason in reasons.items()
            )
        )


async def forgive(database: Database, peer: str, by: Actor) -> Forgiven:
    """Write off all that the peer has not accepted: it uses up its credit no longer.  An entry that
    it accepts later counts again.

    Raises RowConflict.
    """
    rows = await database.scan(
        f"SELECT rowid, amount, currency FROM ledger_entries WHERE {_WAITING}", (peer,)
    )
    sums: Counter[str] = Counter()
    for _, units, currency in rows:
        sums[currency] += units
    forgiven = Forgiven(len(rows), {name: amount.to_text(units) for name, units in sums.items()})
    if not rows:
        return forgiven
    chosen = f"{_WAITING} AND rowid IN (SELECT value FROM json_each(?2))"
    (changed, _) = await database.write(
        (
            f"UPDATE ledger_entries SET forgiven_at = ?3 WHERE {chosen}"
            f" AND ?4 = (SELECT count(*) FROM ledger_entries WHERE {chosen})",
            (peer, msgspec.json.encode([row[0] for row in rows]).decode(), now_ms(), len(rows)),
        ),
        audit.record(
            by, "ledger.forgive", peer, entries=forgiven.entries, amounts=forgiven.amounts
        ),
    )
    if not changed:
        raise RowConflict("The peer has accepted some of it meanwhile: look at it, and try again.")
    return forgiven


async def why_unknown(database: Database, entry: LedgerEntry) -> str | None:
    """Why this box's ledger and receipts do not confirm what a peer claims to have served; None if
    they hold that very proof."""
    recorded = await database.read(
        "SELECT 1 FROM ledger_entries WHERE peer = ? AND NOT served_by_us AND request_id = ?"
        " AND leg = ? AND choice = ? AND proof = ?",
        (entry.peer, entry.request_id, entry.leg, entry.choice, entry.proof),
    )
    if recorded:
        return None
    stored = await find_receipt(database, entry.request_id, account_id=None)
    if stored is None:
        return "there is no receipt of that request here"
    for signed in _receipt.decode(stored.signed).proofs:
        proof = _proof.decode(signed.signed)
        if (proof.leg, proof.choice) == (entry.leg, entry.choice) and proof.node_id == entry.peer:
            if proof.witness is not None:
                return f"it was lost here after {proof.completion_tokens} tokens"
            same = signed.signed.encode() == entry.proof
            return None if same else "the receipt here has another proof of it"
    return "the receipt here does not contain it"
