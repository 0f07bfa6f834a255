"""The ledger as legs need it: what peers owe and are owed, and an entry for each leg."""

from __future__ import annotations

import logging
import time

from msgspec import structs

from pinaivu_box.errors import EntryRefused
from pinaivu_box.gateway.quota import MINUTE
from pinaivu_box.ledger import entry as ledger_entry
from pinaivu_box.ledger.entry import Balance, LedgerEntry
from pinaivu_box.store.database import Database

log = logging.getLogger("pinaivu.ledger")


class LedgerRecorder:
    """`us` is this box's node id."""

    def __init__(self, database: Database, us: str) -> None:
        self._database, self._us = database, us

    async def balance(self, peer: str, currency: str) -> Balance:
        balances = await ledger_entry.balance(self._database, peer)
        return balances.get(currency, Balance())

    async def recent(self, peer: str) -> list[tuple[float, int]]:
        """Age in seconds and tokens of each leg that a peer was served in the last minute."""
        since = round((time.time() - MINUTE) * 1000)
        legs = await ledger_entry.served_since(self._database, peer, since)
        now = time.time()
        return [(now - at / 1000, tokens) for at, tokens in legs]

    async def debts(self) -> dict[str, dict[str, int]]:
        """What this box owes, by peer and currency."""
        balances = await ledger_entry.balances(self._database)
        return {
            peer: {currency: balance.owed_to_peer for currency, balance in by_currency.items()}
            for peer, by_currency in balances.items()
        }

    async def served(self, peer: str, request_id: str, leg: int, choice: int) -> bool:
        """Whether that leg is in the ledger, accepted or not."""
        return await ledger_entry.has_served(self._database, peer, request_id, leg, choice)

    async def keep(self, entry: LedgerEntry) -> None:
        """On disk when it returns.  What the ledger refuses is nobody's debt, and is logged."""
        try:
            await self._record(entry)
        except EntryRefused as error:
            log.warning("a leg of %s is not in the ledger: %s", entry.request_id, error.message)

    async def _record(self, entry: LedgerEntry) -> None:
        """What was served is owed, also if the peer accepts what contradicts the ledger, as that it
        pays for a prompt twice: then it waits as if it were not accepted.  Raises EntryRefused."""
        try:
            await ledger_entry.record(self._database, entry, self._us)
        except EntryRefused as error:
            if not (entry.served_by_us and entry.acceptance):
                raise
            log.warning("what %s accepts does not count: %s", entry.peer, error.message)
            await ledger_entry.record(
                self._database, structs.replace(entry, acceptance=b""), self._us
            )
