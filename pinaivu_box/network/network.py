"""The box's place in a network: links to members, the gossip over them, streams to peers."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from random import Random

from msgspec import msgpack
from msgspec.structs import replace

from pinaivu_box import __version__
from pinaivu_box.errors import LinkLost, PeeringError, Unreachable
from pinaivu_box.gossip import topology
from pinaivu_box.gossip.adverts import Facts
from pinaivu_box.gossip.channel import NOT_READING, GossipChannel
from pinaivu_box.gossip.protocol import TICK_SECONDS, Gossip
from pinaivu_box.identity import Identity
from pinaivu_box.membership import joining, peer_names
from pinaivu_box.membership.joining import JoinHandler
from pinaivu_box.membership.records import MAX_BODY_BYTES
from pinaivu_box.membership.roster import Roster
from pinaivu_box.membership.store import MembershipStore
from pinaivu_box.membership.tickets import MAX_ADDRESSES, Ticket
from pinaivu_box.network import peer
from pinaivu_box.network.peer import OwnView, Peer, own_model
from pinaivu_box.peering_config import PeeringConfig
from pinaivu_box.store.audit import BOX, Actor, record
from pinaivu_box.store.database import Database
from pinaivu_box.tasks import TaskSet
from pinaivu_box.transport import wire
from pinaivu_box.transport.connections import LinkManager
from pinaivu_box.transport.link import Link, Stream
from pinaivu_box.transport.streams import StreamHandler, StreamRouter
from pinaivu_box.transport.transport import Transport
from pinaivu_box.transport.wire import Code, Open

GOSSIP = "gossip"
MAX_UNCERTIFIED_LINKS = 64  # links to boxes that are not members (yet)
GOSSIP_START_SECONDS = 10.0  # for a new link, after which a member has begun the gossip
LOAD_QUERY_SECONDS = 0.2
_FLUSH_SECONDS = 1.0  # at the end
_CHANGE_DELAY_SECONDS = 0.005
_SAVE_SECONDS = 30.0  # between two writes of the address book
_MAX_NAME_CHARACTERS = 64
_ADVERT_OVERHEAD_BYTES = 256  # of what an advert has beside the facts
_NOT_CLOSED = (None, Code.DROPPED, Code.SILENT)  # codes of links that were lost

log = logging.getLogger("pinaivu.peering")


class Network:
    """Owns the links and drives the gossip: implements `connections.LinkOwner` and
    `gossip.protocol.Effects`.

    `describe` returns what this box offers; its addresses are filled in here.  `handlers` by
    purpose are set by others before `run`.  `start` comes before anything else.
    """

    def __init__(
        self,
        identity: Identity,
        transport: Transport,
        database: Database,
        settings: Callable[[], PeeringConfig],
        describe: Callable[[], Facts],
    ) -> None:
        self.node_id = identity.node_id
        name = wire.printable(settings().name or socket.gethostname())
        self.name = name[:_MAX_NAME_CHARACTERS] or "box"  # as a certificate can have it
        self._settings = settings
        self.handlers: dict[str, StreamHandler] = {}
        # Called when `peers` may return something else: when a link is made, and with each tick.
        self.peers_changed: Callable[[], None] = lambda: None
        # Called with a member's node id: its link was lost (not closed), or there is one again.
        self.peer_lost: Callable[[str], None] = lambda _: None
        self.peer_is_back: Callable[[str], None] = lambda _: None
        self.gossip: Gossip | None = None
        self._identity, self._transport, self._database = identity, transport, database
        self._describe, self._random = describe, Random()  # noqa: S311, it only spreads load
        self._membership = MembershipStore(database)
        self._join_handler = JoinHandler(identity, self._membership, database)
        self._channels: dict[Link, GossipChannel] = {}
        self._tasks = TaskSet()
        self._spawn = self._tasks.spawn
        for_all = {GOSSIP: self._run_gossip, joining.PURPOSE: self._handle_join}
        self._router = StreamRouter(for_all, self.handlers, self._membership.rejected)
        self._links = LinkManager(transport, self, self._router, self._tasks, self._random)
        self._joining = asyncio.Lock()
        self._tick_now = asyncio.Event()
        self._saved_at = time.monotonic()
        self._peers: list[Peer] | None = None  # None: something has changed since
        self._closing = self._change_pending = False
        self._rejected_by: dict[str, str] = {}  # members that revoked this box, and why

    @property
    def roster(self) -> Roster | None:
        return self._membership.roster

    @property
    def network_id(self) -> str | None:
        """None until this box has founded or joined a network."""
        return self.roster.network if self.roster is not None else None

    @property
    def revoked(self) -> str:
        """Why this box is not a member of its network any more, "" if it is one.  It may never
        receive the revocation: then what members answer counts, while none takes it for a
        member."""
        if self.roster is None or self.gossip is None:
            return ""
        verdict = self.roster.member(self.node_id, time.time())
        if not verdict.ok:
            return verdict.why
        if not self._rejected_by or any(map(self.gossip.accepted_by, self.gossip.links)):
            return ""
        node_id, why = next(reversed(self._rejected_by.items()))
        return why or f"{self.peer(node_id).name} does not take it for a member of the network"

    # Start and end

    async def start(self) -> None:
        """Load the roster and the known peers."""
        await self._membership.load()
        self._restart_gossip()

    async def run(self) -> None:
        """Accept and make links and gossip over them, until cancelled."""
        await asyncio.gather(self._links.accept_links(), self._tick_forever())

    async def close(self) -> None:
        """Send the last adverts, then close the links and the transport."""
        self._closing = True
        self._tick()
        with suppress(TimeoutError):
            async with asyncio.timeout(_FLUSH_SECONDS):
                await asyncio.gather(*[channel.flush() for channel in self._channels.values()])
        await self._save_addresses()
        await self._transport.close()
        await self._tasks.cancel()

    def changed(self) -> None:
        """Note that `describe` returns something else: neighbours are notified, and all members if
        it is worth an advert.  With a short delay: the caller has more urgent things to do."""
        if not self._change_pending:
            self._change_pending = True
            asyncio.get_running_loop().call_later(_CHANGE_DELAY_SECONDS, self._send_change)

    def _send_change(self) -> None:
        self._change_pending = False
        if self.gossip is None or (before := self.gossip.facts) is None:
            return
        self.gossip.facts = self._facts()
        self.gossip.push_load()
        if self.gossip.facts.gist() != before.gist():
            self._tick_now.set()

    async def query_load(self, model: str) -> None:
        """Ask the links for the load of the boxes that have a model, so that `peers` has it.  Takes
        a round trip."""
        if (gossip := self.gossip) is not None:
            gossip.query_load(model)
            loads = gossip.loads
            await loads.reports.until(lambda: not loads.waiting(model), LOAD_QUERY_SECONDS)

    async def _tick_forever(self) -> None:
        while True:
            self._tick()
            with suppress(TimeoutError):
                async with asyncio.timeout(TICK_SECONDS * self._random.uniform(0.9, 1.1)):
                    await self._tick_now.wait()
                    await asyncio.sleep(TICK_SECONDS / 20)  # more changes may follow at once
            self._tick_now.clear()
            if time.monotonic() - self._saved_at > _SAVE_SECONDS:
                await self._save_addresses()

    def _tick(self) -> None:
        self._peers = None
        self.peers_changed()
        try:
            if self.gossip is not None:
                self.gossip.facts = self._facts()
                self.gossip.tick()
                if not self._closing:
                    self._maintain_links(self.gossip.roster.members())
        except Exception:  # a bug here must not end the links
            log.exception("a round of gossip failed")

    def _facts(self) -> Facts:
        """What this box offers; as many models as fit into an advert."""
        facts = self._describe()
        facts = replace(
            facts,
            addresses=tuple(self.own_addresses()),
            draining=facts.draining or self._closing,
        )
        while len(msgpack.encode(facts)) > MAX_BODY_BYTES - _ADVERT_OVERHEAD_BYTES:
            facts = replace(facts, models=facts.models[:-1])
        return facts

    def _maintain_links(self, members: dict[str, int]) -> None:
        if self.node_id not in members:
            return
        links, random = self._links, self._random
        for node_id in topology.to_dial(
            self.node_id, members, links.not_to_dial(), len(links), random
        ):
            links.dial(node_id)
        idle = [peer for peer, link in links.by_peer.items() if not link.streams]
        for node_id in topology.to_drop(members, idle, len(links.by_peer), random):
            self._close_link(links.by_peer[node_id], Code.BUSY, "this box has enough links")

    async def _save_addresses(self) -> None:
        """Write where members are, for the next start."""
        self._saved_at = time.monotonic()
        members = set() if self.roster is None else self.roster.members().keys() - {self.node_id}
        linked = members & self._links.by_peer.keys()
        await self._membership.save_addresses(
            {node_id: self.addresses(node_id) for node_id in members}, linked
        )

    # Links: `connections.LinkOwner`

    def own_addresses(self) -> list[str]:
        """Return the advertised addresses: what the operator has configured, then what was found.
        The last one may be a relay, which is reachable when no other is."""
        addresses = list(dict.fromkeys([*self._settings().advertise, *self._transport.addresses()]))
        if len(addresses) <= MAX_ADDRESSES:
            return addresses
        return [*addresses[: MAX_ADDRESSES - 1], addresses[-1]]

    def addresses(self, peer: str) -> tuple[str, ...]:
        """As `MembershipStore.addresses_of`: where its link leads, and where it says that it is."""
        link = self._links.by_peer.get(peer)
        current = [link.route().address] if link else []
        if self.gossip and (entry := self.gossip.adverts.get(peer)):
            current += entry.advert.addresses
        return self._membership.addresses_of(peer, *filter(None, current))

    def link_opened(self, link: Link) -> None:
        self._peers = None
        uncertified = sum(not self._membership.is_member(peer) for peer in self._links.by_peer)
        if uncertified > MAX_UNCERTIFIED_LINKS:
            self._close_link(link, Code.BUSY, "too many boxes that are not members: try again")
            return
        if link.dialed:
            self._spawn(self._start_gossip(link))
        else:
            self._spawn(self._close_without_gossip(link))

    def link_closed(self, link: Link, why: LinkLost) -> None:
        self._peers = None
        if self._channels.pop(link, None) and self.gossip:
            lost = why.code in _NOT_CLOSED
            self.gossip.link_down(link.peer, lost=lost)
            if lost and not self._closing and self._membership.is_member(link.peer):
                self.peer_lost(link.peer)
        self._saved_at = 0.0  # save where the peer was: its advert is forgotten soon
        if why.code == Code.REVOKED and self._membership.is_member(link.peer):
            self._rejected_by[link.peer] = why.reason
            name = wire.short(link.peer)
            log.warning("%s does not take this box for a member: %s", name, why.reason)
        log.info("link to %s ended: %s", wire.short(link.peer), why.message)

    def _close_link(self, link: Link, code: Code, why: str) -> None:
        self._spawn(link.close(code, why))

    async def _close_without_gossip(self, link: Link) -> None:
        """A newcomer cannot begin it before it is certified, which takes long on a busy disk."""
        await asyncio.sleep(GOSSIP_START_SECONDS)
        if await self._join_handler.answered(link.peer):
            await asyncio.sleep(GOSSIP_START_SECONDS)
        if link not in self._channels:
            self._reject(link)

    def _reject(self, link: Link) -> None:
        self._close_link(link, *self._membership.rejection(link.peer))

    # Gossip, and its `Effects`

    def _restart_gossip(self) -> None:
        self._peers = self.gossip = None
        if self.roster is not None:
            self.gossip = Gossip(
                self._identity,
                self.roster,
                self,
                clock=time.monotonic,
                wall=time.time,
                random=self._random,
            )

    async def _start_gossip(self, link: Link) -> None:
        try:
            stream = await link.open()
            await stream.send(wire.encode(Open(GOSSIP)))
        except PeeringError:
            return  # the link has ended, and is reported elsewhere
        await self._run_gossip(link.peer, stream)

    async def _run_gossip(self, peer: str, stream: Stream) -> None:
        gossip, link = self.gossip, stream.link
        if self._links.by_peer.get(peer) is not link:
            await link.closed()  # it is replaced by another one, as the peer is about to see
            return
        if link in self._channels:
            code, _ = self._membership.rejection(peer)
            self._close_link(link, code, "a link has one gossip stream")
            return
        if gossip is None:
            self._reject(link)
            return
        channel = self._channels[link] = GossipChannel(stream)
        log.info("link to %s is up", wire.short(peer))
        self._saved_at = 0.0  # save the address with the next tick
        gossip.link_up(peer)
        self.peer_is_back(peer)
        self._peers = None
        self.peers_changed()

        def on_frame(frame: bytes) -> None:
            self._peers = None
            gossip.receive(peer, frame)
            if self._rejected_by and gossip.accepted_by(peer):
                self._rejected_by.pop(peer, None)

        why = await channel.run(on_frame)
        if self._links.by_peer.get(peer) is link:
            self._close_link(link, Code.PROTOCOL, why)

    def send(self, peer: str, frame: bytes) -> None:
        """Queue a frame of the gossip; a peer that does not read is disconnected."""
        link = self._links.by_peer.get(peer)
        channel = self._channels.get(link) if link else None
        if link and channel and not channel.send(frame):
            self._close_link(link, Code.PROTOCOL, NOT_READING)

    def disconnect(self, peer: str, why: str) -> None:
        member = self._membership.is_member(peer)
        code = Code.PROTOCOL if member else self._membership.rejection(peer)[0]
        self._links.close(peer, code, why)

    def roster_changed(self) -> None:
        self._peers = None
        self._membership.changes.notify()
        self._tick_now.set()
        self._spawn(self._membership.save())

    # Streams

    async def open(self, peer: str, purpose: str, timeout: float = 5.0) -> Stream:
        """Open a stream to a member, over a new link if there is none.  Raises Unreachable,
        WrongPeer, LinkLost; if the peer refuses it, the first `receive` raises PeerRefused."""
        if not self._membership.is_member(peer):
            _, why = self._membership.rejection(peer)
            raise Unreachable(f"{wire.short(peer)}: {why}.")
        try:
            async with asyncio.timeout(timeout):
                return await self._links.open(peer, Open(purpose))
        except TimeoutError as error:
            raise Unreachable(f"{wire.short(peer)} did not answer within {timeout:g} s.") from error

    # Peers

    def peers(self) -> list[Peer]:
        """Return every other member, and who was revoked, by name."""
        if self._peers is None:
            self._peers = self._look_up_peers()
        return self._peers

    def _look_up_peers(self) -> list[Peer]:
        if self.gossip is None:
            return []
        known = self._membership.known
        peers = [
            peer.view(node_id, self.addresses(node_id), self.gossip, self._links, known)
            for node_id in self.gossip.roster.known()
            if node_id != self.node_id
        ]
        return sorted(peers, key=lambda peer: (peer.name, peer.node_id))

    def peer(self, text: str) -> Peer:
        """Return a peer by its node id, the beginning of that, or its name.  Raises
        PeerNotFound."""
        peers = {peer.node_id: peer for peer in self.peers()}
        names = {node_id: peer.name for node_id, peer in peers.items()}
        return peers[peer_names.find(text, names)]

    def own_view(self, facts: Facts, relay: str) -> OwnView:
        """Return this box as its peers see it."""
        network_id, revoked = self.network_id, self.revoked
        return OwnView(
            id=self.node_id,
            name=self.name,
            network=network_id or "",
            software=__version__,
            addresses=self.own_addresses(),
            relay=relay,
            models=[own_model(offer) for offer in facts.models],
            state="revoked" if revoked else "member" if network_id else "alone",
            why=revoked,
            currency=facts.currency,
            draining=facts.draining,
        )

    async def renamed(self) -> None:
        """Note that the store has other names for peers."""
        await self._membership.load_known()
        self._peers = None

    # Operations; `by` is for the audit trail, which gets its entry in the same transaction

    async def invite(
        self,
        name: str | None = None,
        expires: float = 3600.0,
        uses: int = 1,
        admin: bool = False,
        by: Actor = BOX,
    ) -> str:
        """Return a ticket's text, shown once, that expires in so many seconds.  The first one
        founds a network.  Raises NotJoined if this box may not invite."""
        async with self._joining:
            if self.roster is None:
                await self._join_handler.found_network(self.name)
                self._restart_gossip()
            await self._transport.wait_for_addresses()
            return await self._join_handler.invite(
                self.own_addresses(), name, expires, uses, admin, by
            )

    async def join(self, ticket: str, by: Actor = BOX, at: Sequence[str] = ()) -> Peer:
        """Redeem a ticket and return the inviter.  Raises PeeringError.

        `at`: addresses of the inviter that its ticket does not have; they are tried first.  A box
        that is alone in its network may join another one, and gives up its own.
        """
        async with self._joining:
            read = self._join_handler.read_ticket(ticket)
            addresses = tuple(dict.fromkeys([*at, *read.addresses]))
            read = replace(read, addresses=addresses[:MAX_ADDRESSES])
            member = self.network_id == read.network_id and self._membership.is_member(self.node_id)
            # Without any link, or rejected by the inviter, it may have been revoked and not know:
            # so ask the inviter.  Those to which it still has links may not know it either.
            linked = any(peer.state == "connected" for peer in self.peers())
            if not (member and linked) or read.node_id in self._rejected_by:
                await self._join(read, by)
        return self.peer(read.node_id)

    async def _join(self, ticket: Ticket, by: Actor) -> None:
        link, roster = await joining.redeem_at_inviter(self._transport, ticket, self.name)
        self._close_all_links()
        entry = record(by, "peer.join", roster.network, inviter=ticket.node_id)
        await self._membership.enter(roster, entry)
        self._begin_anew()
        await self._membership.save_addresses({ticket.node_id: ticket.addresses}, {ticket.node_id})
        self._links.add(link)
        self._tick_now.set()

    def _close_all_links(self) -> None:
        for node_id in list(self._links.by_peer):
            self._links.close(node_id, Code.SHUTDOWN, "it belongs to another network now")

    async def leave(self, by: Actor = BOX) -> None:
        """Belong to no network any more; its members only see that this box is gone."""
        async with self._joining:
            self._close_all_links()
            await self._membership.leave(record(by, "peer.leave", self.network_id or ""))
            self._begin_anew()

    def _begin_anew(self) -> None:
        """Forget what concerned the network that this box has left."""
        self._links.reset_backoff()
        self._rejected_by.clear()
        self._restart_gossip()

    async def remove(self, text: str, reason: str = "", by: Actor = BOX) -> Peer:
        """Revoke a peer, permanently and everywhere, and return it.  Raises PeerNotFound,
        NotJoined."""
        revoked = self.peer(text)
        assert self.gossip is not None  # else there are no peers
        revocation = await self._join_handler.revoke(revoked.node_id, revoked.name, reason, by)
        self.gossip.spread([revocation])
        return self.peer(revoked.node_id)

    async def _handle_join(self, peer: str, stream: Stream) -> None:
        records = await self._join_handler.handle(peer, stream)
        if records and self.gossip is not None:
            self.gossip.spread(records)
