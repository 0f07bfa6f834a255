"""The box's place in a network: links to members, the gossip over them, streams to peers."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from random import Random
from typing import Any

from msgspec import msgpack
from msgspec.structs import replace

from pinaivu_box.config import PeeringConfig
from pinaivu_box.errors import LinkLost, PeeringError, Unreachable
from pinaivu_box.gossip import topology
from pinaivu_box.gossip.adverts import Facts
from pinaivu_box.gossip.protocol import TICK, Gossip
from pinaivu_box.identity import Identity
from pinaivu_box.membership import joining
from pinaivu_box.membership.address_book import AddressBook
from pinaivu_box.membership.joining import JoinHandler
from pinaivu_box.membership.roster import Roster
from pinaivu_box.membership.signed import MAX_BODY_BYTES
from pinaivu_box.membership.store import MembershipStore
from pinaivu_box.membership.tickets import MAX_ADDRESSES, Ticket
from pinaivu_box.network import peer
from pinaivu_box.network.peer import Peer
from pinaivu_box.store.audit import BOX, Actor, record
from pinaivu_box.store.database import Database
from pinaivu_box.transport import wire
from pinaivu_box.transport.connections import Links, OpenLink
from pinaivu_box.transport.gossip_channel import DEAF, GossipChannel
from pinaivu_box.transport.incoming import Handler, Incoming, OwnHandler
from pinaivu_box.transport.opening import Open, OpenedStream
from pinaivu_box.transport.transport import Stream, Transport
from pinaivu_box.transport.wire import Code

GOSSIP = "gossip"
MAX_STRANGERS = 64  # links of those who are no members (yet)
STRANGER_SECONDS = 10.0  # in which a new link must show that a member made it
LOOK_SECONDS = 0.2  # for what the links say of the loads of others
_GOODBYE_SECONDS = 1.0
_MOMENT_SECONDS = 0.005
_REMEMBER_SECONDS = 30.0
_LOST = (None, Code.DROPPED, Code.SILENT)  # nobody said goodbye

log = logging.getLogger("pinaivu.peering")


class Network:
    """`describe` says what this box offers; its addresses are filled in here.  `handlers` by
    purpose are set by others before `run`.  `start` before anything else."""

    def __init__(
        self,
        identity: Identity,
        transport: Transport,
        database: Database,
        settings: Callable[[], PeeringConfig],
        describe: Callable[[], Facts],
        random: Random | None = None,
    ) -> None:
        self.node_id = identity.node_id
        self.name = _name(settings().name or socket.gethostname())
        self._settings = settings
        self.handlers: dict[str, Handler] = {}
        # Called when `peers` may tell something else: as a link is made, and with each tick.
        self.peers_changed: Callable[[], None] = lambda: None
        self.gossip: Gossip | None = None
        self._identity, self._transport, self._database = identity, transport, database
        self._describe, self._random = describe, random or Random()  # noqa: S311 - to spread load, not to hide anything
        self._standing = MembershipStore(database)
        self._gate = JoinHandler(identity, self._standing, database)
        self._links = Links(transport, self, self._random)
        self._book = AddressBook(database)
        self._tasks: set[asyncio.Task[None]] = set()
        own: dict[str, OwnHandler] = {GOSSIP: self._talk, joining.PURPOSE: self._welcome}
        self._incoming = Incoming(own, self.handlers, self._standing.shut_out, self._standing.code)
        self._joining = asyncio.Lock()
        self._wake, self._news, self._told = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._remembered = time.monotonic()
        self._seen: list[Peer] | None = None  # None: something has happened since
        self._closing = self._stirred = False
        self._put_out: dict[str, str] = {}  # why a member does not take this box for one

    @property
    def roster(self) -> Roster | None:
        return self._standing.roster

    @property
    def network_id(self) -> str | None:
        """None until this box has founded or joined one."""
        return self.roster.network if self.roster is not None else None

    @property
    def revoked(self) -> str:
        """Why this box is no member of its network any more, "" if it is one.  It may never see
        the revocation: then what members answer counts, while none takes it for a member."""
        if self.roster is None or self.gossip is None:
            return ""
        verdict = self.roster.member(self.node_id, time.time())
        if not verdict.ok:
            return verdict.why
        if not self._put_out or any(map(self.gossip.welcomed, self.gossip.links)):
            return ""
        peer, why = next(reversed(self._put_out.items()))
        name = self.peer(peer).name
        return why or f"{name} says that it is no member of the network"

    # From start to end

    async def start(self) -> None:
        """Take up what the store says."""
        await self._standing.load()
        await self._book.load()
        self._gossip_anew()

    async def run(self) -> None:
        """Accept, connect, reconnect and gossip until cancelled."""
        await asyncio.gather(self._links.accept(), self._tick_forever())

    async def close(self) -> None:
        """Say goodbye, then close the links and the transport."""
        self._closing = True
        self._tick()
        talks = [held.talk.said() for held in self._links.held.values() if held.talk]
        with suppress(TimeoutError):
            async with asyncio.timeout(_GOODBYE_SECONDS):
                await asyncio.gather(*talks)
        await self._remember()
        await self._transport.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def changed(self) -> None:
        """`describe` says something else: the links hear it, and all if it is worth an advert.
        After a moment: whoever says so has more urgent things to do."""
        if not self._stirred:
            self._stirred = True
            asyncio.get_running_loop().call_later(_MOMENT_SECONDS, self._tell_change)

    def _tell_change(self) -> None:
        self._stirred = False
        if self.gossip is None or (was := self.gossip.facts) is None:
            return
        self.gossip.facts = self._facts()
        self.gossip.push()
        if self.gossip.facts.gist() != was.gist():
            self._wake.set()

    async def look(self, model: str) -> None:
        """Ask the links who is busy with it; `peers` then knows.  Takes a round trip."""
        if self.gossip is None:
            return
        self.gossip.ask(model)
        with suppress(TimeoutError):
            async with asyncio.timeout(LOOK_SECONDS):
                while self.gossip.loads.waiting(model):
                    await self._told.wait()

    async def _tick_forever(self) -> None:
        while True:
            self._tick()
            with suppress(TimeoutError):
                async with asyncio.timeout(TICK * self._random.uniform(0.9, 1.1)):
                    await self._wake.wait()
                    await asyncio.sleep(TICK / 20)  # what changes now often changes again
            self._wake.clear()
            if time.monotonic() - self._remembered > _REMEMBER_SECONDS:
                await self._remember()

    def _tick(self) -> None:
        self._seen = None
        self.peers_changed()
        try:
            if self.gossip is not None:
                self.gossip.facts = self._facts()
                self.gossip.tick()
                if not self._closing:
                    self._mind_neighbours(self.gossip.roster.members())
        except Exception:  # a mistake of ours must not end the links
            log.exception("a round of gossip failed")

    def _facts(self) -> Facts:
        facts = self._describe()
        facts = replace(
            facts,
            addresses=tuple(self.own_addresses()),
            draining=facts.draining or self._closing,
        )
        while len(msgpack.encode(facts)) > MAX_BODY_BYTES - 256:
            facts = replace(facts, models=facts.models[:-1])
        return facts

    def _mind_neighbours(self, members: dict[str, int]) -> None:
        if self.node_id not in members:
            return
        links = self._links
        for one in topology.to_dial(self.node_id, members, links.busy(), len(links), self._random):
            links.dial(one)
        idle = [held.peer for held in links.held.values() if held.idle]
        for one in topology.to_drop(members, idle, len(links.held), self._random):
            self._cut(links.held[one], Code.BUSY, "this box has links enough")

    async def _remember(self) -> None:
        """Where members were found, for the next start."""
        self._remembered = time.monotonic()
        members = set() if self.roster is None else self.roster.members().keys() - {self.node_id}
        linked = members & self._links.held.keys()
        await self._book.keep({one: self.addresses(one) for one in members}, linked)

    # Links; `Links` calls these

    def own_addresses(self) -> list[str]:
        """What others are told: what the operator says, then what is found.  The last one may be a
        relay, which leads here when none does."""
        found = list(dict.fromkeys([*self._settings().advertise, *self._transport.addresses()]))
        return found if len(found) <= MAX_ADDRESSES else [*found[: MAX_ADDRESSES - 1], found[-1]]

    def addresses(self, node_id: str) -> tuple[str, ...]:
        """Where it may be, the most likely first."""
        held = self._links.held.get(node_id)
        advert = self.gossip.adverts.get(node_id) if self.gossip else None
        route = held.link.facts().route if held else None
        return self._book.find(node_id, route, advert.advert.addresses if advert else ())

    def began(self, held: OpenLink) -> None:
        self._seen = None
        strangers = sum(not self._standing.has(one) for one in self._links.held)
        if strangers > MAX_STRANGERS:
            self._cut(held, Code.BUSY, "too many strangers call: try again")
            return
        if held.dialed:
            self.spawn(self._begin_talk(held))
        else:
            self.spawn(self._doubt(held))

    def ended(self, held: OpenLink, why: LinkLost) -> None:
        self._seen = None
        if self.gossip and held.talk:
            self.gossip.unlinked(held.peer, lost=why.code in _LOST)
        self._remembered = 0.0  # where it was: its advert is forgotten soon
        if why.code == Code.REVOKED and self._standing.has(held.peer):
            self._put_out[held.peer] = why.reason
            log.warning("%s takes this box for no member: %s", wire.short(held.peer), why.reason)
        log.info("link to %s ended: %s", wire.short(held.peer), why.message)

    def _cut(self, held: OpenLink, code: Code, why: str) -> None:
        self.spawn(held.link.close(code, why))

    async def _doubt(self, held: OpenLink) -> None:
        await asyncio.sleep(STRANGER_SECONDS)
        if held.talk is None:
            self._cut(held, self._standing.code(held.peer), self._standing.why_not(held.peer))

    # Gossip, and its `Effects`

    def _gossip_anew(self) -> None:
        self._seen = None
        if self.roster is None:
            self.gossip = None
            return
        effects, random = _Effects(self), self._random
        self.gossip = Gossip(
            self._identity, self.roster, effects, clock=time.monotonic, wall=time.time,
            random=random,
        )  # fmt: skip
        self.gossip.loads.answered = self._answered

    def _answered(self) -> None:
        self._told.set()
        self._told = asyncio.Event()

    async def _begin_talk(self, held: OpenLink) -> None:
        try:
            stream = await held.link.open()
            await stream.send(wire.encode(Open(GOSSIP)))
        except PeeringError:
            return  # the link has ended, and its watcher says why
        await self._talk(held, stream)

    async def _talk(self, held: OpenLink, stream: Stream) -> None:
        gossip = self.gossip
        if self._links.held.get(held.peer) is not held:
            await held.link.closed()  # another one took its place, as the peer is about to see
            return
        if held.talk or gossip is None:
            why = "one gossip is enough" if held.talk else self._standing.why_not(held.peer)
            self._cut(held, self._standing.code(held.peer), why)
            return
        held.talk = talk = GossipChannel(stream)
        log.info("link to %s stands", wire.short(held.peer))
        self._remembered = 0.0  # with the next round
        gossip.linked(held.peer)
        self._seen = None
        self.peers_changed()

        def hear(frame: bytes) -> None:
            self._seen = None
            gossip.received(held.peer, frame)
            if self._put_out and gossip.welcomed(held.peer):
                self._put_out.pop(held.peer, None)

        end = await talk.run(hear)
        if self._links.held.get(held.peer) is held:
            self._cut(held, Code.PROTOCOL, end.reason or "the gossip has ended")

    def say(self, node_id: str, frame: bytes) -> None:
        held = self._links.held.get(node_id)
        if held and held.talk and not held.talk.say(frame):
            self._cut(held, Code.PROTOCOL, DEAF)

    def cut(self, node_id: str, why: str) -> None:
        code = Code.PROTOCOL if self._standing.has(node_id) else self._standing.code(node_id)
        for held in self._links.of(node_id):
            self._cut(held, code, why)

    def roster_changed(self) -> None:
        self._seen = None
        self._standing.changed()
        self._wake.set()
        self.spawn(self._standing.keep())

    # Streams

    async def open(self, peer: str, purpose: str, timeout: float = 5.0) -> Stream:
        """A stream to a member, connecting if there is no link.  Unreachable, WrongPeer, LinkLost;
        if it is refused, the first `receive` raises PeerRefused."""
        if not self._standing.has(peer):
            raise Unreachable(f"{wire.short(peer)}: {self._standing.why_not(peer)}.")
        try:
            async with asyncio.timeout(timeout):
                while True:
                    held = await self._links.get(peer)
                    try:
                        stream = await held.link.open()
                    except LinkLost:
                        if self._links.held.get(peer) in (held, None):
                            raise
                        continue  # it was replaced by a second one
                    opened = OpenedStream(peer, stream, Open(purpose))
                    held.opened.add(opened)
                    return opened
        except TimeoutError as error:
            raise Unreachable(f"{wire.short(peer)} did not answer within {timeout:g} s.") from error

    def serve(self, held: OpenLink) -> None:
        self.spawn(self._serve(held))

    async def _serve(self, held: OpenLink) -> None:
        """Until the link ends."""
        with suppress(PeeringError):
            while True:
                self.spawn(self._incoming.take(held, await held.link.accept()))

    # Who is there, who comes and who goes

    def peers(self) -> list[Peer]:
        """Every member but us, and who was revoked, by name."""
        if self._seen is None:
            self._seen = self._look()
        return self._seen

    def _look(self) -> list[Peer]:
        if self.gossip is None:
            return []
        roster = self.gossip.roster
        scene = peer.NetworkState(
            roster, self.gossip, self._links, self._book.known, time.monotonic()
        )
        found = [
            peer.view(one, self.addresses(one), scene)
            for one in roster.known()
            if one != self.node_id
        ]
        return sorted(found, key=lambda one: (one.name, one.node_id))

    def peer(self, text: str) -> Peer:
        """By node_id, the beginning of one, or name.  PeerNotFound."""
        return peer.find(self.peers(), text)

    async def renamed(self) -> None:
        """The store has other names for peers now."""
        await self._book.load()
        self._seen = None

    # What operators do; `by` is for the audit trail, which tells of it in the same transaction

    async def invite(
        self,
        name: str | None = None,
        expires: float = 3600.0,
        uses: int = 1,
        admin: bool = False,
        by: Actor = BOX,
    ) -> str:
        """A ticket's text, shown once; `expires` in seconds from now.  The first founds a network.
        NotJoined if this box may not invite, or the numbers make no sense."""
        async with self._joining:
            if self.roster is None:
                await self._gate.found(self.name)
                self._gossip_anew()
            await self._transport.settle()
            return await self._gate.invite(self.own_addresses(), name, expires, uses, admin, by)

    async def join(self, ticket: str, by: Actor = BOX, at: Sequence[str] = ()) -> Peer:
        """Redeem a ticket; returns the inviter.  PeeringError says what is wrong with it.

        `at`: addresses of the inviter that its ticket does not know; they are tried too.  A box
        that is alone in its network may join another one, and its own is no more.
        """
        async with self._joining:
            found = self._gate.read(ticket)
            places = tuple(dict.fromkeys([*at, *found.addresses]))
            found = replace(found, addresses=places[:MAX_ADDRESSES])
            belongs = self.network_id == found.network_id and self._standing.has(self.node_id)
            # Without any link it may have been put out and not have heard of it: ask.
            if not (belongs and any(peer.state == "connected" for peer in self.peers())):
                await self._join(found, by)
        return self.peer(found.node_id)

    async def _join(self, ticket: Ticket, by: Actor) -> None:
        link, roster = await joining.ask(self._transport, ticket, self.name)
        self._part()
        told = record(by, "peer.join", roster.network, inviter=ticket.node_id)
        await self._standing.enter(roster, told)
        self._links.forget()
        self._put_out.clear()
        self._gossip_anew()
        await self._book.keep({ticket.node_id: ticket.addresses}, {ticket.node_id})
        self._links.add(link, dialed=True)
        self._wake.set()

    def _part(self) -> None:
        for one in list(self._links.held):
            for held in self._links.of(one):
                self._cut(held, Code.SHUTDOWN, "it belongs to another network now")

    async def leave(self, by: Actor = BOX) -> None:
        """Belong to no network any more; its members only see that this box is gone."""
        async with self._joining:
            self._part()
            await self._standing.leave(record(by, "peer.leave", self.network_id or ""))
            self._links.forget()
            self._put_out.clear()
            self._gossip_anew()

    async def remove(self, text: str, reason: str = "", by: Actor = BOX) -> Peer:
        """Revoke a peer, for ever and everywhere.  PeerNotFound, NotJoined."""
        found = self.peer(text)
        assert self.gossip is not None  # else there are no peers
        self.gossip.tell(await self._gate.revoke(found.node_id, found.name, reason, by))
        return self.peer(found.node_id)

    async def _welcome(self, held: OpenLink, stream: Stream) -> None:
        new = await self._gate.welcome(held.peer, stream)
        if new and self.gossip is not None:
            self.gossip.tell(new)


class _Effects:
    """What the gossip wants done."""

    def __init__(self, network: Network) -> None:
        self.send, self.cut, self.changed = network.say, network.cut, network.roster_changed


def _name(text: str) -> str:
    """As a certificate can have it."""
    return "".join(one for one in text if one.isprintable())[:64] or "box"
