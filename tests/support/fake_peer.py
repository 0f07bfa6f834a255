"""A member of a network that does and says what a test wants."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from pinaivu_box.config import SamplingConfig
from pinaivu_box.engine.chat_template import ChatTemplate, TemplateSetup
from pinaivu_box.engine.messages import Output, Prompt, SamplingDefaults
from pinaivu_box.engine.own_templates import CHATML
from pinaivu_box.gateway.backend import Job, Started
from pinaivu_box.gateway.local import resolve
from pinaivu_box.gateway.metering import prove
from pinaivu_box.gateway.records import LegRecord
from pinaivu_box.gossip.adverts import Facts
from pinaivu_box.identity import Identity
from pinaivu_box.legs import wire as leg_wire
from pinaivu_box.legs.codec import to_job
from pinaivu_box.models.catalog import remote
from pinaivu_box.network.network import Network
from pinaivu_box.peering_config import PeeringConfig
from pinaivu_box.receipts.commitment import RunningCommitment, new_nonce
from pinaivu_box.receipts.receipt import (
    MARK_DOMAIN,
    VERSION,
    EngineBuild,
    Price,
    Proof,
    mark_text,
    sign_proof,
)
from pinaivu_box.store.database import Database
from pinaivu_box.transport.link import Stream
from pinaivu_box.transport.transport import Transport
from tests.support.fake_model import CHEAP, FAKE, fake_text
from tests.support.records import offer

Handler = Callable[[str, Stream], Awaitable[None]]


class FakePeer:
    """Belongs to the network like any other; what it offers and does is the test's."""

    def __init__(self, identity: Identity, transport: Transport, home: Path, name: str) -> None:
        self.identity, self.name = identity, name
        self.models: tuple[Any, ...] = ()
        self.handler: Handler | None = None
        self._database = Database(home / f"{name}.db")
        self.network = Network(
            identity, transport, self._database, lambda: PeeringConfig(name=name), self.describe
        )
        self.network.handlers[leg_wire.PURPOSE] = self._handle

    def describe(self) -> Facts:
        return Facts("1.0", (), "credits", self.models)

    async def _handle(self, peer: str, stream: Stream) -> None:
        if self.handler is not None:
            await self.handler(peer, stream)

    async def __aenter__(self) -> FakePeer:
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


Message = leg_wire.ToCoordinator


def same(message: Any) -> Any:
    return message


@dataclass(frozen=True)
class Violation:
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


class ViolatingServer:
    """Serves as the fake model would, but for a `lie`.  `heard`: what the coordinator said after
    it had begun."""

    def __init__(
        self, identity: Identity, lie: Violation, price: tuple[str, str, str] = CHEAP
    ) -> None:
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
        text = fake_text(len(prompt), count, len(ask.made))
        tokens = lie.tokens(list(text.encode()))
        text = lie.text(text)
        nonce = new_nonce()
        begun = started(job, ask.digest, lie.sampling, nonce, self.identity.node_id, lie.version)
        account = LegRecord(job, begun)
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
        proof, _ = prove(account, Price("credits", *self.price))
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
    if job.prompt_tokens is not None:
        return job.prompt_tokens
    template = ChatTemplate(TemplateSetup(CHATML, bos="", eos=""))
    return list("".join(template.parts(job.messages, [], {})).encode())


def started(
    job: Job, digest: str, changes: dict[str, Any], nonce: str, node_id: str, version: int
) -> Started:
    sampling = job.drawn_with or resolve(job, SamplingConfig(), SamplingDefaults())
    sampling = msgspec.structs.replace(sampling, **changes)
    info = EngineBuild("fake", "none")
    return Started(node_id, digest, info, sampling, "tags", False, nonce=nonce, proof=version)


def began(one: Started) -> leg_wire.LegStarted:
    assert one.nonce is not None
    return leg_wire.LegStarted(one.model_digest, one.engine.build, one.engine.device, one.sampling,
                      one.tool_style, one.thinks, one.nonce, one.proof)  # fmt: skip
