"""Networks of a few boxes of this process, over links in memory."""

from __future__ import annotations

import asyncio
from pathlib import Path

from pinaivu_box.gossip.adverts import Facts, Offer
from pinaivu_box.identity import Identity
from pinaivu_box.network.network import Network
from pinaivu_box.peering_config import PeeringConfig
from pinaivu_box.store.database import Database
from pinaivu_box.transport.link import LinkOptions, Stream
from tests.support.keys import IDENTITIES
from tests.support.memory_transport import MemoryNetwork, MemoryTransport
from tests.support.records import offer
from tests.support.waiting import soon, wait_until


async def echo(peer: str, stream: Stream) -> None:
    while (frame := await stream.receive()) is not None:
        await stream.send(frame)
    await stream.finish()


class Site:
    """One home, which can be opened and closed again and again."""

    def __init__(self, group: SiteGroup, identity: Identity, name: str, home: Path) -> None:
        self.group, self.identity, self.name = group, identity, name
        self.database = Database(home / f"{name}.db")
        self.network: Network
        self.offers: tuple[Offer, ...] = (offer(),)
        self.options = LinkOptions(beat_seconds=0.05, max_silent=40)

    async def open(self) -> Network:
        self.transport = MemoryTransport(
            self.group.net, self.identity.node_id, self.options, f"at:{self.name}"
        )
        await self.database.open()
        settings = PeeringConfig(name=self.name)
        self.network = Network(
            self.identity, self.transport, self.database, lambda: settings, self.describe
        )
        self.network.handlers["echo"] = echo
        await self.network.start()
        self.running = asyncio.create_task(self.network.run())
        return self.network

    def describe(self) -> Facts:
        return Facts("1.0", (), "credits", self.offers)

    async def close(self) -> None:
        await self.network.close()
        await self._end()

    async def kill(self) -> None:
        """Without a word: the others hear nothing any more."""
        self.group.net.silence(self.identity.node_id)
        await self.transport.close()
        await self._end()
        self.group.net.hear(self.identity.node_id)

    async def _end(self) -> None:
        self.running.cancel()
        await asyncio.wait([self.running])
        await self.network._tasks.cancel()
        await self.database.close()


class SiteGroup:
    def __init__(self, home: Path) -> None:
        self.net, self.home = MemoryNetwork(), home
        self.sites: list[Site] = []

    async def box(self, name: str) -> Network:
        site = Site(self, IDENTITIES[len(self.sites)], name, self.home)
        self.sites.append(site)
        return await site.open()

    async def joined(self, *names: str) -> list[Network]:
        """The first invites the second, the second is not asked: all tickets are the first's."""
        boxes = [await self.box(name) for name in names]
        for newcomer in boxes[1:]:
            await soon(newcomer.join(await boxes[0].invite()))
        await wait_until(lambda: all(whole(one, len(boxes)) for one in boxes))
        return boxes

    def transport(self, number: int) -> MemoryTransport:
        """A box of which only the transport is there: it does as the test says."""
        return MemoryTransport(self.net, IDENTITIES[number].node_id, None, f"at:bad{number}")


def whole(box: Network, count: int) -> bool:
    """Connected to all others, and with an advert of each."""
    peers = box.peers()
    return len(peers) == count - 1 and all(
        peer.state == "connected" and peer.advert for peer in peers
    )


def states(box: Network) -> dict[str, str]:
    return {peer.name: peer.state for peer in box.peers()}
