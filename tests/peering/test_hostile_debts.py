"""A member that asks for more than it pays for, or than one box can have: the others are served."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pinaivu_box import amount
from pinaivu_box.amount import parse
from pinaivu_box.errors import LinkLost, PeeringError
from pinaivu_box.gateway.quota import Window
from pinaivu_box.ledger import entry as ledger_entry
from pinaivu_box.legs import admission, served_leg, server
from pinaivu_box.legs import wire as leg_wire
from pinaivu_box.models.catalog import digest_of
from pinaivu_box.receipts.receipt import ACCEPTANCE_DOMAIN
from pinaivu_box.transport import rpc
from pinaivu_box.transport.link import Stream
from pinaivu_box.transport.wire import MAX_FRAME_BYTES
from tests.support import memory_transport
from tests.support.fake_coordinator import (
    accept,
    ask,
    entry,
    heard,
    opened,
    refused,
    served,
    sign,
    task,
)
from tests.support.fake_model import DEAR, FAKE, fake_text
from tests.support.in_process_box import InProcessBox, count_offers, in_process_box
from tests.support.keys import known_identity
from tests.support.memory_transport import MemoryNetwork
from tests.support.three_boxes import ThreeBoxes
from tests.support.waiting import soon, wait_until

pytestmark = pytest.mark.anyio


@pytest.fixture
async def world(three: ThreeBoxes, caplog: pytest.LogCaptureFixture) -> AsyncIterator[ThreeBoxes]:
    async with three.asked_much(caplog):
        yield three


# -- what is owed --------------------------------------------------------------------------------


async def test_a_peer_that_never_accepts_owes_the_entry(
    world: ThreeBoxes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served_leg, "_ACCEPT_SECONDS", 0.1)
    before = await ledger_entry.balance(world.ben.box.database, world.carl.identity.node_id)
    asked = ask(world)
    stream, _ = await served(world, asked)
    await wait_until(lambda: not world.running)
    assert await soon(stream.receive()) is None
    found = await entry(world, asked)
    assert found is not None and found["acceptance"] == b""
    after = await ledger_entry.balance(world.ben.box.database, world.carl.identity.node_id)
    used = before["credits"].credit_used if before else 0
    assert after["credits"].credit_used == used + found["amount"]
    stream.abandon()


HANGUPS = ("at the first output", "in the middle", "at the proof", "at the end", "orderly",
           "after a stop", "with the link", "in dispute")  # fmt: skip


async def hang_up(world: ThreeBoxes, asked: leg_wire.LegRequest, how: str) -> None:
    """Ask, and leave at that stage."""
    stream = await opened(world)
    await leg_wire.send(stream, asked)
    outputs = 0
    while True:
        message = await soon(leg_wire.receive(stream, leg_wire.to_coordinator))
        outputs += isinstance(message, leg_wire.Outputs)
        ended = (
            isinstance(message, leg_wire.Outputs) and message.outputs[-1].finish_reason is not None
        )
        wanted = {
            "in the middle": outputs == 3,
            "at the proof": isinstance(message, leg_wire.LegProof),
        }
        if ended or (outputs == 1 and how not in (*wanted, "at the end", "in dispute")):
            break
        if wanted.get(how):
            break
    match how:
        case "orderly":
            await stream.finish()
        case "after a stop":
            await leg_wire.send(stream, leg_wire.StopLeg())
            stream.abandon()
        case "with the link":
            await world.carl.network._links.by_peer[world.ben.node_id].close(400, "enough")
        case "in dispute":
            await leg_wire.send(stream, leg_wire.Disputed("I have seen nothing"))
            await stream.finish()
        case _:
            stream.abandon()
    await wait_until(lambda: not world.running)


async def waits(world: ThreeBoxes) -> int:
    found = await ledger_entry.balance(world.ben.box.database, world.carl.identity.node_id)
    return found["credits"].waiting if found else 0


@pytest.mark.parametrize("how", HANGUPS)
async def test_a_peer_that_disconnects_owes_what_was_computed(world: ThreeBoxes, how: str) -> None:
    before, asked = await waits(world), ask(world, max_tokens=60)
    await hang_up(world, asked, how)
    found = await entry(world, asked)
    assert found is not None and found["acceptance"] == b""
    proof = msgspec.json.decode(found["proof"])
    assert proof["prompt_tokens"] > 0 and proof["completion_tokens"] > 0
    if how in ("at the first output", "orderly", "after a stop", "with the link"):
        assert proof["finish_reason"] == "cancelled" and proof["completion_tokens"] < 60
    assert found["amount"] == (proof["prompt_tokens"] + proof["completion_tokens"]) * 10**7
    assert await waits(world) == before + found["amount"]
    await wait_until(lambda: world.carl.network.peer("ben").state == "connected")


async def terms(world: ThreeBoxes, **limits: object) -> None:
    """What ben's operator has set for carl."""
    made = await world.ben.http("PATCH", "/v1/admin/peers/carl", json={"limits": limits})
    assert made.status_code == 200, made.text


@pytest.fixture
async def strict(world: ThreeBoxes, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[ThreeBoxes]:
    """Beyond its credit limit carl gets nothing from ben, whether he is idle or not."""
    settings = world.ben.box.settings
    serve = msgspec.structs.replace(settings.config.peering.serve, beyond="refuse")
    peering = msgspec.structs.replace(settings.config.peering, serve=serve)
    config = msgspec.structs.replace(settings.config, peering=peering)
    monkeypatch.setattr(settings, "current", replace(settings.current, config=config))
    yield world
    await terms(world, credit_limit=None, tokens_per_minute=None, max_parallel=None)


async def use(box: InProcessBox, peer: str) -> dict[str, Any]:
    """What a peer uses of a box, as that box's operator sees it."""
    shown = (await box.http("GET", f"/v1/admin/peers/{peer}")).json()["use"]
    return {**shown, **{name: parse(shown[name]) for name in ("owes", "unaccepted")}}


async def owes(world: ThreeBoxes) -> int:
    return int((await use(world.ben, "carl"))["owes"])


async def forget_tokens(world: ThreeBoxes) -> None:
    """As if carl had used nothing in the last minute."""
    quota = await world.ben.pool.serving.admission.quotas.of(world.carl.identity.node_id)
    quota.tokens = Window()


async def test_the_credit_limit_binds_who_hangs_up_time_and_again(strict: ThreeBoxes) -> None:
    """What it got is at most its credit and one request."""
    world, before = strict, await owes(strict)
    prompt, limit = 100 * 10**7, before + 2 * 10**9
    await terms(world, credit_limit=amount.to_text(limit))
    text, refusal = "x" * 80, None
    for _ in range(100):
        stream = await opened(world)
        await leg_wire.send(stream, ask(world, text, max_tokens=None))
        message = await soon(leg_wire.receive(stream, leg_wire.to_coordinator))
        if isinstance(message, leg_wire.LegRefused):
            refusal = message
            break
        while not isinstance(
            await soon(leg_wire.receive(stream, leg_wire.to_coordinator)), leg_wire.Outputs
        ):
            pass
        stream.abandon()
        await wait_until(lambda: not world.running)
    assert refusal is not None and refusal.code == "rate_limit_exceeded" and refusal.other
    unaccepted = amount.to_text(await waits(world))
    assert f"{unaccepted} of it not accepted by your box" in refusal.message
    assert limit <= await owes(world) < limit + 8192 * 10**7
    assert before + prompt < limit
    shown = (await world.ben.http("GET", "/v1/admin/peers/carl")).json()["use"]
    assert shown["unaccepted"] == unaccepted and shown["owes"] == amount.to_text(await owes(world))
    # What was not yet refused is counted no more, either: nothing at all is to be had.
    digest = world.carl.models[0].digest.hex()
    assert "owes" in (await refused(world, leg_wire.Count(task(world), digest))).message
    # The operator writes it off, and it may have as much again.
    forgiven = await world.ben.http("POST", "/v1/admin/ledger/carl/forgive")
    assert forgiven.status_code == 200 and await waits(world) == 0
    stream, proved = await served(world, ask(world))
    await accept(stream, sign(world, proved))


async def test_the_credit_of_running_requests_is_reserved(strict: ThreeBoxes) -> None:
    """Of many that come together only those are begun that the credit has room for."""
    world = strict
    limit = await owes(world) + 10**9
    await terms(world, credit_limit=amount.to_text(limit), max_parallel=8)
    streams = [await opened(world) for _ in range(8)]
    for stream in streams:
        await leg_wire.send(stream, ask(world, max_tokens=None))
    found = [await soon(leg_wire.receive(one, leg_wire.to_coordinator)) for one in streams]
    kinds = [type(one) for one in found]
    assert sorted(one.__name__ for one in kinds) == ["LegRefused"] * 7 + ["LegStarted"]
    assert {one.code for one in found if isinstance(one, leg_wire.LegRefused)} == {
        "rate_limit_exceeded"
    }
    assert any(
        "for running requests" in one.message
        for one in found
        if isinstance(one, leg_wire.LegRefused)
    )
    for stream in streams:
        stream.abandon()
    await wait_until(lambda: not world.running)
    # What was reserved is free again, but for what was computed.
    computed = await ledger_entry.balance(world.ben.box.database, world.carl.identity.node_id)
    assert await owes(world) == computed["credits"].credit_used < limit + 10**9


async def test_a_peer_gets_keepalives_while_its_prompt_is_counted(
    strict: ThreeBoxes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As while a model is loaded: who hears nothing for 4 s takes a box for lost."""
    world, heard_ = strict, asyncio.Event()
    local = world.ben.box.local
    tokenize = local.tokenize

    async def slow(job: Any) -> Any:
        await heard_.wait()
        return await tokenize(job)

    monkeypatch.setattr(local, "tokenize", slow)
    monkeypatch.setattr(server, "ALIVE_SECONDS", 0.01)
    await terms(world, tokens_per_minute=10_000)
    stream = await opened(world)
    await leg_wire.send(stream, ask(world))
    assert isinstance(await soon(leg_wire.receive(stream, leg_wire.to_coordinator)), leg_wire.Alive)
    heard_.set()
    found = await heard(stream)
    (proved,) = [one for one in found if isinstance(one, leg_wire.LegProof)]
    await accept(stream, sign(world, proved))


async def test_tokens_a_minute_count_what_was_hung_up_on(strict: ThreeBoxes) -> None:
    world = strict
    await forget_tokens(world)
    await terms(world, tokens_per_minute=400)
    refusal = None
    for _ in range(20):
        stream = await opened(world)
        await leg_wire.send(stream, ask(world, "x" * 100, max_tokens=1))
        message = await soon(leg_wire.receive(stream, leg_wire.to_coordinator))
        if isinstance(message, leg_wire.LegRefused):
            refusal = message
            break
        await heard(stream)
        stream.abandon()
        await wait_until(lambda: not world.running)
    assert refusal is not None and "400 tokens per minute" in refusal.message
    assert 300 <= (await use(world.ben, "carl"))["tokens"] <= 400
    # Prompts that are only counted have a limit of their own.
    digest, counted = world.carl.models[0].digest.hex(), 0
    await forget_tokens(world)
    for _ in range(20):
        stream = await opened(world)
        await leg_wire.send(stream, leg_wire.Count(task(world, "x" * 100), digest))
        answer = await soon(leg_wire.receive(stream, leg_wire.to_coordinator))
        await stream.finish()
        if isinstance(answer, leg_wire.LegRefused):
            assert "count 800 tokens per minute" in answer.message
            break
        counted += 1
    assert 0 < counted < 20


async def test_tokens_of_earlier_legs_count_as_tokens_a_minute(strict: ThreeBoxes) -> None:
    """It is computed like a prompt, and nobody pays for it: that must not be without a limit."""
    world = strict
    await forget_tokens(world)
    await terms(world, tokens_per_minute=400)
    made = [100] * 300
    asked = msgspec.structs.replace(ask(world, leg=1, max_tokens=302), made=made)
    stream, proved = await served(world, asked)
    await accept(stream, sign(world, proved))
    await wait_until(lambda: not world.running)
    assert 302 < (await use(world.ben, "carl"))["tokens"] <= 400
    stream = await opened(world)
    await leg_wire.send(
        stream, msgspec.structs.replace(ask(world, leg=1, max_tokens=302), made=made)
    )
    said = await soon(leg_wire.receive(stream, leg_wire.to_coordinator))
    assert isinstance(said, leg_wire.LegRefused) and "400 tokens per minute" in said.message


async def test_debts_outlive_a_restart_and_are_accepted_later(tmp_path: Path) -> None:
    """What anna's box has taken and not told ben that it accepts: ben's stays, as a debt of hers
    that counts, until the two settle."""
    net = MemoryNetwork()
    dear = {
        "pricing__per_1k_tokens": DEAR,
        "peering__serve__credit_limit": "0.3",
        "peering__serve__beyond": "refuse",
        "peering__serve__tokens_per_minute": 1000,
    }
    async with in_process_box(net, tmp_path / "anna") as anna:
        async with in_process_box(net, tmp_path / "ben", (FAKE,), **dear) as ben:
            await soon(ben.network.join(await anna.network.invite()))
            await wait_until(lambda: count_offers(anna) == 1)
            send = leg_wire.send

            async def forgets(stream: Stream, *messages: Any) -> int:
                if any(isinstance(one, leg_wire.Accepted) for one in messages):
                    stream.abandon()
                    raise LinkLost("it is lost")
                return await send(stream, *messages)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(leg_wire, "send", forgets)
                answer = await anna.chat("x" * 20)
            assert answer.status_code == 200, answer.text
            await wait_until(ben.pool.serving.admission.idle.is_set)
            owed = (await use(ben, "anna"))["owes"]
            assert owed > parse("0.3")
        async with in_process_box(net, tmp_path / "ben", (FAKE,), **dear) as ben:
            await wait_until(lambda: ben.network.peer("anna").state == "connected")
            await wait_until(lambda: count_offers(anna) == 1)
            found = await use(ben, "anna")
            assert (found["owes"], found["unaccepted"]) == (owed, owed)
            assert found["tokens"] == owed // 10**7
            refused_ = await anna.chat()
            assert refused_.status_code == 503 and "not accepted by your box" in refused_.text
            settled = (await ben.http("POST", "/v1/admin/ledger/anna/settle")).json()
            assert settled["accepted"] == 1 and settled["disputed"] == []
            found = await use(ben, "anna")
            assert (found["owes"], found["unaccepted"]) == (owed, 0)
            (statement,) = settled["statements"]
            await ben.http("POST", f"/v1/admin/ledger/statements/{statement['id']}/paid")
            assert (await use(ben, "anna"))["owes"] == 0
            anna.forget()  # that it was refused
            assert (await anna.chat()).status_code == 200


async def test_a_second_payment_for_a_prompt_is_owed(world: ThreeBoxes) -> None:
    """The ledger takes one payment for a prompt: what a second is for is not served for nothing,
    neither one after the other nor at once."""
    before = await owes(world)
    request, proofs = ask(world).task.request_id, []
    for choice in range(2):  # other prompts under the number of the first
        asked = ask(world, f"Prompt {choice}", request_id=request, choice=choice)
        stream, proved = await served(world, asked)
        proofs.append(msgspec.json.decode(proved.signed))
        await accept(stream, sign(world, proved))
    asks = [ask(world, f"{n}", request_id=request, choice=n) for n in (2, 3)]
    for stream, proved in await asyncio.gather(*(served(world, one) for one in asks)):
        proofs.append(msgspec.json.decode(proved.signed))
        await accept(stream, sign(world, proved))
    await wait_until(lambda: not world.running)
    due = sum(one["prompt_tokens"] + one["completion_tokens"] for one in proofs) * 10**7
    assert await owes(world) == before + due


@pytest.mark.parametrize("kind", ["garbage", "anothers", "another proof", "dispute"])
async def test_a_signature_that_does_not_bind_is_none(world: ThreeBoxes, kind: str) -> None:
    asked, earlier = ask(world), ask(world)
    first, proof = await served(world, earlier)
    await accept(first, sign(world, proof))
    stream, proved = await served(world, asked)
    signature = {
        "garbage": b"\7" * 64,
        "anothers": known_identity(99).sign(ACCEPTANCE_DOMAIN, proved.signed.encode()),
        "another proof": sign(world, proof),
    }.get(kind)
    if signature is None:
        await leg_wire.send(stream, leg_wire.Disputed("\x1b[2J\nERROR all is lost"))
        await stream.finish()
        assert await soon(stream.receive()) is None
    else:
        await leg_wire.send(stream, leg_wire.Accepted(signature.hex()))
        with pytest.raises(LinkLost, match="not its own") as lost:
            await soon(stream.receive())
        assert lost.value.code == 400
    await wait_until(lambda: not world.running)
    found = await entry(world, asked)
    assert found is not None and found["acceptance"] == b"" and found["amount"] > 0


@pytest.mark.parametrize(
    "spelled", [lambda t: t + "\n", str.upper, lambda t: f" {t[:-1]}", lambda t: t[:-1] + "\uff10"]
)
async def test_a_signature_has_one_spelling(
    world: ThreeBoxes, spelled: Callable[[str], str]
) -> None:
    """What is no signature as it is written accepts nothing; the leg is owed all the same."""
    asked = ask(world)
    stream, proved = await served(world, asked)
    await leg_wire.send(stream, leg_wire.Accepted(spelled(sign(world, proved).hex())))
    await wait_until(lambda: not world.running)
    found = await entry(world, asked)
    assert found is not None and found["acceptance"] == b"" and found["amount"] > 0
    stream.abandon()


async def test_a_dispute_stays_in_its_line(
    world: ThreeBoxes, caplog: pytest.LogCaptureFixture
) -> None:
    stream, _ = await served(world, ask(world))
    await leg_wire.send(stream, leg_wire.Disputed("\x1b[2J\nERROR all is lost"))
    await stream.finish()
    assert await soon(stream.receive()) is None
    (line,) = [one.getMessage() for one in caplog.records if "disputes" in one.getMessage()]
    assert line.isprintable()


async def test_a_leg_is_served_once(world: ThreeBoxes) -> None:
    """Whoever could ask again with the same id would pay once and be served for ever."""
    asked = ask(world)
    again = ask(world, "Something else", request_id=asked.task.request_id)
    both = [await opened(world) for _ in range(2)]
    for stream, one in zip(both, (asked, again), strict=True):
        await leg_wire.send(stream, one)
    found = []
    for stream in both:
        found.append((await heard(stream))[-1])
        await stream.finish()
        assert await soon(stream.receive()) is None
    assert sorted(type(one).__name__ for one in found) == ["LegRefused", "Outputs"]
    for _ in range(2):
        assert "served already" in (await refused(world, again)).message
    other = msgspec.structs.replace(asked, task=msgspec.structs.replace(asked.task, choice=1))
    stream, proved = await served(world, other)
    await accept(stream, sign(world, proved))


async def test_a_prompt_is_not_for_nothing(
    world: ThreeBoxes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admission, "_SIBLING_SECONDS", 0.2)
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
    # Who does not pay is not served before who does.
    sooner = msgspec.structs.replace(
        free, task=msgspec.structs.replace(free.task, choice=3, priority=1)
    )
    assert "pays" in (await refused(world, sooner)).message
    # Another prompt under the same number is another prompt.
    other = msgspec.structs.replace(
        free, task=msgspec.structs.replace(free.task, choice=2, messages=task(world, "x").messages)
    )
    assert "pays" in (await refused(world, other)).message
    # Who breaks off has paid nothing.
    asked = ask(world, max_tokens=None)
    stream = await opened(world)
    await leg_wire.send(stream, asked)
    assert isinstance(
        await soon(leg_wire.receive(stream, leg_wire.to_coordinator)), leg_wire.LegStarted
    )
    stream.abandon()
    await wait_until(lambda: not world.running)
    free = msgspec.structs.replace(
        asked, pays_prompt=False, task=msgspec.structs.replace(asked.task, choice=1)
    )
    assert "pays" in (await refused(world, free)).message


# -- too much ------------------------------------------------------------------------------------


async def test_a_storm_of_cancellations_is_one(world: ThreeBoxes) -> None:
    (engine,) = world.ben.box.placement.engines
    stream = await opened(world)
    await leg_wire.send(stream, ask(world, max_tokens=None))
    assert isinstance(
        await soon(leg_wire.receive(stream, leg_wire.to_coordinator)), leg_wire.LegStarted
    )
    before = engine._messages
    for _ in range(2000):
        await leg_wire.send(stream, leg_wire.StopLeg())
    found = await heard(stream)
    assert isinstance(found[-1], leg_wire.Outputs)
    assert found[-1].outputs[-1].finish_reason == "cancelled"
    assert engine._messages - before < 1000
    stream.abandon()


async def test_a_peer_that_does_not_read_is_not_waited_for(
    world: ThreeBoxes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_transport, "WINDOW_BYTES", 500)
    monkeypatch.setattr(rpc, "SEND_SECONDS", 2.0)
    streams = [await opened(world) for _ in range(8)]
    for stream in streams:
        await leg_wire.send(stream, ask(world, max_tokens=None))
    assert "8 requests at a time" in (await refused(world, ask(world))).message
    await wait_until(lambda: not world.running)
    for stream in streams:
        with pytest.raises(PeeringError):
            while await soon(stream.receive()) is not None:
                pass


async def test_an_endless_request_delays_no_other(
    world: ThreeBoxes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tasks of up to 16 MiB: four at a time of a peer are waited for."""
    monkeypatch.setattr(server, "_ASK_SECONDS", 6.0)  # the honest one is held to it too
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


async def test_a_message_without_end_ends_the_link(world: ThreeBoxes) -> None:
    stream = await opened(world)
    with pytest.raises(LinkLost, match="longer than is allowed") as lost:
        for _ in range(40):
            await stream.send(b"\1" + bytes(MAX_FRAME_BYTES - 1))
        await soon(stream.receive())
    assert lost.value.code == 400


async def test_as_many_streams_as_there_may_be(world: ThreeBoxes) -> None:
    """Which say nothing, or what they are for and no more."""
    (await opened(world)).abandon()
    link = world.carl.network._links.by_peer[world.ben.node_id]
    streams = [await soon(link.open()) for _ in range(100)]
    for number, stream in enumerate(streams):
        if number % 2:
            await stream.send(b"\x82\xa4type\xa4Open\xa7purpose\xa4work")
    await wait_until(lambda: world.ben.network._router.count >= 100)
    answer = await world.anna.chat("meanwhile", secret=await world.key("ben"))
    told = answer.json()
    assert told["choices"][0]["message"]["content"] == fake_text(told["usage"]["prompt_tokens"], 20)
    for stream in streams:
        stream.abandon()
    await wait_until(lambda: world.ben.network._router.count < 10)


async def test_prompts_are_not_counted_without_number(
    world: ThreeBoxes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As any request: eight at a time."""
    digest = world.carl.models[0].digest.hex()
    streams = [await opened(world) for _ in range(40)]
    text = "x" * 7000
    await asyncio.gather(
        *(leg_wire.send(one, leg_wire.Count(task(world, text), digest)) for one in streams)
    )
    found = [await soon(leg_wire.receive(one, leg_wire.to_coordinator)) for one in streams]
    kinds = {type(one) for one in found}
    assert kinds == {leg_wire.Tokens, leg_wire.LegRefused}
    assert digest == digest_of(world.ben.box.catalog.find(FAKE))
