"""Where members may be, and what this box calls them: kept, so that a restarted box finds them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pinaivu_box.membership.tickets import MAX_ADDRESSES
from pinaivu_box.store import peers as store
from pinaivu_box.store.database import Database
from pinaivu_box.store.peers import Known
from pinaivu_box.transport.transport import LinkRoute


class AddressBook:
    def __init__(self, database: Database) -> None:
        self.known: dict[str, Known] = {}
        self._database = database

    async def load(self) -> None:
        self.known = await store.known(self._database)

    def find(self, node_id: str, route: LinkRoute | None, said: Sequence[str]) -> tuple[str, ...]:
        """The most likely first: where it is now, where it says to be, where it once was."""
        here = [route.address] if route and route.address else []
        once = self.known[node_id].addresses if node_id in self.known else ()
        return tuple(dict.fromkeys([*here, *said, *once]))[: 2 * MAX_ADDRESSES]

    async def keep(self, found: Mapping[str, tuple[str, ...]], linked: set[str]) -> None:
        """What is new; those `linked` are seen now."""
        new = {
            node_id: addresses
            for node_id, addresses in found.items()
            if node_id in linked or (addresses and addresses != self.find(node_id, None, ()))
        }
        if new:
            await store.seen(self._database, new, linked=linked)
            await self.load()
