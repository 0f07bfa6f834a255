"""Networks of a few boxes over links in memory: joining, staying, leaving, and bad company."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from random import Random
from typing import Any
from unittest.mock import Mock

import msgspec
import pytest

from pinaivu_box.errors import LinkLost, NotJoined, PeeringError, PeerNotFound, PeerRefused
from pinaivu_box.gossip import channel
from pinaivu_box.ledger import views as ledger_views
from pinaivu_box.membership import joining as joining_protocol
from pinaivu_box.membership import store as membership_store
from pinaivu_box.membership import tickets
from pinaivu_box.membership.roster import Roster
from pinaivu_box.network import network
from pinaivu_box.network.network import Network
from pinaivu_box.store import audit, peer_settings
from pinaivu_box.store.audit import BOX, Actor
from pinaivu_box.store.database import SqlStatement
from pinaivu_box.tasks import TaskSet
from pinaivu_box.transport import streams, wire
from pinaivu_box.transport.connections import LinkManager
from pinaivu_box.transport.link import Stream
from pinaivu_box.transport.wire import Code, Open
from tests.support.keys import IDENTITIES
from tests.support.memory_transport import MemoryTransport
from tests.support.network_sites import Site, SiteGroup, states, whole
from tests.support.records import offer
from tests.support.waiting import soon, wait_until

pytestmark = pytest.mark.anyio


async def asked(box: Network, peer: Network, frame: bytes = b"hello") -> None:
    stream = await soon(box.open(peer.node_id, "echo"))
    await stream.send(frame)
    assert await soon(stream.receive()) == frame
    await stream.finish()
    assert await soon(stream.receive()) is None


# -- joining -------------------------------------------------------------------------------------


async def test_joining_one_joins_all(group: SiteGroup) -> None:
    boxes = await group.joined("one", "two", "three")
    assert len({box.network_id for box in boxes}) == 1
    assert states(boxes[2]) == {"one": "connected", "two": "connected"}
    peer = boxes[1].peer("three")
    assert peer.inviter == boxes[0].node_id and not peer.admin
    assert peer.advert and peer.advert.models == (offer(),)
    for box in boxes:
        for other in boxes:
            if other is not box:
                await asked(box, other)


async def test_a_ticket_names_the_newcomer_and_makes_it_an_admin(group: SiteGroup) -> None:
    one, two, three = [await group.box(name) for name in ("one", "two", "three")]
    await two.join(await one.invite(name="office", admin=True))
    await three.join(await two.invite(admin=True))
    await wait_until(lambda: whole(one, 3))
    assert states(one) == {"office": "connected", "three": "connected"}
    assert one.peer("office").admin and one.peer("three").inviter == two.node_id
    await peer_settings.edit(group.sites[0].database, two.node_id, BOX, name="den", limits={})
    await one.renamed()
    assert one.peer("den").node_id == two.node_id


async def test_the_link_of_a_newcomer_stays_while_the_inviters_disk_is_slow(
    group: SiteGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = [await group.box(name) for name in ("one", "two")]
    ticket = await one.invite()
    monkeypatch.setattr(network, "GOSSIP_START_SECONDS", 0.05)
    database, waiting, goes_on = group.sites[0].database, asyncio.Event(), asyncio.Event()
    write = database.write

    async def slow(*statements: SqlStatement) -> list[int]:
        waiting.set()
        await goes_on.wait()
        return await write(*statements)

    monkeypatch.setattr(database, "write", slow)
    joining = asyncio.create_task(two.join(ticket))
    await soon(waiting.wait())
    await asyncio.sleep(0.5)  # in which the link would have been closed
    monkeypatch.setattr(network, "GOSSIP_START_SECONDS", 10.0)
    goes_on.set()
    assert (await soon(joining)).name == "one"
    await wait_until(lambda: states(one) == {"two": "connected"})


@pytest.mark.parametrize("deed", ["invite", "join", "revoke", "leave"])
async def test_a_change_that_cannot_be_audited_is_not_made(group: SiteGroup, deed: str) -> None:
    """A trail that takes no such line stands for a box that dies between the deed and its line."""
    one, two = await group.joined("one", "two")
    three = await group.box("three")
    by = Actor("key_1", "10.0.0.1")

    async def do(ticket: str) -> tuple[Site, str, dict[str, object]]:
        match deed:
            case "invite":
                await one.invite("den", uses=2, by=by)
                return group.sites[0], one.network_id or "", {"name": "den", "uses": 2}
            case "join":
                await soon(three.join(ticket, by))
                return group.sites[2], one.network_id or "", {"inviter": one.node_id}
            case "revoke":
                await one.remove("two", "sold", by)
                return group.sites[0], two.node_id, {"name": "two", "reason": "sold"}
            case _:
                network_id = two.network_id or ""
                await two.leave(by)
                return group.sites[1], network_id, {}

    tables = "network", "roster", "tickets"

    async def stored() -> list[list[tuple[object, ...]]]:
        return [
            [tuple(row) for row in await site.database.read(f"SELECT * FROM {table}")]
            for site in group.sites
            for table in tables
        ]

    ticket = await one.invite()
    before = await stored()
    deaf = (
        f"CREATE TRIGGER deaf BEFORE INSERT ON audit WHEN NEW.action = 'peer.{deed}'"
        " BEGIN SELECT RAISE(ABORT, 'no room'); END"
    )
    for site in group.sites:
        await site.database.write((deaf, ()))
    with pytest.raises(sqlite3.IntegrityError, match="no room"):
        await do(ticket)
    unchanged = await stored()
    if deed == "join":  # the inviter has let it in, and would again
        assert unchanged[6:] == before[6:]
    else:
        assert unchanged == before
    for site in group.sites:
        await site.database.write(("DROP TRIGGER deaf", ()))
    if deed == "revoke":  # it is known, and will be on disk with the next record
        await group.sites[0].close()
        await group.sites[0].open()
        one = group.sites[0].network
    site, target, detail = await do(ticket)
    (told,) = [e for e in await audit.ls(site.database) if e.action == f"peer.{deed}"][:1]
    assert (told.actor, told.source, told.target) == ("key_1", "10.0.0.1", target)
    assert told.detail.items() >= detail.items()


async def test_a_ticket_is_for_so_many_boxes_however_they_come(group: SiteGroup) -> None:
    boxes = [await group.box(name) for name in ("one", "two", "three", "four")]
    ticket = await boxes[0].invite(uses=2)
    done = await soon(
        asyncio.gather(*(one.join(ticket) for one in boxes[1:]), return_exceptions=True)
    )
    (refused,) = [one for one in done if isinstance(one, Exception)]
    assert isinstance(refused, PeerRefused) and "used already" in refused.message
    late = boxes[1:][done.index(refused)]
    assert late.network_id is None and late.peers() == []


async def test_a_repeated_join_uses_its_ticket_once(group: SiteGroup) -> None:
    one, two, three = [await group.box(name) for name in ("one", "two", "three")]
    ticket = await one.invite()
    await two.join(ticket)
    await group.sites[1].close()
    (group.home / "two.db").unlink()  # it never got the answer, as far as it knows
    two = await group.sites[1].open()
    await soon(two.join(ticket))
    assert whole_roster(one) == whole_roster(two)
    with pytest.raises(PeerRefused, match="used already"):
        await soon(three.join(ticket))


def whole_roster(box: Network) -> set[bytes]:
    assert box.roster is not None
    return {record.body for record in box.roster.records()}


async def test_uses_are_remembered_by_a_box_that_was_restarted(group: SiteGroup) -> None:
    one, two, three = [await group.box(name) for name in ("one", "two", "three")]
    ticket, fresh = await one.invite(), await one.invite()
    await two.join(ticket)
    await group.sites[0].kill()
    await group.sites[0].open()
    with pytest.raises(PeerRefused, match="used already"):
        await soon(three.join(ticket))
    await soon(three.join(fresh))


@pytest.mark.parametrize("hours", [-24, 24])
async def test_the_inviters_clock_alone_decides(
    group: SiteGroup, monkeypatch: pytest.MonkeyPatch, hours: int
) -> None:
    one, two = await group.box("one"), await group.box("two")
    now = time.time
    ticket = await one.invite(expires=3600)
    found = tickets.decode(ticket)
    # The newcomer reads another time from the ticket than its own clock would accept.
    shifted = tickets.encode(
        tickets.Ticket(found.inviter, found.network, found.secret,
                      max(0, found.expires_at + hours * 3600), found.addresses)
    )  # fmt: skip
    await soon(two.join(shifted))
    monkeypatch.setattr(time, "time", lambda: now() + 3601)
    with pytest.raises(PeerRefused, match="expired"):
        await soon((await group.box("three")).join(ticket))


async def test_invalid_and_void_tickets_are_refused(group: SiteGroup) -> None:
    one, two = await group.box("one"), await group.box("two")
    ticket = await one.invite()
    with pytest.raises(NotJoined, match="begins with pnv1"):
        await two.join("hello")
    with pytest.raises(NotJoined, match="made the ticket itself"):
        await one.join(ticket)
    found = tickets.decode(ticket)
    forged = tickets.encode(
        tickets.Ticket(found.inviter, found.network, bytes(16), found.expires_at, found.addresses)
    )
    with pytest.raises(PeerRefused, match="no such ticket"):
        await soon(two.join(forged))
    await one.leave()
    with pytest.raises(PeerRefused, match="no such ticket"):
        await soon(two.join(ticket))


async def test_a_box_in_a_network_with_others_must_leave_before_it_joins_elsewhere(
    group: SiteGroup,
) -> None:
    one, two, three = [await group.box(name) for name in ("one", "two", "three")]
    await two.invite()  # founds a network of its own, which it gives up
    await soon(two.join(await one.invite()))
    elsewhere = await three.invite()
    with pytest.raises(NotJoined, match="leave"):
        await two.join(elsewhere)
    await two.leave()
    assert two.network_id is None
    await soon(two.join(elsewhere))
    await wait_until(lambda: whole(three, 2))
    await wait_until(lambda: states(one) == {"two": "unreachable"})


async def test_a_member_that_may_not_invite_gets_the_reason(group: SiteGroup) -> None:
    one, two, three = [await group.box(name) for name in ("one", "two", "three")]
    await two.join(await one.invite())
    with pytest.raises(NotJoined, match="Only an admin"):
        await two.invite(admin=True)
    await soon(three.join(await two.invite()))
    with pytest.raises(NotJoined, match="may not invite"):
        await three.invite()
    with pytest.raises(NotJoined, match="uses"):
        await one.invite(uses=0)


# -- who goes ------------------------------------------------------------------------------------


async def test_a_revoked_box_is_cut_off_everywhere_and_stays_out(group: SiteGroup) -> None:
    one, two, three = await group.joined("one", "two", "three")
    old = await one.invite(uses=5)
    gone = await one.remove("three", "sold")
    assert gone.state == "revoked" and "sold" in gone.why
    await wait_until(lambda: states(two) == {"one": "connected", "three": "revoked"})
    await wait_until(lambda: not three._links.by_peer)
    with pytest.raises(PeeringError):
        await soon(two.open(three.node_id, "echo"))
    with suppress(PeeringError):  # whether it knows or not
        stream = await soon(three.open(two.node_id, "echo"))
        with pytest.raises(LinkLost, match="sold"):
            await soon(stream.receive())
    await three.leave()
    with pytest.raises(PeerRefused, match="sold"):
        await soon(three.join(old))
    await soon(three.join(await one.invite()))  # the founder may bring it back
    await wait_until(lambda: whole(two, 3))


async def test_a_box_that_shuts_down_is_not_reported_gone(group: SiteGroup) -> None:
    one, *_ = await group.joined("one", "two", "three")
    await group.sites[2].close()
    await wait_until(lambda: states(one)["three"] != "connected")
    peer = one.peer("three")
    assert not peer.gone
    assert peer.advert is None or peer.advert.draining


async def test_a_box_that_was_killed_comes_back_by_itself(group: SiteGroup) -> None:
    one, two, three = await group.joined("one", "two", "three")
    await group.sites[0].kill()
    await wait_until(lambda: states(two)["one"] != "connected")
    one = await group.sites[0].open()
    await wait_until(lambda: all(whole(box, 3) for box in (one, two, three)))
    await asked(one, three)
    await asked(three, one)


async def test_a_lost_link_is_told_and_that_there_is_one_again(group: SiteGroup) -> None:
    """What incidents are made of.  A box that shuts down is not lost."""
    one, two, three = await group.joined("one", "two", "three")
    told: list[tuple[str, str]] = []
    one.peer_lost = lambda peer: told.append(("lost", peer))
    one.peer_is_back = lambda peer: told.append(("back", peer))
    await group.sites[2].close()
    await wait_until(lambda: states(one)["three"] != "connected")
    assert told == []
    group.net.silence(two.node_id)
    await wait_until(lambda: ("lost", two.node_id) in told)
    group.net.hear(two.node_id)
    await wait_until(lambda: ("back", two.node_id) in told)
    assert told.index(("lost", two.node_id)) < told.index(("back", two.node_id))
    assert ("lost", three.node_id) not in told


async def test_all_restarted_at_once_find_each_other(group: SiteGroup) -> None:
    await group.joined("one", "two", "three")
    await wait_until(lambda: all(len(site.network._membership.known) == 2 for site in group.sites))
    for site in group.sites:
        await site.close()
    boxes = [await site.open() for site in group.sites]
    await wait_until(lambda: all(whole(box, 3) for box in boxes))


async def test_boxes_that_dial_each_other_at_once_keep_one_link(
    group: SiteGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what has begun over the other one comes to its end."""
    monkeypatch.setattr("pinaivu_box.transport.connections._RETIRE_SECONDS", 0.1)
    one, two = await group.joined("one", "two")
    for _ in range(5):
        for site in group.sites:
            for held in list(site.network._links.by_peer.values()):
                await held.close(Code.SHUTDOWN, "again")
            site.network._links.reset_backoff()
        streams = await asyncio.gather(one.open(two.node_id, "echo"), two.open(one.node_id, "echo"))
        await wait_until(lambda: whole(one, 2) and whole(two, 2))
        assert len(group.sites[0].transport.connections) == 2
        for _ in range(10):
            await asyncio.sleep(0.05)
            for stream in streams:
                await stream.send(b"still there?")
                assert await soon(stream.receive()) == b"still there?"
        for stream in streams:
            await stream.finish()
            assert await soon(stream.receive()) is None
        del stream, streams
        await wait_until(lambda: len(group.sites[0].transport.connections) == 1)
    await asked(one, two)
    await asked(two, one)


class BareLink:
    streams = ()

    def __init__(self, peer: str, *, dialed: bool) -> None:
        self.peer, self.dialed, self.opened_at = peer, dialed, time.monotonic()
        self.over = asyncio.Event()

    async def close(self, code: int, reason: str) -> None:
        self.over.set()

    async def accept(self) -> Stream:
        raise await self.closed()

    async def closed(self) -> LinkLost:
        await self.over.wait()
        return LinkLost("over")


@pytest.mark.parametrize("first_at_one", [True, False])
@pytest.mark.parametrize("first_at_two", [True, False])
async def test_both_sides_keep_the_same_of_two_links(
    first_at_one: bool, first_at_two: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In whatever order the two links come up on either side."""
    monkeypatch.setattr("pinaivu_box.transport.connections._RETIRE_SECONDS", 0.05)
    ids = sorted(one.node_id for one in IDENTITIES[:2])
    kept = []
    for me, peer, first in ((ids[0], ids[1], first_at_one), (ids[1], ids[0], first_at_two)):
        owner = Mock()
        links = LinkManager(Mock(node_id=me), owner, Mock(), TaskSet(), Random(0))
        made: list[Any] = [BareLink(peer, dialed=ours) for ours in (first, not first)]
        for link in made:
            links.add(link)
        held: Any = links.by_peer[peer]
        kept.append(me if held.dialed else peer)
        await asyncio.sleep(0)
        (other,) = [link for link in made if link is not held]
        assert not held.over.is_set()
        await wait_until(other.over.is_set)
        assert owner.link_closed.call_count == owner.link_opened.call_count - 1
    assert kept == [ids[0], ids[0]]


async def test_changed_offers_reach_peers(group: SiteGroup) -> None:
    one, two = await group.joined("one", "two")
    group.sites[1].offers = ()
    two.changed()
    await wait_until(lambda: (found := one.peer("two").advert) is not None and not found.models)


async def test_a_request_that_begins_is_known_to_the_links_before_any_advert(
    group: SiteGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = await group.joined("one", "two")
    model = offer().id
    await wait_until(lambda: model in one.peer("two").loads)
    advert = one.peer("two").advert
    fewer = offer().sequences_free - 1
    assert fewer > 0  # else it is worth an advert
    monkeypatch.setattr(two.gossip, "tick", lambda: None)  # it does not wait for the next round
    group.sites[1].offers = (msgspec.structs.replace(offer(), sequences_free=fewer),)
    two.changed()
    await wait_until(lambda: one.peer("two").loads[model].load.sequences_free == fewer)
    assert one.peer("two").advert == advert
    await soon(one.query_load(model))  # and nobody else is there to tell


# -- bad company ---------------------------------------------------------------------------------


@asynccontextmanager
async def called(group: SiteGroup, number: int, box: Network) -> AsyncIterator[Any]:
    """A link that a bare transport has made to the box."""
    transport = group.transport(number)
    try:
        yield await soon(transport.connect(box.node_id, box.own_addresses(), 5))
    finally:
        await transport.close()


async def reason(link: Any) -> LinkLost:
    lost: LinkLost = await soon(link.closed())
    return lost


@pytest.mark.parametrize(
    "first", [b"garbage", b"\xc1" * 100_000, wire.encode(wire.Hello((1,), "", 0))]
)
async def test_garbage_closes_the_link(group: SiteGroup, first: bytes) -> None:
    one, two = await group.joined("one", "two")
    async with called(group, 7, one) as link:
        await (await link.open()).send(first)
        assert (await reason(link)).code == Code.PROTOCOL
    await asked(one, two)


async def test_a_link_of_a_box_that_is_no_member_is_closed_unserved(
    group: SiteGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(membership_store, "_CERTIFICATE_SECONDS", 0.1)
    one, _ = await group.joined("one", "two")
    served: list[str] = []

    async def serve(peer: str, stream: Stream) -> None:
        served.append(peer)

    one.handlers["echo"] = serve
    async with called(group, 7, one) as link:
        await (await link.open()).send(wire.encode(Open("echo")))
        lost = await reason(link)
    assert not served
    assert lost.code == Code.FORBIDDEN and "no member has certified it" in lost.reason
    monkeypatch.setattr(network, "GOSSIP_START_SECONDS", 0.1)
    async with called(group, 6, one) as link:  # says nothing at all
        assert (await reason(link)).code == Code.FORBIDDEN
    assert states(one) == {"two": "connected"}


async def test_links_of_boxes_that_are_no_members_are_limited(
    group: SiteGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(network, "MAX_UNCERTIFIED_LINKS", 1)
    one, _ = await group.joined("one", "two")
    async with called(group, 7, one), called(group, 6, one) as link:
        assert (await reason(link)).code == Code.BUSY


@pytest.mark.parametrize("opened", [Open("poetry"), Open("echo", 2), Open("gossip", 9)])
async def test_unknown_purposes_and_versions_are_refused_and_the_link_stays(
    group: SiteGroup, opened: Open
) -> None:
    one, two = await group.joined("one", "two")
    link = one._links.by_peer[two.node_id]
    stream = await link.open(opened)
    with pytest.raises(PeerRefused, match="update the older") as refused:
        await soon(stream.receive())
    assert refused.value.code == Code.VERSION
    assert one._links.by_peer[two.node_id] is link
    await asked(one, two)


async def test_inbound_streams_are_limited(
    group: SiteGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = await group.joined("one", "two")
    stream = await soon(one.open(two.node_id, "echo"))
    await stream.send(b"x")
    assert await soon(stream.receive()) == b"x"
    monkeypatch.setattr(streams, "MAX_INBOUND_STREAMS", two._router.count)
    refused = await soon(one.open(two.node_id, "echo"))
    with pytest.raises(PeerRefused, match="too many"):
        await soon(refused.receive())


async def test_a_handler_that_fails_ends_only_its_stream(group: SiteGroup) -> None:
    one, two = await group.joined("one", "two")

    async def fail(peer: str, stream: Stream) -> None:
        raise RuntimeError("a mistake")

    two.handlers["fail"] = fail
    stream = await soon(one.open(two.node_id, "fail"))
    with pytest.raises(LinkLost):
        await soon(stream.receive())
    await asked(one, two)


@pytest.mark.parametrize("limit", ["bytes", "seconds"])
async def test_a_peer_that_does_not_read_is_cut_off(
    group: SiteGroup, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    one, two = await group.joined("one", "two")
    if limit == "bytes":
        monkeypatch.setattr(channel, "MAX_QUEUED_BYTES", 2_000_000)
    else:
        monkeypatch.setattr(channel, "SEND_SECONDS", 0.2)
    # A box with two's key and certificate that takes a link and reads nothing of it.
    await group.sites[1].close()
    transport = MemoryTransport(group.net, two.node_id, None, "at:two")
    link = await soon(transport.accept())
    await soon(link.accept())
    for _ in range(40):
        one.send(two.node_id, bytes(100_000))
    lost = await reason(link)
    assert lost.code == Code.PROTOCOL and "does not read" in lost.reason
    await transport.close()


async def test_a_certificate_that_makes_no_member_is_seen(group: SiteGroup) -> None:
    """An inviter that answers with something else than what its ticket promises."""
    two = await group.box("two")
    bad = group.transport(7)
    other = Roster(f"net_{bytes(36).hex()}")
    ticket, _ = tickets.invite(bad.node_id, other.network, bad.addresses(), now=0, seconds=60)
    joining = asyncio.create_task(two.join(ticket))
    stream = await soon((await soon(bad.accept())).accept())
    await soon(stream.receive())
    await stream.send(wire.encode(joining_protocol.Welcome(())))
    await stream.finish()
    with pytest.raises(PeeringError, match="does not make this box a member"):
        await soon(joining)
    assert two.network_id is None
    await bad.close()


async def test_peers_are_found_by_name_and_near_names_are_suggested(group: SiteGroup) -> None:
    one, two, _ = await group.joined("one", "office", "office")
    with pytest.raises(PeerNotFound, match="2 peers are called"):
        one.peer("office")
    assert one.peer(two.node_id[:20]).node_id == two.node_id
    with pytest.raises(PeerNotFound, match="Did you mean office"):
        one.peer("ofice")


async def test_a_box_is_no_peer_of_its_own_in_the_ledger(group: SiteGroup) -> None:
    """Boxes are named by their hosts, so that two on one host have the same name."""
    _, two, three = await group.joined("one", "office", "office")
    for own, other in ((two, three), (three, two)):
        assert await ledger_views.find(own._database, "office", own.node_id) == other.node_id
        with pytest.raises(PeerNotFound):
            await ledger_views.find(own._database, own.node_id, own.node_id)
