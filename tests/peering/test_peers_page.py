"""What the page of peers shows: prices, places and load of the others, what they see of this box,
and nothing but text of what others say of themselves."""

from __future__ import annotations

import html.parser
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from pinaivu_box.errors import PeeringError
from tests.support.fake_model import FAKE
from tests.support.fake_peer import FakePeer
from tests.support.in_process_box import InProcessBox, in_process_box
from tests.support.keys import known_identity
from tests.support.memory_transport import MemoryNetwork, MemoryTransport
from tests.support.records import offer
from tests.support.waiting import soon, wait_until

pytestmark = pytest.mark.anyio
# 64 characters at most: markup, the end of an attribute, and a mark that turns text around.
NAMES = (
    "<img src=x onerror=alert(1)>'\"><script>alert(2)<!--\u202egnp",
    "javascript:alert(3)",
    "\u2067\u202d" + "W" * 62,
)
MODEL = "<b onclick=alert(4)>\u202e" + "m" * 100


@pytest.fixture
def net() -> MemoryNetwork:
    return MemoryNetwork()


@pytest.fixture
async def anna(net: MemoryNetwork, tmp_path: Path) -> AsyncIterator[InProcessBox]:
    async with in_process_box(
        net, tmp_path / "anna", (FAKE,), pricing__per_1k_tokens="0.25"
    ) as box:
        yield box


class Elements(html.parser.HTMLParser):
    """The elements of a page with their attributes, and its text within each `<bdi>`."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.isolated: list[str] = []
        self._inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag == "bdi"

    def handle_endtag(self, tag: str) -> None:
        self._inside = False

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.isolated.append(data)


def peer(net: MemoryNetwork, home: Path, name: str) -> FakePeer:
    """A box that calls itself so when it joins."""
    identity = known_identity(41)
    made = FakePeer(identity, MemoryTransport(net, identity.node_id), home, "peer")
    made.network.name = name
    return made


async def is_seen(box: InProcessBox, name: str) -> None:
    await wait_until(lambda: any(
        one.name == name and one.state == "connected" and one.advert and one.advert.models
        for one in box.network.peers()
    ))  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
async def test_what_a_peer_says_of_itself_is_text_on_every_page(
    anna: InProcessBox, net: MemoryNetwork, tmp_path: Path, name: str
) -> None:
    async with peer(net, tmp_path, name) as hostile:
        hostile.models = (offer(MODEL),)
        await soon(hostile.network.join(await anna.network.invite()))
        hostile.network.changed()
        await is_seen(anna, name)
        for path in ("/admin/peers", "/explorer/network"):
            page = Elements(await anna.page(path))
            assert name in page.isolated, path
            for tag, attributes in page.tags:
                assert tag not in ("b", "iframe", "style"), (path, tag)
                assert tag != "script" or str(attributes.get("src")).startswith("/static/")
                assert tag != "img" or str(attributes.get("src")).startswith("/static/")
                assert not any(one.startswith("on") for one in attributes), (path, attributes)
                assert not str(attributes.get("href")).startswith("javascript"), attributes
            if path == "/admin/peers":
                assert MODEL in page.isolated


async def test_a_name_of_a_thousand_characters_is_no_name(
    anna: InProcessBox, net: MemoryNetwork, tmp_path: Path
) -> None:
    async with peer(net, tmp_path, "W" * 1000) as hostile:
        ticket = await anna.network.invite()
        with pytest.raises((PeeringError, ValueError)):
            await soon(hostile.network.join(ticket))
        assert "W" * 65 not in await anna.page("/admin/peers")


async def test_the_page_shows_prices_places_and_load_of_both_sides(
    anna: InProcessBox, net: MemoryNetwork, tmp_path: Path
) -> None:
    async with peer(net, tmp_path, "ben") as ben:
        ben.models = (
            offer("big:1", sequences=9, sequences_free=2, queue=5, prices=("3", "1", "4")),
            offer("small:1", sequences=4, sequences_free=4, prices=("0", "0", "0")),
        )
        await soon(ben.network.join(await anna.network.invite()))
        ben.network.changed()
        await is_seen(anna, "ben")
        await wait_until(lambda: [m for m in anna.box.offers.describe().models if m.id == FAKE])
        text = " ".join((await anna.page("/admin/peers")).split())
        theirs, _, ours = text.partition("What the others see of this box")
        assert ">6 <small>of 13</small>" in theirs and "Waiting there</dt><dd>5" in theirs
        for cell in ("2 of 9", "3 in, 1 cached, 4 out <bdi>credits</bdi>", ">free<"):
            assert cell in theirs, cell
        own = (await anna.http("GET", "/v1/admin/peers")).json()["own"]
        model = next(each for each in own["models"] if each["id"] == FAKE)
        assert model["price"]["completion"] == "0.25"
        assert own["currency"] == "credits" and own["draining"] is False
        assert f"{model['sequences_free']} of {model['sequences']}" in ours
        assert "0.25 in, 0.25 out" in ours and "it is not known here" in ours
