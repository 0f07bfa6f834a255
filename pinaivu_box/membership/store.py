"""Where this box belongs, kept: the network's roster in memory and, record by record, on disk."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from pinaivu_box.errors import CliError
from pinaivu_box.membership.records import Record, record_id
from pinaivu_box.membership.roster import Roster
from pinaivu_box.store import peers as store
from pinaivu_box.store.database import Database, Statement
from pinaivu_box.transport.wire import Code

_BELONG_SECONDS = 5.0  # how long a stream waits until its peer's certificate has come


class MembershipStore:
    """`roster` is None while this box belongs to no network."""

    def __init__(self, database: Database) -> None:
        self.roster: Roster | None = None
        self._database = database
        self._kept = 0  # a roster only grows, at its end: so many of its records are on disk
        self._told: list[Statement] = []  # of those that are not, for the audit trail
        self._keeping, self._news = asyncio.Lock(), asyncio.Event()

    def has(self, node_id: str) -> bool:
        """Whether that box is a member."""
        return self.roster is not None and node_id in self.roster.members()

    def why_not(self, node_id: str) -> str:
        """Why it is none."""
        if self.roster is None:
            return "this box belongs to no network"
        verdict = self.roster.member(node_id)
        return "it said nothing" if verdict.ok else f"it is no member of the network: {verdict.why}"

    def code(self, node_id: str) -> Code:
        """With which a link to who is no member is closed."""
        known = self.roster is not None and self.roster.certificate(node_id) is not None
        return Code.REVOKED if known and not self.has(node_id) else Code.FORBIDDEN

    async def shut_out(self, node_id: str) -> str | None:
        """Why it may open nothing, or None if it is a member; its certificate may be under way."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_BELONG_SECONDS):
                while not self.has(node_id):
                    await self._news.wait()
        return None if self.has(node_id) else self.why_not(node_id)

    def changed(self) -> None:
        """The roster has: whoever waits to be a member of it may be one now."""
        self._news.set()
        self._news = asyncio.Event()

    async def load(self) -> None:
        network = await store.network(self._database)
        if network is None:
            return
        found = await store.roster(self._database)
        roster = Roster(network)
        # They were checked when they came, but a disk can lie.
        done = roster.admit(Record(kind, body, signed) for _, kind, body, signed in found)  # type: ignore[arg-type]
        if done.forged or done.refused:
            raise CliError(
                "The database's list of the network's members is damaged: see 'pinaivu doctor', "
                "and restore a backup."
            )
        self.roster, self._kept = roster, len(roster)

    async def enter(self, roster: Roster, *told: Statement) -> None:
        """Belong to its network from now on, and to no other."""
        rows = list(map(_row, roster.records()))
        await store.enter(self._database, roster.network, rows, *told)
        self.roster, self._kept, self._told = roster, len(rows), []

    async def leave(self, *told: Statement) -> None:
        await store.leave(self._database, *told)
        self.roster, self._kept, self._told = None, 0, []

    async def keep(self, *told: Statement) -> None:
        """Returns when every record of the roster is on disk.  Call it as soon as a record is
        there: whoever comes first writes it, together with what is `told` of it."""
        self._told += told
        async with self._keeping:
            if self.roster is None:
                return
            new, notes = self.roster.records()[self._kept :], tuple(self._told)
            if new:
                await store.add_records(self._database, map(_row, new), *notes)
                self._kept += len(new)
                del self._told[: len(notes)]


def _row(record: Record) -> store.StoredRecord:
    return record_id(record), record.kind, record.body, record.signature
