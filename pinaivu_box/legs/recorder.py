"""What the store knows of peers when a leg begins or ends: terms, debts, the ledger, opinions."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections.abc import Callable

from msgspec import structs

from pinaivu_box import amount
from pinaivu_box.config import Config
from pinaivu_box.errors import EntryRefused
from pinaivu_box.gateway.quota import MINUTE
from pinaivu_box.ledger import entry as ledger_entry
from pinaivu_box.ledger.entry import Balance, LedgerEntry
from pinaivu_box.legs.admission import PeerLimits
from pinaivu_box.legs.client import AcceptedLeg
from pinaivu_box.legs.server import Served
from pinaivu_box.routing.reputation import Reputation
from pinaivu_box.store import opinions, peer_settings
from pinaivu_box.store.database import Database
from pinaivu_box.store.peer_settings import PeerSettings

log = logging.getLogger("pinaivu.ledger")

_REMEMBER_SECONDS = 60.0


class LedgerRecorder:
    def __init__(self, database: Database, us: str, config: Callable[[], Config]) -> None:
        self._database, self._us, self._config = database, us, config
        self._settings: dict[str, PeerSettings] = {}

    def changed(self) -> None:
        """The store has other settings for peers now."""
        self._settings = {}

    async def terms(self, peer: str) -> PeerLimits:
        """What is set for that peer, and else `[peering.serve]`."""
        settings = self._settings  # what is read now is of no use after a change
        if peer not in settings:
            settings[peer] = await peer_settings.get(self._database, peer)
        set_ = settings[peer].limits
        serve = self._config().peering.serve
        tokens = serve.tokens_per_minute
        if set_.tokens_per_minute is not None:
            tokens = set_.tokens_per_minute
        credit = serve.credit_limit if set_.credit_limit is None else set_.credit_limit
        return PeerLimits(
            max_parallel=set_.max_parallel or serve.max_parallel,
            tokens_per_minute=tokens or None,
            credit=amount.parse(credit) if credit else None,
            idle_beyond=serve.beyond == "idle",
            models=serve.models if set_.models is None else set_.models,
            hours=serve.hours if set_.hours is None else set_.hours,
            blocked=set_.blocked,
        )

    async def owed(self, peer: str, currency: str) -> Balance:
        found = await ledger_entry.balance(self._database, peer)
        return found.get(currency, Balance())

    async def lately(self, peer: str) -> list[tuple[float, int]]:
        """What we served a peer in the last minute: how many seconds ago, and its tokens."""
        now = time.time()
        found = await ledger_entry.lately(self._database, peer, round((now - MINUTE) * 1000))
        return [(now - at / 1000, tokens) for at, tokens in found]

    async def debts(self) -> dict[str, dict[str, int]]:
        """What we owe, by peer and currency."""
        found = await ledger_entry.balances(self._database)
        return {
            peer: {currency: balance.owed_to_peer for currency, balance in mine.items()}
            for peer, mine in found.items()
        }

    async def served(self, peer: str, request_id: str, leg: int, choice: int) -> bool:
        """Whether that is in the ledger, accepted or not."""
        return await ledger_entry.has(self._database, peer, request_id, leg, choice)

    async def keep(self, leg: Served | AcceptedLeg) -> None:
        """On disk when it returns.  What the ledger refuses is nobody's debt, and is logged."""
        disputed = None
        if isinstance(leg, Served):
            proof, signed, acceptance = leg.proof, leg.signed, leg.acceptance
            disputed = leg.disputed
        else:
            proof, signed = leg.proved.proof, leg.proved.signed
            acceptance = leg.proved.acceptance
        entry = LedgerEntry(
            peer=leg.peer,
            served_by_us=isinstance(leg, Served),
            request_id=proof.request_id,
            leg=proof.leg,
            choice=proof.choice,
            amount=leg.amount,
            currency=proof.price.currency,
            at=time.time_ns() // 1_000_000,
            proof=signed.signed.encode(),
            signature=bytes.fromhex(signed.signature),
            acceptance=acceptance,
            disputed=disputed,
        )
        try:
            await self._record(entry)
        except EntryRefused as error:
            log.warning("a leg of %s is not in the ledger: %s", proof.request_id, error.message)

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

    async def remember(self, reputation: Reputation) -> None:
        """Until cancelled: what is thought of peers is on disk within a minute, and at the end."""
        reputation.recall(await opinions.load(self._database))
        try:
            while True:
                await asyncio.sleep(_REMEMBER_SECONDS)
                await self._keep_opinions(reputation)
        finally:
            await self._keep_opinions(reputation)

    async def _keep_opinions(self, reputation: Reputation) -> None:
        changed, reputation.changed = reputation.changed, set()
        try:
            if changed:
                found = {node_id: reputation.opinions[node_id] for node_id in changed}
                await opinions.keep(self._database, found)
        except sqlite3.Error:
            reputation.changed |= changed
            log.exception("what is thought of peers could not be written, it is tried again")
