"""Links by a relay: real endpoints of iroh's, and a relay of our own."""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import iroh
import pytest

from pinaivu_box.errors import CliError, Unreachable
from pinaivu_box.transport import iroh_transport
from pinaivu_box.transport.iroh_transport import IrohTransport
from pinaivu_box.transport.link import Link
from tests.support.keys import new_identity
from tests.support.network_namespaces import SLOW, TOKENS, NamespaceBox, streamed
from tests.support.process_box import wait_until
from tests.support.relay_server import Relay
from tests.support.relayed_boxes import URL, RelayOnlyNetwork, checks, refused, relayed_box
from tests.support.waiting import DEADLINE, soon
from tests.support.waiting import wait_until as until

DEAD = "http://127.0.0.1:9/"


@pytest.fixture
async def relay() -> AsyncIterator[Relay]:
    made = Relay()
    await made.serve("127.0.0.1", 0)
    yield made
    await made.close()


Transports = Callable[[str], Any]


@pytest.fixture
async def bound() -> AsyncIterator[Transports]:
    """`await bound(relay)`: a transport of the test's own, on loopback."""
    made: list[IrohTransport] = []

    async def bind(relay: str) -> IrohTransport:
        made.append(await IrohTransport.bind(new_identity(), "127.0.0.1", 0, relay))
        return made[-1]

    yield bind
    for one in made:
        await one.close()


async def said(ours: Link, there: IrohTransport, frame: bytes) -> None:
    """A frame comes to the other side."""
    theirs = await soon(there.accept())
    stream = await ours.open()
    await stream.send(frame)
    assert await soon((await soon(theirs.accept())).receive()) == frame


@pytest.mark.anyio
async def test_a_box_known_by_its_relay_is_found_and_linked_directly(
    relay: Relay, bound: Transports
) -> None:
    ours, theirs = await bound(relay.url), await bound(relay.url)
    link = await ours.connect(theirs.node_id, [relay.url], DEADLINE)
    assert relay.relayed, "the relay was not asked"
    await until(lambda: link.route().direct)
    assert link.route().address in theirs.addresses()
    assert len(relay.clients) == 2  # it knows the keys of both
    await said(link, theirs, b"open sesame")


@pytest.mark.anyio
async def test_addresses_have_the_relay_from_the_start(relay: Relay, bound: Transports) -> None:
    for url in (relay.url, relay.url.removesuffix("/"), DEAD):
        here = await bound(url)
        assert here.addresses()[-1].removesuffix("/") == url.removesuffix("/")
        await asyncio.wait_for(here.wait_for_addresses(), DEADLINE)
    assert not any(one.startswith("http") for one in (await bound("none")).addresses())


@pytest.mark.anyio
async def test_of_several_relays_one_is_waited_for(
    relay: Relay, bound: Transports, monkeypatch: pytest.MonkeyPatch
) -> None:
    several = iroh.RelayMode.custom_from_urls([DEAD, relay.url])
    monkeypatch.setattr(iroh.RelayMode, "default_mode", lambda: several)
    here = await bound("n0")
    await soon(here.wait_for_addresses())
    assert here.addresses()[-1] == relay.url
    nobody = iroh.RelayMode.custom_from_urls([DEAD, "http://127.0.0.1:19/"])
    monkeypatch.setattr(iroh.RelayMode, "default_mode", lambda: nobody)
    monkeypatch.setattr(iroh_transport, "_RELAY_CHOICE_SECONDS", 0.5)
    here = await bound("n0")
    await soon(here.wait_for_addresses())  # but not for ever
    assert not any(one.startswith("http") for one in here.addresses())


@pytest.mark.anyio
async def test_the_first_of_several_relays_is_the_one_to_ask(
    relay: Relay, bound: Transports
) -> None:
    """As addresses are: the most likely first, and those of old at last."""
    ours, theirs = await bound(relay.url), await bound(relay.url)
    assert await ours.connect(theirs.node_id, [relay.url, DEAD], DEADLINE)


@pytest.mark.anyio
async def test_a_box_whose_relay_is_dead_uses_the_relay_of_its_peer(
    relay: Relay, bound: Transports
) -> None:
    ours, theirs = await bound(DEAD), await bound(relay.url)
    assert await ours.connect(theirs.node_id, [relay.url], DEADLINE)
    assert bytes.fromhex(ours.node_id.removeprefix("node_")) in relay.clients


@pytest.mark.anyio
async def test_a_box_without_a_relay_contacts_none(relay: Relay, bound: Transports) -> None:
    ours, theirs = await bound("none"), await bound(relay.url)
    await until(lambda: len(relay.clients) == 1)
    with pytest.raises(Unreachable, match=r"this box uses none: set \[peering\] relay"):
        await ours.connect(theirs.node_id, [relay.url], DEADLINE)
    with pytest.raises(Unreachable, match="that both boxes reach the relay"):
        await ours.connect(theirs.node_id, ["127.0.0.1:9", relay.url], 3)
    link = await ours.connect(theirs.node_id, theirs.addresses(), DEADLINE)
    assert link.route().direct
    assert len(relay.clients) == 1 and not relay.relayed


@pytest.mark.anyio
@pytest.mark.parametrize("url", ["https://", "https://a b", "https://relay.example:99999"])
async def test_an_invalid_relay_url_is_not_reported_as_a_port_in_use(url: str) -> None:
    with pytest.raises(CliError, match=r"relay is 'https://.*which is not a URL"):
        await IrohTransport.bind(new_identity(), "127.0.0.1", 0, url)


# Boxes that have no other way


@pytest.fixture(scope="module")
def valley() -> Iterator[RelayOnlyNetwork]:
    made = RelayOnlyNetwork()
    try:
        made.build()
    except (OSError, subprocess.CalledProcessError) as error:
        made.end()
        pytest.skip(f"namespaces are not permitted here: {error}")
    made.open_relay()
    yield made
    made.end()


@pytest.fixture(scope="module")
def boxes(
    valley: RelayOnlyNetwork, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, NamespaceBox]]:
    """anna asks; ben, beyond the relay, is cheaper than dora, who is next door to anna."""
    homes: Path = tmp_path_factory.mktemp("valley")
    cheap, dear = (f'[pricing]\nper_1k_tokens = "{price}"\n' for price in ("0.1", "1"))
    made = {
        "anna": relayed_box(valley, homes, "anna", more='policy = "cheapest"\n'),
        "ben": relayed_box(
            valley, homes, "ben", "--model", f"fake:1={SLOW}", "--model", "ben:1=fake:1", more=cheap
        ),
        "dora": relayed_box(valley, homes, "dora", "--model", f"fake:1={SLOW}", more=dear),
    }
    for box in made.values():
        box.start()
    yield made
    for box in made.values():
        box.end()
        assert "Traceback" not in box.errors, box.errors


def link(box: NamespaceBox, name: str) -> dict[str, Any]:
    found = box.peers()[name]["link"]
    return found or {"direct": None}


def losses(boxes: dict[str, NamespaceBox]) -> int:
    return sum(box.errors.count(" ended: ") for box in boxes.values())


def served_by_ben(boxes: dict[str, NamespaceBox]) -> None:
    """A whole stream, and a receipt that holds."""
    _, receipt = streamed(boxes["anna"], TOKENS, lambda _: None)
    (proof,) = receipt["proofs"]
    assert boxes["ben"].http("GET", "/v1/admin/peers").json()["own"]["id"] in json.dumps(proof)
    boxes["anna"].command("receipts", "verify", receipt["request_id"])


def test_boxes_join_and_serve_by_a_relay(
    valley: RelayOnlyNetwork, boxes: dict[str, NamespaceBox]
) -> None:
    anna, ben, dora = boxes.values()
    ticket = json.loads(anna.command("peers", "invite", "--uses", "2", "--json"))["ticket"]
    for box in (ben, dora):
        box.command("peers", "join", ticket)
    wait_until(lambda: anna.sees("ben", "dora") and ben.sees("anna"), "they are linked")
    for box, name in ((anna, "ben"), (ben, "anna")):
        found = next(
            one for one in json.loads(box.command("peers", "ls", "--json")) if one["name"] == name
        )
        assert found["link"]["direct"] is False and found["link"]["address"] == f"{URL}/"
        assert f"{URL}/" in found["addresses"]
    assert "relayed" in anna.command("peers", "ls")
    doctor = checks(anna.command("peers", "doctor", "ben", "--json"))
    assert doctor["relay"]["state"] == "ok" and f"{URL} answers" in doctor["relay"]["found"]
    assert "by a relay" in doctor["ben: link"]["found"]


def test_a_relay_sees_who_and_how_much_but_not_what(
    valley: RelayOnlyNetwork, boxes: dict[str, NamespaceBox]
) -> None:
    before = valley.ask("/seen").json()["relayed"]
    served_by_ben(boxes)
    seen = valley.ask("/seen").json()
    assert seen["relayed"] - before > TOKENS
    key = boxes["anna"].http("GET", "/v1/admin/peers").json()["own"]["id"].removeprefix("node_")
    assert key in seen["clients"] and valley.ask(f"/has/{key}").json() is True
    for said in (b"Hello", b"fake:1"):  # the prompt, and what is asked for it
        assert valley.ask(f"/has/{said.hex()}").json() is False


def test_a_box_that_cannot_reach_its_relay_has_its_direct_links(
    boxes: dict[str, NamespaceBox],
) -> None:
    """dora has started without it."""
    assert link(boxes["dora"], "anna")["direct"] and link(boxes["anna"], "dora")["direct"]
    for command in (("peers", "doctor", "--json"), ("doctor", "--json")):
        relay = checks(refused(boxes["dora"], *command))["relay"]
        assert relay["state"] == "failed" and f"{URL} does not answer" in relay["found"]
        assert "[peering] relay" in relay["todo"]


def test_a_slow_relay_that_loses_packets(
    valley: RelayOnlyNetwork, boxes: dict[str, NamespaceBox]
) -> None:
    before = losses(boxes)
    valley.ask("/hold/0.1/0.02")
    for _ in range(3):
        served_by_ben(boxes)
    assert link(boxes["anna"], "ben")["rtt_ms"] > 100
    valley.ask("/hold/0/0")
    assert losses(boxes) == before


def test_a_direct_way_is_taken_while_there_is_one(
    valley: RelayOnlyNetwork, boxes: dict[str, NamespaceBox]
) -> None:
    before = losses(boxes)
    anna, ben = boxes["anna"], boxes["ben"]
    assert link(anna, "ben")["direct"] is False
    valley.plug()
    wait_until(lambda: link(anna, "ben")["direct"] and link(ben, "anna")["direct"], "a direct way")
    assert "direct" in anna.command("peers", "ls", "--json")
    valley.close_relay()
    for _ in range(4):  # longer than a link is borne in silence
        served_by_ben(boxes)
    valley.open_relay()
    wait_until(lambda: len(valley.ask("/seen").json()["clients"]) == 2, "both are back")
    valley.plug("down")
    wait_until(
        lambda: link(anna, "ben")["direct"] is False and link(ben, "anna")["direct"] is False,
        "the relay again",
    )
    served_by_ben(boxes)
    assert losses(boxes) == before


def test_the_relay_dies(valley: RelayOnlyNetwork, boxes: dict[str, NamespaceBox]) -> None:
    anna = boxes["anna"]
    lost: list[str] = []

    def die(server: str) -> None:
        lost.append(server)
        valley.close_relay()

    _, receipt = streamed(anna, 20, die)
    assert lost == ["ben"] and len(receipt["proofs"]) == 2  # dora has gone on
    wait_until(lambda: anna.peers()["ben"]["state"] == "unreachable", "it is missed")
    wait_until(lambda: anna.peers()["ben"]["advert_age"] is None, "its advert is old")
    why = anna.peers()["ben"]["why"]
    assert "did not answer" in why and "that both boxes reach the relay" in why
    answer = anna.chat(model="ben:1", max_tokens=5)
    assert answer.status_code == 503 and answer.json()["error"]["message"].endswith("."), answer
    doctor = checks(refused(anna, "peers", "doctor", "ben", "--json"))
    assert doctor["relay"]["state"] == doctor["ben: relay"]["state"] == "failed"
    assert f"{URL} does not answer" in doctor["relay"]["found"]
    assert "check that it runs" in doctor["relay"]["todo"]
    valley.open_relay()
    wait_until(lambda: anna.sees("ben"), "it is linked again", seconds=180)
    assert link(anna, "ben")["direct"] is False
    served_by_ben(boxes)
