"""Who is a member and where peers were last: the roster and the known peers, as on disk."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from pinaivu_box.changes import Changes
from pinaivu_box.errors import CliError
from pinaivu_box.membership.records import Record, record_id
from pinaivu_box.membership.roster import Roster
from pinaivu_box.membership.tickets import MAX_ADDRESSES
from pinaivu_box.store import peers as store
from pinaivu_box.store.database import Database, SqlStatement
from pinaivu_box.store.peers import KnownPeer
from pinaivu_box.transport.wire import Code

_CERTIFICATE_SECONDS = 5.0  # how long a stream waits until its peer's certificate has come


class MembershipStore:
    """`roster` is None while this box belongs to no network.  `changes` is to be notified when the
    roster has new records.  `known`: peers by node id, that a restarted box finds them."""

    def __init__(self, database: Database) -> None:
        self.roster: Roster | None = None
        self.known: dict[str, KnownPeer] = {}
        self.changes = Changes()
        self._database = database
        self._saved_records = 0  # a roster only grows, at its end
        self._unsaved_audit: list[SqlStatement] = []  # of the records that are not saved
        self._saving = asyncio.Lock()

    def is_member(self, node_id: str) -> bool:
        return self.roster is not None and node_id in self.roster.members()

    def rejection(self, node_id: str) -> tuple[Code, str]:
        """Return with which code and reason a link to a box that is not a member is closed."""
        if self.roster is None:
            return Code.FORBIDDEN, "this box belongs to no network"
        verdict = self.roster.member(node_id)
        if verdict.ok:
            return Code.FORBIDDEN, "it did not begin the gossip"
        code = Code.FORBIDDEN if self.roster.certificate(node_id) is None else Code.REVOKED
        return code, f"it is not a member of the network: {verdict.why}"

    async def rejected(self, node_id: str) -> tuple[Code, str] | None:
        """Return why a box may open no stream, or None if it is a member.  Its certificate may be
        on its way: waits for it for a while."""
        if await self.changes.until(lambda: self.is_member(node_id), _CERTIFICATE_SECONDS):
            return None
        return self.rejection(node_id)

    def addresses_of(self, node_id: str, *current: str) -> tuple[str, ...]:
        """Return where a peer may be, the most likely first: where it is now, as far as that is
        known, and where it was before."""
        before = self.known[node_id].addresses if node_id in self.known else ()
        return tuple(dict.fromkeys([*current, *before]))[: 2 * MAX_ADDRESSES]

    async def load(self) -> None:
        """Read the known peers and the roster from disk.  Raises CliError if this is damaged."""
        await self.load_known()
        network = await store.network(self._database)
        if network is None:
            return
        rows = await store.roster(self._database)
        roster = Roster(network)
        # The records were checked when they came, but a disk can be wrong.
        update = roster.admit(Record(kind, body, signature) for _, kind, body, signature in rows)  # type: ignore[arg-type]
        if update.forged or update.refused:
            raise CliError(
                "The database's list of the network's members is damaged: see 'pinaivu doctor', "
                "and restore a backup."
            )
        self.roster, self._saved_records = roster, len(roster)

    async def load_known(self) -> None:
        self.known = await store.known(self._database)

    async def save_addresses(self, peers: Mapping[str, tuple[str, ...]], linked: set[str]) -> None:
        """Write the addresses that have changed; those `linked` are seen now."""
        changed = {
            node_id: addresses
            for node_id, addresses in peers.items()
            if node_id in linked or (addresses and addresses != self.addresses_of(node_id))
        }
        if changed:
            await store.record_seen(self._database, changed, linked=linked)
            await self.load_known()

    async def enter(self, roster: Roster, *audit: SqlStatement) -> None:
        """Belong to that roster's network from now on, and to no other."""
        rows = list(map(_row, roster.records()))
        await store.enter(self._database, roster.network, rows, *audit)
        self.roster, self._saved_records, self._unsaved_audit = roster, len(rows), []

    async def leave(self, *audit: SqlStatement) -> None:
        """Belong to no network from now on."""
        await store.leave(self._database, *audit)
        self.roster, self._saved_records, self._unsaved_audit = None, 0, []

    async def save(self, *audit: SqlStatement) -> None:
        """Return when every record of the roster is on disk, together with its audit entries.

        Call it as soon as a record is in the roster: the first caller writes it.
        """
        self._unsaved_audit += audit
        async with self._saving:
            if self.roster is None:
                return
            records = self.roster.records()[self._saved_records :]
            entries = tuple(self._unsaved_audit)
            if records:
                await store.add_records(self._database, map(_row, records), *entries)
                self._saved_records += len(records)
                del self._unsaved_audit[: len(entries)]


def _row(record: Record) -> store.StoredRecord:
    return record_id(record), record.kind, record.body, record.signature
