"""Real boxes of this process, linked in memory, and bad company: members that say anything."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import httpx
import msgspec
import pytest

from pinaivu_box import config
from pinaivu_box.box import Box, open_box
from pinaivu_box.config import PeeringConfig, SamplingConfig
from pinaivu_box.engine.chat_template import CHATML, ChatTemplate
from pinaivu_box.engine.fake_runner import SENTENCE
from pinaivu_box.engine.messages import SamplingDefaults
from pinaivu_box.gateway.backend import Job, Output, Prompt, Started
from pinaivu_box.gateway.local import resolve
from pinaivu_box.gateway.metering import LegRecord, prove
from pinaivu_box.gossip.adverts import Facts
from pinaivu_box.identity import Identity
from pinaivu_box.legs import wire as leg_wire
from pinaivu_box.legs.codec import to_job
from pinaivu_box.models.catalog import digest_of, remote
from pinaivu_box.network.network import Network
from pinaivu_box.policy import SCOPES, Policy
from pinaivu_box.receipts.commitment import RunningCommitment, new_nonce
from pinaivu_box.receipts.receipt import (
    MARK_DOMAIN,
    VERSION,
    EngineInfo,
    Price,
    Proof,
    mark_text,
    sign_proof,
)
from pinaivu_box.receipts.verify import verify_receipt
from pinaivu_box.server.app import create_app
from pinaivu_box.store import accounts, keys
from pinaivu_box.store.audit import Actor
from pinaivu_box.store.database import Database
from pinaivu_box.transport.iroh_transport import IrohTransport
from pinaivu_box.transport.transport import Stream, Transport
from tests.peering.people import offer, person
from tests.peering.worlds import soon, wait_until
from tests.support.memory_transport import MemoryNetwork, MemoryTransport

FAKE = "fake:1"
CHEAP, DEAR = ("0.001", "0.001", "0.001"), "10"
Handler = Callable[[str, Stream], Awaitable[None]]


def said(prompt: int, count: int, after: int = 0) -> str:
    """What the fake model makes of a prompt of so many tokens, from the token `after` on."""
    text = SENTENCE.decode()
    return "".join(text[(prompt - 1 + at) % len(text)] for at in range(after, after + count))


class House:
    """A whole box, with its API."""

    def __init__(self, box: Box, secret: str) -> None:
        self.box, self.secret = box, secret
        assert box.pool is not None and box.network is not None
        self.pool, self.network, self.node_id = box.pool, box.network, box.identity.node_id
        self._app = httpx.ASGITransport(create_app(box))

    async def http(self, method: str, path: str, **more: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {more.pop('secret', self.secret)}"}
        async with httpx.AsyncClient(transport=self._app, base_url="http://box", timeout=60) as one:
            return await one.request(method, path, headers=headers, **more)

    async def chat(
        self, text: str = "Hello", secret: str | None = None, **more: Any
    ) -> httpx.Response:
        body = {"model": FAKE, "messages": [{"role": "user", "content": text}], "max_tokens": 20}
        return await self.http(
            "POST",
            "/v1/chat/completions",
            json={**body, **more},
            secret=secret or self.secret,
        )

    async def entries(self, peer: Member) -> list[Any]:
        """Of its ledger."""
        return await self.box.database.read(
            "SELECT * FROM ledger_entries WHERE peer = ?", (peer.identity.node_id,)
        )

    def forget(self) -> None:
        """What it thinks of others, as if nothing had happened."""
        dispatch: Any = self.pool.dispatch
        self.pool.reputation.opinions.clear()
        for kept in (dispatch._resting._failures, dispatch._resting._until,
                     dispatch._resting._probing, self.pool.candidates._conversations,
                     self.pool.candidates._busy):  # fmt: skip
            kept.clear()


@contextlib.asynccontextmanager
async def house(
    net: MemoryNetwork, home: Path, models: tuple[str, ...] = (), **settings: Any
) -> AsyncIterator[House]:
    """`settings` as "section__name"."""

    async def bind(identity: Identity, *_: object) -> Transport:
        return MemoryTransport(net, identity.node_id, None, f"at:{home.name}")

    overrides = {("peering", "enabled"): True, ("peering", "name"): home.name}
    overrides |= {tuple(name.split("__")): value for name, value in settings.items()}  # type: ignore[misc]
    extra = [config.ModelConfig(name=name, path="fake:1") for name in models]
    load = partial(config.load, None, environ={}, overrides=overrides, extra_models=extra)
    with patch.object(IrohTransport, "bind", bind):
        async with open_box(load, home) as box:
            _, secret = await keys.create(
                box.database, account=await accounts.find(box.database, accounts.OWNER), name="one",
                policy=Policy(scopes=SCOPES), expires_at=None, by=Actor("test", "local"),
            )  # fmt: skip
            yield House(box, secret)


class Member:
    """Belongs to the network like any other; what it offers and does is the test's."""

    def __init__(self, identity: Identity, transport: Transport, home: Path, name: str) -> None:
        self.identity, self.name = identity, name
        self.models: tuple[Any, ...] = ()
        self.handler: Handler | None = None
        self._database = Database(home / f"{name}.db")
        self.network = Network(
            identity, transport, self._database, PeeringConfig(name=name), self.describe
        )
        self.network.handlers[leg_wire.PURPOSE] = self._handle

    def describe(self) -> Facts:
        return Facts("1.0", (), "credits", self.models)

    async def _handle(self, peer: str, stream: Stream) -> None:
        if self.handler is not None:
            await self.handler(peer, stream)

    async def __aenter__(self) -> Member:
        await self._database.open()
        await self.network.start()
        self._running = asyncio.create_task(self.network.run())
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.network.close()
        self._running.cancel()
        await asyncio.wait([self._running])
        await self._database.close()

    def offers(self, digest: str, **more: Any) -> None:
        values = {"prices": CHEAP, "digest": bytes.fromhex(digest), "kv_free": 2**20, **more}
        self.models = (offer(FAKE, **values),)
        self.network.changed()


# -- a serving box -------------------------------------------------------------------------------


Message = leg_wire.ToCoordinator


def same(message: Any) -> Any:
    return message


@dataclass(frozen=True)
class Lie:
    """What is changed on the way, and nothing else; a message that becomes None is not sent, of a
    list all are.  `proof` is changed before it is signed.  With `version` 1 it speaks as boxes did
    before there was a 2: that is no lie."""

    began: Callable[[leg_wire.LegStarted], Any] = same
    read: Callable[[leg_wire.PromptRead], Any] = same
    first: Callable[[leg_wire.Outputs], Any] = same  # the first of two Outputs
    last: Callable[[leg_wire.Outputs], Any] = same
    proof: Callable[[Proof], Proof] = same
    proved: Callable[[leg_wire.LegProof], Any] = same
    sampling: dict[str, Any] = field(default_factory=dict)
    mark: Callable[[str], str] = same
    tokens: Callable[[list[int]], list[int]] = same
    text: Callable[[str], str] = same
    count: int | None = None  # of tokens, instead of as many as were asked for
    reason: str = "length"
    version: int = VERSION


class Liar:
    """Serves as the fake model would, but for a `lie`.  `heard`: what the coordinator said after
    it had begun."""

    def __init__(self, identity: Identity, lie: Lie, price: tuple[str, str, str] = CHEAP) -> None:
        self.identity, self.lie, self.price = identity, lie, price
        self.heard: list[leg_wire.ToServing] = []
        self.asked = 0

    async def handle(self, peer: str, stream: Stream) -> None:
        ask = await leg_wire.receive(stream, leg_wire.to_serving)
        if isinstance(ask, leg_wire.Count):
            await leg_wire.send(stream, leg_wire.Tokens(prompt_of(job_of(ask)), context=8192))
            await stream.finish()
            return
        assert isinstance(ask, leg_wire.LegRequest)
        self.asked += 1
        for message in self.conversation(ask):
            await leg_wire.send(stream, message)
        while (heard := await leg_wire.receive(stream, leg_wire.to_serving)) is not None:
            self.heard.append(heard)
        await stream.finish()

    def conversation(self, ask: leg_wire.LegRequest) -> list[Message]:
        lie, job = self.lie, job_of(ask)
        prompt = prompt_of(job)
        count = lie.count or (job.max_tokens or 20) - len(ask.made)
        text = said(len(prompt), count, len(ask.made))
        tokens = lie.tokens(list(text.encode()))
        text = lie.text(text)
        nonce = new_nonce()
        begun = started(job, ask.digest, lie.sampling, nonce, self.identity.node_id, lie.version)
        account = LegRecord(begun)
        account.take(Prompt(prompt))
        half = max(1, len(tokens) // 2)
        outputs = [
            leg_wire.Out(text[:half], tokens[:half], None, 0.5, 0),
            leg_wire.Out(text[half:], tokens[half:], lie.reason),
        ]
        running, marks, made = RunningCommitment(nonce, lie.version), [], 0
        for one in outputs:
            account.take(Output(one.text, one.tokens, one.finish_reason, one.queue_ms))
            running.add(one.text, one.tokens)
            made += len(one.tokens)
            marked = mark_text(job.request_id, job.choice, job.leg, made, running.commitment)
            marks.append(self.identity.sign(MARK_DOMAIN, marked).hex())
        proof, _ = prove(job, job.leg, account, Price("credits", *self.price))
        signed = sign_proof(self.identity, lie.proof(proof))
        said_ = [
            lie.began(began(account.started)),
            lie.read(leg_wire.PromptRead(prompt)),
            lie.first(leg_wire.Outputs([outputs[0]], lie.mark(marks[0]))),
            lie.proved(leg_wire.LegProof(signed.signed, signed.signature)),
            lie.last(leg_wire.Outputs([outputs[1]], lie.mark(marks[1]))),
        ]
        return [m for one in said_ for m in (one if isinstance(one, list) else [one]) if m]


def job_of(ask: leg_wire.LegRequest | leg_wire.Count) -> Job:
    return to_job(ask.task, remote(FAKE, ask.digest), "peer")


def prompt_of(job: Job) -> list[int]:
    if job.read is not None:
        return job.read
    return list(ChatTemplate(CHATML, bos="", eos="").render(job.messages).encode())


def started(
    job: Job, digest: str, changes: dict[str, Any], nonce: str, node_id: str, version: int
) -> Started:
    sampling = job.settled or resolve(job, SamplingConfig(), SamplingDefaults())
    sampling = msgspec.structs.replace(sampling, **changes)
    info = EngineInfo("fake", "none")
    return Started(node_id, digest, info, sampling, "tags", False, nonce=nonce, proof=version)


def began(one: Started) -> leg_wire.LegStarted:
    assert one.nonce is not None
    return leg_wire.LegStarted(one.model_digest, one.engine.build, one.engine.device, one.sampling,
                      one.tool_style, one.thinks, one.nonce, one.proof)  # fmt: skip


# -- three of them -------------------------------------------------------------------------------


class World:
    """`anna` has no model and takes the cheapest: `carl`, who does what a test wants, or else
    `ben`, who is honest."""

    def __init__(self, net: MemoryNetwork, anna: House, ben: House, carl: Member) -> None:
        self.net, self.anna, self.ben, self.carl = net, anna, ben, carl
        self.network_id = anna.network.network_id or ""

    def lie(self, lie: Lie) -> Liar:
        self.liar = Liar(self.carl.identity, lie)
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
async def company(home: Path) -> AsyncIterator[World]:
    net, identity = MemoryNetwork(), person(66)
    cheapest = {"peering__price_weight": 1.0, "peering__time_weight": 0.0,
                "peering__reputation_weight": 0.0}  # fmt: skip
    dear = {"pricing__per_1k_tokens": DEAR}
    transport = MemoryTransport(net, identity.node_id, None, "at:carl")
    async with (
        house(net, home / "anna", **cheapest) as anna,
        house(net, home / "ben", (FAKE,), **dear) as ben,
        Member(identity, transport, home, "carl") as carl,
    ):
        for newcomer in (ben.network, carl.network):
            await soon(newcomer.join(await anna.network.invite()))
        (model,) = [one for one in ben.box.catalog.models if one.id == FAKE]
        carl.offers(digest_of(model))
        await wait_until(lambda: offering(anna) == 2)
        await wait_until(lambda: [one.state for one in carl.network.peers()] == ["connected"] * 2)
        await ben.chat(max_tokens=1)  # its engine runs
        yield World(net, anna, ben, carl)


def offering(box: House) -> int:
    return sum(one.id == FAKE for _, one in box.pool.candidates._offers())


async def checked(world: World, answer: dict[str, Any]) -> dict[str, Any]:
    """The receipt of an answer, whose every check holds."""
    found = await world.anna.http("GET", f"/v1/receipts/{answer['request_id']}")
    assert [one for one in verify_receipt(found.content) if not one.ok] == []
    receipt: dict[str, Any] = msgspec.json.decode(found.json()["signed_receipt"])
    return receipt


async def right(world: World, answer: httpx.Response) -> None:
    """The whole answer, by ben."""
    told = answer.json()
    assert answer.status_code == 200, told
    assert told["choices"][0]["message"]["content"] == said(told["usage"]["prompt_tokens"], 20)
    assert (await checked(world, told))["node_id"] == world.ben.node_id
