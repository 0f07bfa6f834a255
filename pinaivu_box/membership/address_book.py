"""Where peers were last, and what this box calls them: kept, so that a restarted box finds them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pinaivu_box.membership.tickets import MAX_ADDRESSES
from pinaivu_box.store import peers as store
from pinaivu_box.store.database import Database
from pinaivu_box.store.peers import KnownPeer
from pinaivu_box.transport.transport import LinkRoute


class AddressBook:
    """`known` peers by node id, as they are on disk."""

    def __init__(self, database: Database) -> None:
        self.known: dict[str, KnownPeer] = {}
        self._database = database

    async def load(self) -> None:
        self.known = await store.known(self._database)

    def addresses_of(
        self, node_id: str, route: LinkRoute | None, advertised: Sequence[str]
    ) -> tuple[str, ...]:
        """Return where a peer may be, the most likely first: where its link leads, where it says
        that it is, where it was before."""
        current = [route.address] if route and route.address else []
        before = self.known[node_id].addresses if node_id in self.known else ()
        return tuple(dict.fromkeys([*current, *advertised, *before]))[: 2 * MAX_ADDRESSES]

    async def save(self, peers: Mapping[str, tuple[str, ...]], linked: set[str]) -> None:
        """Write the addresses that have changed; those `linked` are seen now."""
        changed = {
            node_id: addresses
            for node_id, addresses in peers.items()
            if node_id in linked
            or (addresses and addresses != self.addresses_of(node_id, None, ()))
        }
        if changed:
            await store.record_seen(self._database, changed, linked=linked)
            await self.load()
