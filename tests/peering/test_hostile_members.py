"""A member, or one that was put out, that says in the gossip what is not so."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from pinaivu_box.errors import PeeringError
from pinaivu_box.gossip import protocol
from pinaivu_box.gossip.adverts import Advert, GoneReport
from pinaivu_box.gossip.frames import GivenRecord, GiveRecords, encode
from pinaivu_box.identity import Identity
from pinaivu_box.membership import joining
from pinaivu_box.membership.records import (
    Certificate,
    Record,
    Revocation,
    key_of,
    network_key,
    seal,
)
from pinaivu_box.network.network import Network
from pinaivu_box.transport import wire
from pinaivu_box.transport.link import Link, LinkOptions, Stream
from pinaivu_box.transport.wire import Code, Open
from tests.support.fake_model import CHEAP, FAKE
from tests.support.fake_peer import FakePeer
from tests.support.in_process_box import count_offers
from tests.support.keys import known_identity
from tests.support.memory_transport import MemoryTransport
from tests.support.records import offer
from tests.support.three_boxes import ThreeBoxes, three_boxes
from tests.support.waiting import soon, wait_until

pytestmark = pytest.mark.anyio
DAY = 86400.0
ESCAPE = "\x1b[2J"


@pytest.fixture(scope="module")
async def made(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[ThreeBoxes]:
    async with three_boxes(tmp_path_factory.mktemp("company")) as found:
        yield found


@pytest.fixture
async def world(made: ThreeBoxes, caplog: pytest.LogCaptureFixture) -> AsyncIterator[ThreeBoxes]:
    caplog.set_level(logging.INFO)
    made.carl.handler = leave
    yield made
    for box in (made.anna, made.ben):
        assert box.network.peer("carl").state == "connected"
        assert (await box.chat(secret=None)).status_code == 200
    made.quiet(caplog)


async def leave(peer: str, stream: Stream) -> None:
    stream.abandon()


@asynccontextmanager
async def newcomer(
    world: ThreeBoxes, home: Path, name: str, number: int, clock: Any = time.time
) -> AsyncIterator[FakePeer]:
    """A member, for one test."""
    identity = known_identity(number)
    transport = MemoryTransport(world.net, identity.node_id, LinkOptions(clock=clock), f"at:{name}")
    async with FakePeer(identity, transport, home, name) as member:
        await soon(member.network.join(await world.anna.network.invite()))
        await wait_until(lambda: world.anna.network.peer(name).state == "connected")
        yield member


def advert(world: ThreeBoxes, of: str, by: Identity, **changes: Any) -> Record:
    serial = round(time.time() * 1000) + 1_000_000
    made = Advert(
        network_key(world.network_id), key_of(of), serial, serial, 15, "1.0", (), "credits",
        (offer(FAKE, prices=CHEAP),),
    )  # fmt: skip
    return seal(by, "advert", replace(made, **changes))


def tell(member: FakePeer, to: str, *records: Record) -> None:
    member.network.send(to, encode(GiveRecords(tuple(GivenRecord(one) for one in records))))


async def end_of(member: FakePeer, to: str) -> PeeringError:
    lost: PeeringError = await soon(member.network._links.by_peer[to].closed())
    return lost


# -- who was put out -----------------------------------------------------------------------------


async def test_the_certificate_of_a_removed_box_is_not_accepted(
    world: ThreeBoxes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "_CERTIFICATE_SECONDS", 0.1)
    async with newcomer(world, tmp_path, "dora", 81) as dora:
        assert dora.network.roster is not None
        old = dora.network.roster.proof(dora.identity.node_id)
        await world.anna.network.remove("dora", "sold")
        await wait_until(lambda: not dora.network._links.by_peer)
    # Another member passes it on, as if it had missed that.
    for box in (world.anna, world.ben):
        tell(world.carl, box.node_id, *old)
    bare = MemoryTransport(world.net, known_identity(81).node_id, None, "at:bare")
    for box in (world.anna, world.ben):
        link: Link = await soon(bare.connect(box.node_id, box.network.own_addresses(), 5))
        stream = await soon(link.open())
        await stream.send(wire.encode(Open("gossip")))
        await stream.send(encode(GiveRecords(tuple(GivenRecord(one) for one in old))))
        lost = await soon(link.closed())
        assert lost.code == Code.REVOKED and "sold" in lost.reason, lost
        assert box.network.peer("dora").state == "revoked"
    await bare.close()


# -- names ---------------------------------------------------------------------------------------


async def test_a_name_that_is_no_model_id_is_in_no_list_and_hinders_no_other(
    world: ThreeBoxes, tmp_path: Path
) -> None:
    """An older box may say such: it stays a member, and what it has beside that is offered."""
    odd = ("a b", "\u202egpj", "x" * 100 + " ", "größe", "a:b:c")
    async with newcomer(world, tmp_path, "emma", 84) as emma:
        emma.models = tuple(offer(name) for name in (*odd, "emmas:1"))
        emma.network.changed()

        async def listed() -> list[str]:
            answer = await world.anna.http("GET", "/v1/models")
            return [one["id"] for one in answer.json()["data"]]

        await wait_until(lambda: "emmas:1" in _offered(world.anna, "emma"))
        assert set(odd) < set(_offered(world.anna, "emma"))
        assert "emmas:1" in await listed() and not set(odd) & set(await listed())
        assert world.anna.network.peer("emma").state == "connected"
        asked = await world.anna.chat(model=odd[0])
        assert asked.status_code == 422
    await world.anna.network.remove("emma")


def _offered(box: Any, name: str) -> list[str]:
    advert = box.network.peer(name).advert
    return [] if advert is None else [one.id for one in advert.models]


# -- clocks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("ahead", [-DAY, DAY])
async def test_a_clock_that_is_off_by_a_day_is_shown_and_decides_nothing(
    world: ThreeBoxes, tmp_path: Path, ahead: float
) -> None:
    name = "late" if ahead < 0 else "early"
    number = 82 if ahead < 0 else 83
    async with newcomer(world, tmp_path, name, number, lambda: time.time() + ahead) as member:
        await wait_until(
            lambda: (
                sees(world.ben.network, member.identity.node_id)
                and sees(member.network, world.ben.node_id)
                and sees(member.network, world.anna.node_id)
            )
        )
        for box in (world.anna, world.ben):
            for way in (box.network.peer(name).clock_ahead, -_seen(member, box)):
                assert way is not None and abs(way - ahead) < 3600
        at = round((time.time() + ahead) * 1000)
        tell(member, world.anna.node_id,
             advert(world, member.identity.node_id, member.identity, at=at))  # fmt: skip
        await wait_until(lambda: world.anna.network.peer(name).advert is not None)
        await wait_until(lambda: count_offers(world.anna) == 3)
        shown = await world.anna.http("GET", f"/v1/admin/peers/{name}")
        assert abs(shown.json()["clock_ahead"] - ahead) < 3600
    await world.anna.network.remove(name)


def sees(network: Network, node_id: str) -> bool:
    return any(one.node_id == node_id and one.state == "connected" for one in network.peers())


def _seen(member: FakePeer, box: Any) -> float:
    found = member.network.peer(box.node_id).clock_ahead
    assert found is not None
    return float(found)


# -- what is not so ------------------------------------------------------------------------------


def forged(world: ThreeBoxes, by: Identity) -> dict[str, Record]:
    """What no honest member passes on."""
    here, me, ben = network_key(world.network_id), key_of(by.node_id), key_of(world.ben.node_id)
    elsewhere = network_key("net_" + "00" * 36)
    inviter = key_of(world.anna.node_id)
    certificate = Certificate(here, me, inviter, "x", 0, 9, True)
    good = advert(world, by.node_id, by)
    return {
        "another's advert": advert(world, world.ben.node_id, by),
        "an advert of elsewhere": advert(world, by.node_id, by, network=elsewhere),
        "a certificate that anna never signed": seal(by, "member", certificate),
        "a certificate of elsewhere": seal(by, "member", replace(certificate, network=elsewhere)),
        "anna's revocation": seal(by, "revocation", Revocation(here, ben, inviter, 0)),
        "another's report": seal(by, "gone", GoneReport(here, ben, 1, inviter)),
        "half an advert": Record("advert", good.body[:-5], good.signature),
        "an advert for a certificate": Record("member", good.body, good.signature),
        "escapes for a version": advert(world, by.node_id, by, version=ESCAPE),
        "escapes for a currency": advert(world, by.node_id, by, currency=ESCAPE),
        "escapes for a model": advert(world, by.node_id, by, models=(offer(ESCAPE),)),
        "prices that are none": advert(
            world, by.node_id, by, models=(offer(FAKE, prices=("x", "0", "0")),)
        ),
        "an endless life": advert(world, by.node_id, by, life=10**6),
        "a version with a line break": advert(world, by.node_id, by, version="1.0\n"),
        "a currency with a line break": advert(world, by.node_id, by, currency="credits\n"),
        "a model with a line break": advert(world, by.node_id, by, models=(offer(f"{FAKE}\n"),)),
        "a price in other digits": advert(
            world, by.node_id, by, models=(offer(FAKE, prices=("\u0661", "0", "0")),)
        ),
        "an address with a line break": advert(world, by.node_id, by, addresses=("a:1\n",)),
        "a name with a line break": seal(
            by, "member", replace(certificate, inviter=me, name="x\n")
        ),
        "a reason with a line break": seal(
            by, "revocation", Revocation(here, ben, me, 0, "sold\n")
        ),
    }


@pytest.mark.parametrize("number", range(20))
async def test_a_peer_that_relays_forged_records_is_cut_off(
    world: ThreeBoxes, tmp_path: Path, number: int
) -> None:
    async with newcomer(world, tmp_path, f"m{number}", 100 + number) as member:
        before = world.anna.network.peer("ben")
        said = list(forged(world, member.identity).items())
        assert len(said) == 20
        tell(member, world.anna.node_id, said[number][1])
        lost: Any = await end_of(member, world.anna.node_id)
        assert lost.code == Code.PROTOCOL and "it sent" in lost.reason, (said[number][0], lost)
        assert lost.reason.isprintable()
        after = world.anna.network.peer("ben")
        assert (after.state, after.admin) == ("connected", False)
        assert before.advert is not None and after.advert is not None  # it may be a newer one
        assert [(one.id, one.digest, one.prices) for one in after.advert.models] == [
            (one.id, one.digest, one.prices) for one in before.advert.models
        ]
    await world.anna.network.remove(f"m{number}")


async def test_a_revocation_without_the_right_revokes_no_box(
    world: ThreeBoxes, tmp_path: Path
) -> None:
    async with newcomer(world, tmp_path, "judge", 120) as judge:
        victim = Revocation(
            network_key(world.network_id), key_of(world.ben.node_id),
            key_of(judge.identity.node_id), 0, "because",
        )  # fmt: skip
        own = Certificate(
            network_key(world.network_id), key_of(known_identity(121).node_id),
            key_of(judge.identity.node_id), "friend", 0, 1, True,
        )  # fmt: skip
        tell(judge, world.anna.node_id, seal(judge.identity, "revocation", victim),
             seal(judge.identity, "member", own))  # fmt: skip
        tell(judge, world.anna.node_id, advert(world, judge.identity.node_id, judge.identity))
        await wait_until(lambda: world.anna.network.peer("judge").advert is not None)
        assert world.anna.network.peer("ben").state == "connected"
        assert not world.anna.network.peer("judge").admin
        friend = [one for one in world.anna.network.peers() if one.name == "friend"]
        assert not any(one.admin for one in friend)
    await world.anna.network.remove("judge")


async def test_a_flooding_peer_is_cut_off(
    world: ThreeBoxes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "_LINK_BURST_BYTES", 500_000.0)
    monkeypatch.setattr(protocol, "_LINK_BYTES_PER_SECOND", 0.0)  # however slow this machine is
    async with newcomer(world, tmp_path, "loud", 122) as loud:
        stale = [advert(world, loud.identity.node_id, loud.identity, serial=n) for n in range(50)]
        held = loud.network._links.by_peer[world.anna.node_id]
        frame = encode(GiveRecords(tuple(map(GivenRecord, stale * 8))))
        for _ in range(20):
            loud.network.send(world.anna.node_id, frame)
            await asyncio.sleep(0)
        lost: Any = await soon(held.closed())
        assert lost.code == Code.PROTOCOL and "too much" in lost.reason
    await world.anna.network.remove("loud")


@pytest.mark.parametrize(
    "hello",
    [
        wire.Hello((1,), ESCAPE, 0.0), wire.Hello((1,), "1.0", float("nan")),
        wire.Hello((1,), "1.0", -1.0), wire.Hello(tuple(range(17)), "1.0", 0.0),
    ],
    ids=["escapes", "no time", "before all time", "versions"],
)  # fmt: skip
async def test_a_greeting_that_is_none(world: ThreeBoxes, hello: wire.Hello) -> None:
    bare = MemoryTransport(world.net, known_identity(123).node_id, None, "at:bare")
    connection = await bare.dial(world.anna.node_id, world.anna.network.own_addresses())
    pipe = await connection.open()
    frame = wire.encode(hello)
    await pipe.write(wire.LENGTH.pack(len(frame)) + frame + wire.END_FRAME)
    lost = await soon(connection.closed())
    assert lost.code == Code.PROTOCOL and "not a Hello" in lost.reason
    await bare.close()


async def test_a_silent_newcomer_is_given_up(
    world: ThreeBoxes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joining, "_JOIN_SECONDS", 0.2)
    async with newcomer(world, tmp_path, "mute", 124) as mute:
        stream = await mute.network._links.by_peer[world.anna.node_id].open()
        await stream.send(wire.encode(Open("join")))
        with pytest.raises(PeeringError):
            await soon(stream.receive())
    await world.anna.network.remove("mute")
