"""Real boxes of this process, linked in memory, and bad company: members that say anything."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from pinaivu_box.models.catalog import digest_of
from pinaivu_box.receipts.verify import verify_receipt
from tests.support.fake_model import DEAR, FAKE, fake_text
from tests.support.fake_peer import FakePeer, ViolatingServer, Violation
from tests.support.in_process_box import InProcessBox, count_offers, in_process_box
from tests.support.keys import known_identity
from tests.support.memory_transport import MemoryNetwork, MemoryTransport
from tests.support.waiting import soon, wait_until

# -- a serving box -------------------------------------------------------------------------------


# -- three of them -------------------------------------------------------------------------------


class ThreeBoxes:
    """`anna` has no model and takes the cheapest: `carl`, who does what a test wants, or else
    `ben`, who is honest."""

    def __init__(
        self, net: MemoryNetwork, anna: InProcessBox, ben: InProcessBox, carl: FakePeer
    ) -> None:
        self.net, self.anna, self.ben, self.carl = net, anna, ben, carl
        self.network_id = anna.network.network_id or ""

    def lie(self, lie: Violation) -> ViolatingServer:
        self.liar = ViolatingServer(self.carl.identity, lie)
        self.carl.handler = self.liar.handle
        return self.liar

    async def entries(self) -> list[Any]:
        """Of the liar, in anna's ledger."""
        return await self.anna.entries(self.carl)

    async def key(self, *peers: str) -> str:
        """One whose requests go nowhere else."""
        made = await self.anna.http(
            "POST", "/v1/admin/keys", json={"name": "some", "policy": {"peers": peers}}
        )
        return str(made.json()["key"])

    async def why(self) -> str:
        """What `peers ls --why` says of the liar."""
        shown = (await self.anna.http("GET", "/v1/admin/peers/carl")).json()
        return str(shown["reputation"]["why"])

    @contextlib.asynccontextmanager
    async def lied_to(self, log: pytest.LogCaptureFixture) -> AsyncIterator[None]:
        """Anna thinks well of carl, and complains of nothing but him."""
        log.set_level(logging.INFO)
        self.anna.forget()
        await wait_until(lambda: self.anna.network.peer("carl").state == "connected")
        yield
        self.quiet(log)

    @contextlib.asynccontextmanager
    async def asked_much(self, log: pytest.LogCaptureFixture) -> AsyncIterator[None]:
        """Whatever is done to ben: the same engine goes on serving, and nothing is left over."""
        log.set_level(logging.INFO)
        (engine,) = self.ben.box.placement.engines
        yield
        await wait_until(lambda: not self.running)
        answer = await self.ben.chat()
        assert answer.status_code == 200, answer.text
        assert [one.pid for one in self.ben.box.placement.engines] == [engine.pid]
        self.quiet(log)

    @property
    def running(self) -> int:
        """Of what peers have asked ben."""
        return 0 if self.ben.pool.serving.admission.idle.is_set() else 1

    def quiet(self, log: pytest.LogCaptureFixture) -> None:
        """No box has complained of itself."""
        assert [one for one in log.records if one.exc_info or one.levelno >= logging.ERROR] == []


@contextlib.asynccontextmanager
async def three_boxes(home: Path) -> AsyncIterator[ThreeBoxes]:
    net, identity = MemoryNetwork(), known_identity(66)
    cheapest: dict[str, Any] = {"peering__price_weight": 1.0, "peering__time_weight": 0.0,
                "peering__reputation_weight": 0.0}  # fmt: skip
    dear: dict[str, Any] = {"pricing__per_1k_tokens": DEAR}
    transport = MemoryTransport(net, identity.node_id, None, "at:carl")
    async with (
        in_process_box(net, home / "anna", **cheapest) as anna,
        in_process_box(net, home / "ben", (FAKE,), **dear) as ben,
        FakePeer(identity, transport, home, "carl") as carl,
    ):
        for newcomer in (ben.network, carl.network):
            await soon(newcomer.join(await anna.network.invite()))
        (model,) = [one for one in ben.box.catalog.models if one.id == FAKE]
        carl.offers(digest_of(model))
        await wait_until(lambda: count_offers(anna) == 2)
        await wait_until(lambda: [one.state for one in carl.network.peers()] == ["connected"] * 2)
        await ben.chat(max_tokens=1)  # its engine runs
        yield ThreeBoxes(net, anna, ben, carl)


async def checked(world: ThreeBoxes, answer: dict[str, Any]) -> dict[str, Any]:
    """The receipt of an answer, whose every check holds."""
    found = await world.anna.http("GET", f"/v1/receipts/{answer['request_id']}")
    assert [one for one in verify_receipt(found.content) if not one.ok] == []
    receipt: dict[str, Any] = msgspec.json.decode(found.json()["signed_receipt"])
    return receipt


async def right(world: ThreeBoxes, answer: httpx.Response) -> None:
    """The whole answer, by ben."""
    told = answer.json()
    assert answer.status_code == 200, told
    assert told["choices"][0]["message"]["content"] == fake_text(told["usage"]["prompt_tokens"], 20)
    assert (await checked(world, told))["node_id"] == world.ben.node_id
