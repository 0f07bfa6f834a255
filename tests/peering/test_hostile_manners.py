"""A member that serves others' requests and has no manners, or gives what nobody asked for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace as replace_lie
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from pinaivu_box.engine.messages import TokenLogprob
from pinaivu_box.legs import client as peers
from pinaivu_box.legs import wire as leg_wire
from pinaivu_box.transport import rpc
from pinaivu_box.transport.link import Stream
from pinaivu_box.transport.wire import MAX_FRAME_BYTES
from tests.support import memory_transport
from tests.support.fake_model import FAKE
from tests.support.fake_peer import Violation
from tests.support.three_boxes import ThreeBoxes, checked, right
from tests.support.violations import NAN, ends, first, last

pytestmark = pytest.mark.anyio


@pytest.fixture
async def world(three: ThreeBoxes, caplog: pytest.LogCaptureFixture) -> AsyncIterator[ThreeBoxes]:
    async with three.lied_to(caplog):
        yield three


def frames(*sent: bytes) -> Any:
    """Says that, byte by byte, and then nothing more."""

    async def say(peer: str, stream: Stream) -> None:
        await leg_wire.receive(stream, leg_wire.to_serving)
        for one in sent:
            await stream.send(one)
        await stream.receive()
        stream.abandon()

    return say


async def endless(stream: Stream, message: leg_wire.ToCoordinator, seconds: float) -> None:
    while True:
        await leg_wire.send(stream, message)
        await asyncio.sleep(seconds)


async def idle(peer: str, stream: Stream) -> None:
    await leg_wire.receive(stream, leg_wire.to_serving)
    await endless(stream, leg_wire.Alive(), 0.5)


async def chatter(peer: str, stream: Stream) -> None:
    await leg_wire.receive(stream, leg_wire.to_serving)
    await endless(stream, leg_wire.Alive(), 0)


async def deaf(peer: str, stream: Stream) -> None:
    await asyncio.sleep(60)


async def leaves(peer: str, stream: Stream) -> None:
    stream.abandon()


MEGABYTE = MAX_FRAME_BYTES
MANNERS: dict[str, tuple[Any, str]] = {
    "silence": (frames(), "stalled: nothing came"),
    "deafness": (deaf, "does not take"),
    "no more than a heartbeat": (idle, "nothing but that it is alive"),
    "a flood of heartbeats": (chatter, "too many messages"),
    "an end without a word": (ends, "ended before the leg"),
    "a stream that breaks": (leaves, "abandoned"),
    "no message": (frames(b"\0garbage"), "not what was expected"),
    "half a message": (frames(b"\1garbage"), "stalled"),
    "an empty message": (frames(b"\0"), "not what was expected"),
    "another kind of frame": (frames(b"\7"), "another kind"),
    "crumbs": (frames(*[b"\1a"] * 64), "without an end"),
    "17 megabytes": (frames(*[b"\1" + bytes(MEGABYTE - 1)] * 17), "longer than is allowed"),
    "lists in lists": (frames(b"\0" + b"\x91" * (MEGABYTE - 1)), "not what was expected"),
    "a message of the other side": (
        frames(b"\0" + msgspec.msgpack.encode(leg_wire.StopLeg())), "not what was expected",
    ),
    "a million empty outputs": (
        frames(b"\0\x83\xa4type\xa7outputs\xa4mark\xd9\x80" + b"0" * 128
               + b"\xa7outputs\xdd\x00\x01\x00\x00" + b"\x92\xa0\x90" * 65536),
        "not what was expected",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MANNERS)
async def test_a_peer_that_breaks_the_protocol_is_replaced(
    world: ThreeBoxes, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    handler, sentence = MANNERS[name]
    # The honest one is measured by them as well, however busy the machine is.
    if name == "no more than a heartbeat":
        monkeypatch.setattr(peers, "ALIVE_SECONDS", 12.0)
    if name == "deafness":
        monkeypatch.setattr(memory_transport, "WINDOW_BYTES", 500)
        monkeypatch.setattr(rpc, "SEND_SECONDS", 10.0)
    world.carl.handler = handler
    text = name * 100 if handler is deaf else name
    await right(world, await world.anna.chat(text))
    why = await world.why()
    assert sentence in why and why.isprintable(), why


async def test_a_box_that_goes_silent_in_mid_stream_is_replaced(world: ThreeBoxes) -> None:
    world.lie(Violation(last=lambda _: None, proved=lambda _: None))
    await right(world, await world.anna.chat("half"))
    assert "stalled" in await world.why()


def probed(*values: float, top: int = 0) -> Violation:
    found = [TokenLogprob(b"a", one, [(b"b", one)] * top) for one in values]
    return first(logprobs=found)


@pytest.mark.parametrize(
    ("lie", "sentence"),
    [
        (probed(NAN), "not finite"),
        (probed(float("-inf"), top=1), "not finite"),
        (probed(*[-1.0] * 30), "not requested"),
    ],
)
async def test_log_probabilities_are_numbers(
    world: ThreeBoxes, lie: Violation, sentence: str
) -> None:
    world.lie(lie)
    answer = await world.anna.chat(f"{sentence} {lie}", logprobs=True, top_logprobs=1)
    assert answer.status_code == 200, answer.text
    found = answer.json()["choices"][0]["logprobs"]["content"]
    assert len(found) == 20 and all(one["logprob"] is not None for one in found)
    assert sentence in await world.why()


VECTORS: dict[str, list[bytes]] = {
    "none": [],
    "one for two": [bytes(1028)],
    "three for two": [bytes(1028)] * 3,
    "of other lengths": [bytes(1028), bytes(1024)],
    "of half a number": [bytes(1027)] * 2,
    "of nothing": [b""] * 2,
    "no numbers": [b"\0\0\xc0\x7f" * 257] * 2,
}


@pytest.mark.parametrize("name", VECTORS)
async def test_vectors_are_what_was_asked_for(world: ThreeBoxes, name: str) -> None:
    liar = world.lie(last(vectors=VECTORS[name]))
    liar.lie = replace_lie(liar.lie, reason="stop", tokens=lambda _: [], text=lambda _: "")
    body = {"model": FAKE, "input": ["a", "bc"], "dimensions": 8}
    answer = await world.anna.http("POST", "/v1/embeddings", json=body)
    told = answer.json()
    assert answer.status_code == 200, told
    assert [len(one["embedding"]) for one in told["data"]] == [8, 8]
    assert all(isinstance(value, float) for one in told["data"] for value in one["embedding"])
    assert "vectors" in await world.why()
    # What a liar makes of the texts is neither signed nor billed.
    assert told["usage"]["prompt_tokens"] == len("abc")
    assert (await checked(world, told))["node_id"] == world.ben.node_id


COUNTS: dict[str, leg_wire.ToCoordinator] = {
    "no context": leg_wire.Tokens([1, 2, 3], context=0),
    "a prompt without end": leg_wire.Tokens([1] * 100_000, context=2**30),
    "something else": leg_wire.Alive(),
}


@pytest.mark.parametrize("name", COUNTS)
async def test_a_prompt_is_counted_by_somebody_else(world: ThreeBoxes, name: str) -> None:
    """Who says that there is no context would switch a key's limits off."""

    async def count(peer: str, stream: Stream) -> None:
        asked = await leg_wire.receive(stream, leg_wire.to_serving)
        if isinstance(asked, leg_wire.Count):
            await leg_wire.send(stream, COUNTS[name])
            await stream.finish()
        else:
            await leg_wire.send(stream, leg_wire.LegRefused("x", "no", other=True))

    world.carl.handler = count
    made = await world.anna.http(
        "POST", "/v1/admin/keys", json={"name": "few", "policy": {"tpm": 60}}
    )
    few = made.json()["key"]
    answer = await world.anna.chat(name, secret=few, max_tokens=1000)
    assert answer.json()["error"]["code"] == "exceeds_key_limit", answer.text


async def test_a_prompt_must_be_the_one_that_was_counted(world: ThreeBoxes) -> None:
    made = await world.anna.http(
        "POST", "/v1/admin/keys", json={"name": "counted", "policy": {"tpm": 100_000}}
    )
    world.lie(Violation(read=lambda one: replace(one, tokens=[*one.tokens, 65])))
    await right(world, await world.anna.chat("counted", secret=made.json()["key"]))
    assert "other prompt tokens" in await world.why()
