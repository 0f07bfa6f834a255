"""A member that asks for more than it pays for, or than one box can have: the others are served."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import msgspec
import pytest

from pinaivu_box.errors import LinkLost, PeeringError
from pinaivu_box.gateway import guests, serving
from pinaivu_box.models.catalog import digest_of
from pinaivu_box.peering import memory_transport, work
from pinaivu_box.receipts.receipt import ACCEPTANCE_DOMAIN
from pinaivu_box.store import ledger
from tests.peering.asking import accept, ask, entry, heard, opened, refused, served, sign, task
from tests.peering.company import FAKE, World, said
from tests.peering.people import person
from tests.peering.worlds import soon, wait_until

pytestmark = pytest.mark.anyio


@pytest.fixture
async def world(three: World, caplog: pytest.LogCaptureFixture) -> AsyncIterator[World]:
    async with three.asked_much(caplog):
        yield three


# -- what is owed --------------------------------------------------------------------------------


async def test_who_never_accepts_owes_it_all_the_same(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "_ACCEPT_SECONDS", 0.1)
    before = await ledger.balance(world.ben.box.database, world.carl.identity.node_id)
    asked = ask(world)
    stream, _ = await served(world, asked)
    await wait_until(lambda: not world.running)
    assert await soon(stream.receive()) is None
    found = await entry(world, asked)
    assert found is not None and found["acceptance"] == b""
    after = await ledger.balance(world.ben.box.database, world.carl.identity.node_id)
    used = before["credits"].credit_used if before else 0
    assert after["credits"].credit_used == used + found["amount"]
    stream.abandon()


@pytest.mark.parametrize("kind", ["garbage", "anothers", "another proof", "dispute"])
async def test_a_signature_that_does_not_bind_is_none(world: World, kind: str) -> None:
    asked, earlier = ask(world), ask(world)
    first, proof = await served(world, earlier)
    await accept(first, sign(world, proof))
    stream, proved = await served(world, asked)
    signature = {
        "garbage": b"\7" * 64,
        "anothers": person(99).sign(ACCEPTANCE_DOMAIN, proved.signed.encode()),
        "another proof": sign(world, proof),
    }.get(kind)
    if signature is None:
        await work.send(stream, work.Disputed("\x1b[2J\nERROR all is lost"))
        await stream.finish()
        assert await soon(stream.receive()) is None
    else:
        await work.send(stream, work.Accepted(signature.hex()))
        with pytest.raises(LinkLost, match="not its own") as lost:
            await soon(stream.receive())
        assert lost.value.code == 400
    await wait_until(lambda: not world.running)
    found = await entry(world, asked)
    assert found is not None and found["acceptance"] == b"" and found["amount"] > 0


@pytest.mark.parametrize(
    "spelled", [lambda t: t + "\n", str.upper, lambda t: f" {t[:-1]}", lambda t: t[:-1] + "\uff10"]
)
async def test_a_signature_has_one_spelling(world: World, spelled: Callable[[str], str]) -> None:
    """What is no signature as it is written accepts nothing; the leg is owed all the same."""
    asked = ask(world)
    stream, proved = await served(world, asked)
    await work.send(stream, work.Accepted(spelled(sign(world, proved).hex())))
    await wait_until(lambda: not world.running)
    found = await entry(world, asked)
    assert found is not None and found["acceptance"] == b"" and found["amount"] > 0
    stream.abandon()


async def test_a_dispute_stays_in_its_line(world: World, caplog: pytest.LogCaptureFixture) -> None:
    stream, _ = await served(world, ask(world))
    await work.send(stream, work.Disputed("\x1b[2J\nERROR all is lost"))
    await stream.finish()
    assert await soon(stream.receive()) is None
    (line,) = [one.getMessage() for one in caplog.records if "disputes" in one.getMessage()]
    assert line.isprintable()


async def test_a_leg_is_served_once(world: World) -> None:
    """Whoever could ask again with the same id would pay once and be served for ever."""
    asked = ask(world)
    again = ask(world, "Something else", request_id=asked.task.request_id)
    both = [await opened(world) for _ in range(2)]
    for stream, one in zip(both, (asked, again), strict=True):
        await work.send(stream, one)
    found = []
    for stream in both:
        found.append((await heard(stream))[-1])
        await stream.finish()
        assert await soon(stream.receive()) is None
    assert sorted(type(one).__name__ for one in found) == ["Outputs", "Refused"]
    for _ in range(2):
        assert "served already" in (await refused(world, again)).message
    other = msgspec.structs.replace(asked, task=msgspec.structs.replace(asked.task, choice=1))
    stream, proved = await served(world, other)
    await accept(stream, sign(world, proved))


async def test_a_prompt_is_not_for_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guests, "_OTHER_SECONDS", 0.2)
    asked = ask(world)
    free = msgspec.structs.replace(
        asked, pays_prompt=False, task=msgspec.structs.replace(asked.task, choice=1)
    )
    assert "pays" in (await refused(world, free)).message
    stream, proved = await served(world, asked)
    await accept(stream, sign(world, proved))
    stream, proved = await served(world, free)
    await accept(stream, sign(world, proved))
    paid = [one["amount"] for one in await world.ben.entries(world.carl)
            if one["request_id"] == asked.task.request_id]  # fmt: skip
    assert len(paid) == 2 and max(paid) > min(paid) == 20 * 10**7
    # Another prompt under the same number is another prompt.
    other = msgspec.structs.replace(
        free, task=msgspec.structs.replace(free.task, choice=2, messages=task(world, "x").messages)
    )
    assert "pays" in (await refused(world, other)).message
    # Who breaks off has paid nothing.
    asked = ask(world, max_tokens=None)
    stream = await opened(world)
    await work.send(stream, asked)
    assert isinstance(await soon(work.receive(stream, work.to_coordinator)), work.Began)
    stream.abandon()
    await wait_until(lambda: not world.running)
    free = msgspec.structs.replace(
        asked, pays_prompt=False, task=msgspec.structs.replace(asked.task, choice=1)
    )
    assert "pays" in (await refused(world, free)).message


# -- too much ------------------------------------------------------------------------------------


async def test_a_storm_of_cancellations_is_one(world: World) -> None:
    (engine,) = world.ben.box.placement.engines
    stream = await opened(world)
    await work.send(stream, ask(world, max_tokens=None))
    assert isinstance(await soon(work.receive(stream, work.to_coordinator)), work.Began)
    before = engine._messages
    for _ in range(2000):
        await work.send(stream, work.Stop())
    found = await heard(stream)
    assert isinstance(found[-1], work.Outputs)
    assert found[-1].outputs[-1].finish_reason == "cancelled"
    assert engine._messages - before < 1000
    stream.abandon()


async def test_who_does_not_read_is_not_waited_for(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_transport, "WINDOW_BYTES", 500)
    monkeypatch.setattr(work, "SEND_SECONDS", 2.0)
    streams = [await opened(world) for _ in range(8)]
    for stream in streams:
        await work.send(stream, ask(world, max_tokens=None))
    assert "as many as it may" in (await refused(world, ask(world))).message
    await wait_until(lambda: not world.running)
    for stream in streams:
        with pytest.raises(PeeringError):
            while await soon(stream.receive()) is not None:
                pass


async def test_who_never_comes_to_an_end_holds_up_only_itself(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tasks of up to 16 MiB: four at a time of a peer are waited for."""
    monkeypatch.setattr(serving, "_ASK_SECONDS", 0.5)
    streams = [await opened(world) for _ in range(12)]
    for stream in streams:
        await stream.send(b"\1" + bytes(100_000))
    answer = await world.anna.chat("meanwhile", secret=await world.key("ben"))
    assert answer.status_code == 200, answer.text
    for stream in streams:
        with pytest.raises(PeeringError):
            await soon(stream.receive())
    stream, proved = await served(world, ask(world))
    await accept(stream, sign(world, proved))


async def test_a_message_without_end_ends_the_link(world: World) -> None:
    stream = await opened(world)
    with pytest.raises(LinkLost, match="longer than is allowed") as lost:
        for _ in range(40):
            await stream.send(b"\1" + bytes(work.MAX_FRAME_BYTES - 1))
        await soon(stream.receive())
    assert lost.value.code == 400


async def test_as_many_streams_as_there_may_be(world: World) -> None:
    """Which say nothing, or what they are for and no more."""
    (await opened(world)).abandon()
    link = world.carl.network._links.held[world.ben.node_id].link
    streams = [await soon(link.open()) for _ in range(100)]
    for number, stream in enumerate(streams):
        if number % 2:
            await stream.send(b"\x82\xa4type\xa4Open\xa7purpose\xa4work")
    await wait_until(lambda: world.ben.network._incoming.count >= 100)
    answer = await world.anna.chat("meanwhile", secret=await world.key("ben"))
    told = answer.json()
    assert told["choices"][0]["message"]["content"] == said(told["usage"]["prompt_tokens"], 20)
    for stream in streams:
        stream.abandon()
    await wait_until(lambda: world.ben.network._incoming.count < 10)


async def test_prompts_are_not_counted_without_number(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As any request: eight at a time."""
    digest = world.carl.models[0].digest.hex()
    streams = [await opened(world) for _ in range(40)]
    text = "x" * 500_000
    await asyncio.gather(
        *(work.send(one, work.Count(task(world, text), digest)) for one in streams)
    )
    found = [await soon(work.receive(one, work.to_coordinator)) for one in streams]
    kinds = {type(one) for one in found}
    assert kinds == {work.Tokens, work.Refused}
    assert digest == digest_of(world.ben.box.catalog.find(FAKE))
