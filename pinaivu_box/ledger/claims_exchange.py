"""In the ledger's conversation: what one box served and the other has not accepted.

Who served shows its proof again.  The other accepts it if its own books or receipts hold that very
proof, as after a crash in which the acceptance was lost; otherwise it says why not, and who served
can only write it off (`store.claims`).
"""

from __future__ import annotations

import time

from msgspec.structs import replace

from pinaivu_box.errors import EntryRefused
from pinaivu_box.identity import Identity
from pinaivu_box.ledger import claims as store
from pinaivu_box.ledger import entry as ledger_entry
from pinaivu_box.ledger import reconcile
from pinaivu_box.ledger import wire as w
from pinaivu_box.ledger.entry import LedgerEntry
from pinaivu_box.receipts.receipt import ACCEPTANCE_DOMAIN
from pinaivu_box.store.database import Database
from pinaivu_box.transport import wire


class ClaimsExchange:
    """Of one conversation.  `accepted` are so many by now, on either side; `disputed` are entries
    and why: ours that the peer does not accept, and its that we do not."""

    def __init__(self, identity: Identity, database: Database, peer: str) -> None:
        self.accepted = 0
        self.disputed: dict[LedgerEntry, str] = {}
        self._identity, self._database, self._peer = identity, database, peer
        self._shown: list[LedgerEntry] = []

    async def show(self) -> w.ClaimEntries:
        """As many of ours as go into one frame; settling again shows the others."""
        self._shown, size = [], 0
        for one in await store.waiting(self._database, self._peer, w.TOGETHER):
            size += len(one.proof) + 1000
            if self._shown and size > w.BATCH_BYTES:
                break
            self._shown.append(one)
        return w.ClaimEntries(
            [
                w.Claim(e.amount, e.proof, e.signature, e.request_id, e.leg, e.choice, e.currency)
                for e in self._shown
            ]
        )

    async def heard(self, judged: w.Judged) -> None:
        """What the peer says of what we have shown.  EntryRefused if an acceptance is none."""
        disputed = {}
        for one in self._shown:
            place = _place(self._identity.node_id, one)
            if (signature := judged.accepted.get(place)) is not None:
                accepted = replace(one, acceptance=signature)
                await ledger_entry.record(self._database, accepted, self._identity.node_id)
                self.accepted += 1
            elif (why := judged.disputed.get(place)) is not None:
                disputed[one] = wire.printable(why)
        await store.dispute(self._database, disputed)
        self.disputed |= disputed
        self._shown = []

    async def judge(self, claimed: w.ClaimEntries) -> w.Judged:
        """Of what the peer has shown; what is accepted is on disk when it returns."""
        judged = w.Judged({}, {})
        for one in claimed.claims:
            entry = LedgerEntry(
                self._peer, False, one.request_id, one.leg, one.choice, one.amount, one.currency,
                time.time_ns() // 1_000_000, one.proof, one.signature,
            )  # fmt: skip
            try:
                judged.accepted[_place(self._peer, entry)] = await self._accept(entry)
                self.accepted += 1
            except EntryRefused as error:
                self.disputed[entry] = error.message[: w.SENTENCE]
                judged.disputed[_place(self._peer, entry)] = self.disputed[entry]
        return judged

    async def _accept(self, entry: LedgerEntry) -> bytes:
        """Our signature, in the books.  Raises EntryRefused with why there is none."""
        us = self._identity.node_id
        if (why := await store.why_unknown(self._database, entry)) is not None:
            raise EntryRefused(why)
        signature = self._identity.sign(ACCEPTANCE_DOMAIN, entry.proof)
        await ledger_entry.record(self._database, replace(entry, acceptance=signature), us)
        return signature


def _place(server: str, entry: LedgerEntry) -> bytes:
    return reconcile.place(server, entry.request_id, entry.leg, entry.choice)
