"""Boxes of which one signs proofs of version 2 and the other, an older one, of version 1.

What the older one says is built here, frame by frame, as it was before `proof` was in them.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from pinaivu_box.engine.messages import Output, Prompt, TokenLogprob
from pinaivu_box.gateway.metering import prove
from pinaivu_box.gateway.records import LegRecord
from pinaivu_box.identity import verify
from pinaivu_box.legs import wire as leg_wire
from pinaivu_box.receipts.commitment import RunningCommitment, new_nonce
from pinaivu_box.receipts.receipt import (
    MARK_DOMAIN,
    PROOF_DOMAIN,
    Price,
    mark_text,
    sign_proof,
)
from pinaivu_box.receipts.verify import Transcript, verify_receipt
from pinaivu_box.transport import wire
from pinaivu_box.transport.link import Stream
from tests.support.fake_coordinator import accept, ask, entry, heard, opened, sign
from tests.support.fake_model import CHEAP, FAKE
from tests.support.fake_peer import ViolatingServer, Violation, began, job_of, started
from tests.support.three_boxes import ThreeBoxes, checked
from tests.support.violations import last
from tests.support.waiting import wait_until

pytestmark = pytest.mark.anyio
INPUTS = ["a cat", "the sea"]


@pytest.fixture
async def world(three: ThreeBoxes, caplog: pytest.LogCaptureFixture) -> AsyncIterator[ThreeBoxes]:
    async with three.lied_to(caplog):
        yield three


def sha256(*parts: bytes) -> bytes:
    return hashlib.sha256(b"".join(parts)).digest()


def older(message: Any) -> bytes:
    """The frame without what a box of version 1 does not know."""
    fields = msgspec.msgpack.decode(wire.encode(message))
    fields.pop("proof", None)
    return b"\0" + msgspec.msgpack.encode(fields)


async def failed(world: ThreeBoxes, answer: dict[str, Any], **more: Any) -> list[str]:
    """The checks that the answer and its receipt, as its owner gets it, do not pass."""
    document = await world.anna.http("GET", f"/v1/receipts/{answer['request_id']}", **more)
    given = Transcript(answer=msgspec.json.encode(answer))
    return [one.name for one in verify_receipt(document.content, transcript=given) if not one.ok]


def proof_of(receipt: dict[str, Any]) -> dict[str, Any]:
    (signed,) = receipt["proofs"]
    made: dict[str, Any] = msgspec.json.decode(signed["signed"])
    return made


# -- an older box serves -------------------------------------------------------------------------


async def test_a_proof_of_version_1_is_accepted(world: ThreeBoxes) -> None:
    liar = world.lie(Violation(version=1, began=lambda one: msgspec.structs.replace(one, proof=1)))
    answer = (await world.anna.chat("version 1")).json()
    receipt = await checked(world, answer)
    assert receipt["node_id"] == world.carl.identity.node_id
    assert (receipt["v"], proof_of(receipt)["v"]) == (2, 1)
    assert await failed(world, answer) == []
    await wait_until(lambda: liar.heard)
    assert isinstance(liar.heard[0], leg_wire.Accepted)
    assert "0.0 disputes" in await world.why()


async def test_an_older_box_is_left_that_knows_no_least_length(world: ThreeBoxes) -> None:
    """Whoever knows it serves, and it has done nothing wrong; without one it serves as before."""
    liar = world.lie(Violation(sampling={"min_tokens": 0}))
    body: dict[str, Any] = {"min_tokens": 3, "max_tokens": 8}
    answer = (await world.anna.chat("at least three", **body)).json()
    receipt = await checked(world, answer)
    assert liar.asked == 1 and receipt["node_id"] == world.ben.node_id
    assert proof_of(receipt)["sampling"]["min_tokens"] == 3
    world.anna.forget()
    answer = (await world.anna.chat("as long as it likes")).json()
    receipt = await checked(world, answer)
    assert receipt["node_id"] == world.carl.identity.node_id
    assert "min_tokens" not in proof_of(receipt)["sampling"]
    assert "0.0 disputes" in await world.why()


class OldEmbedder(ViolatingServer):
    """Sends whole vectors, whatever was asked for, and a proof that says nothing of them."""

    async def handle(self, peer: str, stream: Stream) -> None:
        ask = await leg_wire.receive(stream, leg_wire.to_serving)
        assert isinstance(ask, leg_wire.LegRequest)
        job, nonce = job_of(ask), new_nonce()
        account = LegRecord(job, started(job, ask.digest, {}, nonce, self.identity.node_id, 1))
        prompt = list("".join(INPUTS).encode())
        vectors = [struct.pack("<257f", *range(k, k + 257)) for k in range(len(INPUTS))]
        ending = leg_wire.Out("", [], "stop", 0.5, vectors=vectors)
        account.take(Prompt(prompt))
        account.take(Output("", [], "stop", 0.5, vectors=vectors))
        commitment = RunningCommitment(nonce, 1).commitment
        mark = mark_text(job.request_id, job.choice, job.leg, 0, commitment)
        proof, _ = prove(account, Price("credits", *CHEAP))
        assert proof.output_commitment == commitment
        signed = sign_proof(self.identity, proof)
        for message in (
            began(account.started),
            leg_wire.PromptRead(prompt),
            leg_wire.LegProof(signed.signed, signed.signature),
            leg_wire.Outputs([ending], self.identity.sign(MARK_DOMAIN, mark).hex()),
        ):
            await stream.send(older(message))
        while (said := await leg_wire.receive(stream, leg_wire.to_serving)) is not None:
            self.heard.append(said)
        await stream.finish()


async def test_vectors_of_version_1_are_committed_to_by_who_asked(world: ThreeBoxes) -> None:
    """The proof does not cover them, but the receipt does: as they were given to the client."""
    old = OldEmbedder(world.carl.identity, Violation())
    world.carl.handler = old.handle
    body = {"model": FAKE, "input": INPUTS, "dimensions": 8}
    answer = (await world.anna.http("POST", "/v1/embeddings", json=body)).json()
    receipt = await checked(world, answer)
    assert receipt["node_id"] == world.carl.identity.node_id
    assert (receipt["v"], proof_of(receipt)["v"]) == (2, 1)
    assert [len(one["embedding"]) for one in answer["data"]] == [8, 8]
    assert sum(n * n for n in answer["data"][1]["embedding"]) == pytest.approx(1)
    assert await failed(world, answer) == []
    answer["data"][1]["embedding"][3] += 2**-20
    assert "vectors commitment" in await failed(world, answer)
    await wait_until(lambda: old.heard)
    assert isinstance(old.heard[0], leg_wire.Accepted)


# -- an older box asks ---------------------------------------------------------------------------


async def answered(
    world: ThreeBoxes, asked: leg_wire.LegRequest
) -> tuple[Stream, list[leg_wire.ToCoordinator]]:
    """What ben says to a coordinator that has not heard of version 2."""
    stream = await opened(world)
    await stream.send(older(asked))
    return stream, await heard(stream)


@pytest.mark.parametrize(
    "more",
    [{}, {"logprobs": 2}, {"inputs": INPUTS, "dimensions": 8}],
    ids=["text", "logprobs", "vectors"],
)
async def test_a_coordinator_that_names_no_version_gets_version_1(
    three: ThreeBoxes, more: dict[str, Any]
) -> None:
    """Commitment and mark are what the older box computes: over text and tokens alone."""
    asked = ask(three, f"older {sorted(more)}", **more)
    stream, said = await answered(three, asked)
    (begun,) = [one for one in said if isinstance(one, leg_wire.LegStarted)]
    (proved,) = [one for one in said if isinstance(one, leg_wire.LegProof)]
    outs = [
        one for message in said if isinstance(message, leg_wire.Outputs) for one in message.outputs
    ]
    signed = proved.signed.encode()
    assert verify(three.ben.node_id, PROOF_DOMAIN, signed, bytes.fromhex(proved.signature))
    proof = msgspec.json.decode(signed)
    tokens = [token for one in outs for token in one.tokens]
    text = "".join(one.text for one in outs)
    assert proof["v"] == 1
    assert (
        proof["output_commitment"]
        == sha256(
            b"pinaivu/commitment/v1\n",
            bytes.fromhex(begun.nonce),
            sha256(text.encode()),
            sha256(struct.pack(f"<{len(tokens)}I", *tokens)),
        ).hex()
    )
    *_, ending = [one for one in said if isinstance(one, leg_wire.Outputs)]
    mark = f"{asked.task.request_id} 0 0 {len(tokens)} {proof['output_commitment']}".encode()
    assert verify(three.ben.node_id, MARK_DOMAIN, mark, bytes.fromhex(ending.mark))
    await accept(stream, sign(three, proved))
    await wait_until(lambda: not three.running)
    row = await entry(three, asked)
    assert row is not None and row["acceptance"]


# -- two newer ones ------------------------------------------------------------------------------


async def test_vectors_over_a_link_are_signed_by_who_computed_them(three: ThreeBoxes) -> None:
    secret = await three.key("ben")
    body = {"model": FAKE, "input": INPUTS, "dimensions": 8}
    answer = (await three.anna.http("POST", "/v1/embeddings", json=body, secret=secret)).json()
    receipt = await checked(three, answer)
    proof = proof_of(receipt)
    assert (receipt["node_id"], proof["v"]) == (three.ben.node_id, 2)
    assert await failed(three, answer, secret=secret) == []
    path = f"/v1/receipts/{answer['request_id']}"
    (leg,) = (await three.anna.http("GET", path, secret=secret)).json()["opening"]["legs"]
    packed = [struct.pack("<I8f", 8, *one["embedding"]) for one in answer["data"]]
    assert (
        proof["output_commitment"]
        == sha256(
            b"pinaivu/commitment/v2\n",
            bytes.fromhex(leg["nonce"]),
            sha256(b""),
            sha256(b""),
            sha256(sha256(b"")),
            sha256(*packed),
        ).hex()
    )


async def test_exactness_is_signed_for_who_reads_it(
    three: ThreeBoxes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in what the coordinator signs; never for vectors, which depend on others."""
    (engine,) = three.ben.box.placement.engines
    exact = "bitwise:haswell llama.cpp 1 f16"
    ready = msgspec.structs.replace(engine.ready, exactness=exact, cpu_variant="haswell")
    monkeypatch.setattr(engine, "ready", ready)
    secret = await three.key("ben")
    body = {"model": FAKE, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}
    answer = (
        await three.anna.http("POST", "/v1/chat/completions", json=body, secret=secret)
    ).json()
    proof = proof_of(await checked(three, answer))
    assert (proof["v"], proof["exactness"]) == (4, exact)
    # The fake model's logit of the token that it says is 0.
    said = answer["choices"][0]["message"]["content"].encode()
    numbers = b"".join(struct.pack("<If", token, 0.0) for token in said)
    assert proof["logits_sha256"] == sha256(numbers).hex() and len(said) == 3
    body = {"model": FAKE, "input": INPUTS}
    answer = (await three.anna.http("POST", "/v1/embeddings", json=body, secret=secret)).json()
    assert not {"exactness", "logits_sha256"} & proof_of(await checked(three, answer)).keys()
    for version, expected in ((3, (2, None)), (5, (4, exact))):
        asked = msgspec.structs.replace(ask(three, f"version {version}"), proof=version)
        stream = await opened(three)
        await leg_wire.send(stream, asked)
        (proved,) = [one for one in await heard(stream) if isinstance(one, leg_wire.LegProof)]
        signed = msgspec.json.decode(proved.signed)
        assert (signed["v"], signed.get("exactness")) == expected
        await accept(stream, sign(three, proved))
    monkeypatch.setattr(engine, "ready", msgspec.structs.replace(ready, exactness=""))
    asked = ask(three, "nothing is promised")
    stream = await opened(three)
    await leg_wire.send(stream, msgspec.structs.replace(asked, proof=4))
    (proved,) = [one for one in await heard(stream) if isinstance(one, leg_wire.LegProof)]
    proof = msgspec.json.decode(proved.signed)
    assert (proof["v"], proof["exactness"]) == (4, "statistical") and "logits_sha256" in proof
    await accept(stream, sign(three, proved))
    monkeypatch.setattr(engine, "ready", ready)
    await wait_until(lambda: not three.running)
    models = (await three.ben.http("GET", "/v1/models")).json()["data"]
    assert [one.get("exactness") for one in models if one["id"] == FAKE] == [exact]
    assert three.ben.box.load.cpu_variant() == "haswell"


async def test_many_vectors_go_in_several_messages(
    three: ThreeBoxes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pinaivu_box.legs.served_leg._MAX_VECTOR_BYTES", 3000)
    secret = await three.key("ben")
    body = {"model": FAKE, "input": [f"text {n}" for n in range(11)]}
    answer = (await three.anna.http("POST", "/v1/embeddings", json=body, secret=secret)).json()
    here = (await three.ben.http("POST", "/v1/embeddings", json=body)).json()
    assert [one["embedding"] for one in answer["data"]] == [
        one["embedding"] for one in here["data"]
    ]
    assert (await checked(three, answer))["node_id"] == three.ben.node_id
    assert await failed(three, answer, secret=secret) == []


@pytest.mark.parametrize("what", ["logprobs", "vectors"])
async def test_an_output_that_differs_from_its_mark_is_a_violation(
    world: ThreeBoxes, what: str
) -> None:
    """A serving box whose answer is not the one that it signs for."""

    if what == "logprobs":
        world.lie(last(logprobs=[TokenLogprob(b"a", -1.0, [])]))
        answer = await world.anna.chat("changed", logprobs=True)
    else:
        vectors = [struct.pack("<8f", *([0.5] * 8))] * 2
        lie = last(vectors=vectors, tokens=[], text="")
        world.lie(replace(lie, reason="stop", tokens=lambda _: [], text=lambda _: ""))
        body = {"model": FAKE, "input": INPUTS, "dimensions": 8}
        answer = await world.anna.http("POST", "/v1/embeddings", json=body)
    told = answer.json()
    assert answer.status_code == 200, told
    assert (await checked(world, told))["node_id"] == world.ben.node_id
    assert await failed(world, told) == []
    assert "mark does not match what was sent" in await world.why()
