"""Legs that other boxes serve: over the memory transport, with real engines (of the fake model)."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import replace
from functools import partial
from typing import Any

import msgspec
import pytest
from ulid import ULID

from pinaivu_box.engine.messages import Output, Prompt, TokenLogprob
from pinaivu_box.errors import ContextOverflow, EngineLost, ModelNotFound, NoNodesAvailable
from pinaivu_box.gateway.backend import Event, Proved, Started
from pinaivu_box.gateway.engine_process import EngineProcess
from pinaivu_box.gateway.records import ChoiceRecord, LegRecord
from pinaivu_box.gossip.adverts import ModelLoad
from pinaivu_box.gossip.loads import ReportedLoad
from pinaivu_box.identity import verify
from pinaivu_box.legs.runner import LegRun
from pinaivu_box.models.catalog import Model
from pinaivu_box.receipts.receipt import ACCEPTANCE_DOMAIN, PROOF_DOMAIN, Proof, cost
from tests.support.in_process_pools import FAKE, PROMPT, PoolNode, config, pools
from tests.support.waiting import wait_until

pytestmark = pytest.mark.anyio
SENTENCE = "The quick brown fox jumps over the lazy dog. "


@pytest.fixture
async def pair() -> AsyncIterator[list[PoolNode]]:
    """One without models, and one with."""
    async with pools(asker=config(), server=config(f"{FAKE}=2")) as nodes:
        yield nodes


def text_of(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Output))


def tokens_of(events: list[Event]) -> list[int]:
    return [token for one in events if isinstance(one, Output) for token in one.tokens]


def logprobs_of(events: list[Event]) -> list[TokenLogprob]:
    return [of for one in events if isinstance(one, Output) for of in one.logprobs]


def told(prompt: list[int], count: int) -> str:
    """What the fake model says after so many tokens of a prompt."""
    return "".join(SENTENCE[(len(prompt) - 1 + i) % len(SENTENCE)] for i in range(count))


async def test_a_peer_serves_what_is_not_here(pair: list[PoolNode]) -> None:
    asker, server = pair
    choice = ChoiceRecord(asker.job())
    events = await asker.serve(choice)
    started, prompt = events[0], events[1]
    assert isinstance(started, Started) and isinstance(prompt, Prompt)
    assert started.node_id == server.node_id
    (leg,) = choice.legs
    assert leg.route is not None and leg.route["chosen"] == server.node_id
    assert text_of(events) == told(prompt.tokens, 20)
    assert bytes(tokens_of(events)).decode() == text_of(events)
    assert isinstance(events[-1], Output) and events[-1].finish_reason == "length"
    (proved,) = [event for event in events if isinstance(event, Proved)]
    signed = proved.signed.signed.encode()
    assert verify(server.node_id, PROOF_DOMAIN, signed, bytes.fromhex(proved.signed.signature))
    assert proved.proof.completion_tokens == 20
    assert proved.proof.sampling["seed"] == "7"


async def test_the_ttft_of_a_model_that_is_not_loaded_includes_loading_it(
    pair: list[PoolNode],
) -> None:
    """Who had to fear a long wait there would queue elsewhere, and it would never be loaded."""
    asker, server = pair
    (model,) = [one for one in server.catalog.models if one.id == FAKE]
    small, large = (server.load.ttft_ms(replace(model, size=size)) for size in (10**6, 20 * 10**9))
    assert small < 1500 and large > 20_000
    await asker.ask()
    assert server.load.ttft_ms(replace(model, size=20 * 10**9)) < 1000


async def test_both_hold_the_same_account_signed_by_both(pair: list[PoolNode]) -> None:
    asker, server = pair
    await asker.ask()
    await wait_until(lambda: len(server.kept) == 1)
    (taken,), (served,) = asker.kept, server.kept
    assert served.served_by_us and not taken.served_by_us
    assert (taken.peer, served.peer) == (server.node_id, asker.node_id)
    assert (taken.proof, taken.signature) == (served.proof, served.signature)
    assert taken.acceptance == served.acceptance
    assert verify(asker.node_id, ACCEPTANCE_DOMAIN, served.proof, served.acceptance)
    proof = msgspec.json.decode(served.proof, type=Proof)
    assert taken.amount == served.amount == cost(proof, pays_prompt=True)


async def test_a_fault_of_the_request_is_reported_as_by_an_engine_here(
    pair: list[PoolNode],
) -> None:
    asker, _ = pair
    with pytest.raises(ContextOverflow, match="n_prompt_tokens"):
        await asker.ask(text="x" * 3000)


async def test_a_prompt_is_counted_by_a_peer(pair: list[PoolNode]) -> None:
    asker, _ = pair
    prompt, context = await asker.pool.boxes.tokenize(asker.job())
    assert prompt.tokens and context == 2048
    events = await asker.ask()
    assert isinstance(events[1], Prompt) and events[1].tokens == prompt.tokens


async def test_long_prompts_go_in_several_frames() -> None:
    engine = {"kv_tokens": 3_000_000, "max_sequences": 1}
    settings = [config(), config(f"{FAKE}=0", engine=engine)]
    settings[1] = msgspec.structs.replace(
        settings[1], engine=msgspec.structs.replace(settings[1].engine, context=3_000_000)
    )
    async with pools(asker=settings[0], server=settings[1]) as (asker, _):
        prompt, _ = await asker.pool.boxes.tokenize(asker.job(text="ab" * 1_000_000))
        assert len(prompt.tokens) > 2_000_000


async def test_a_cancelled_leg_returns_its_output_and_proof(pair: list[PoolNode]) -> None:
    asker, server = pair

    def cancel(run: LegRun, events: list[Event]) -> None:
        if len(tokens_of(events)) > 10:
            run.cancel()

    events = await asker.serve(ChoiceRecord(asker.job(max_tokens=1500)), cancel)
    assert isinstance(events[-1], Output) and events[-1].finish_reason == "cancelled"
    assert len(tokens_of(events)) < 1500
    assert any(isinstance(event, Proved) for event in events)
    await wait_until(lambda: server.load.idle)


async def test_a_client_that_disconnects_stops_the_engine_of_the_peer(pair: list[PoolNode]) -> None:
    asker, server = pair
    began = asyncio.Event()

    def watch(run: LegRun, events: list[Event]) -> None:
        if isinstance(events[-1], Output):
            began.set()

    asking = asyncio.create_task(asker.serve(ChoiceRecord(asker.job(max_tokens=1900)), watch))
    await began.wait()
    asking.cancel()
    await asyncio.wait([asking])
    await wait_until(lambda: server.load.idle)
    (engine,) = server.placement.engines
    await wait_until(lambda: engine.load.running == 0)


async def test_another_serves_if_one_has_no_room() -> None:
    async with pools(asker=config(), full=config(f"{FAKE}=2"), other=config(f"{FAKE}=2")) as nodes:
        asker, full, other = nodes
        full.serves(max_parallel=0)
        for _ in range(4):
            events = await asker.ask()
            assert isinstance(events[0], Started) and events[0].node_id == other.node_id
        assert asker.pool.reputation.score(full.node_id) == 1.0  # it may say no


async def test_more_requests_than_a_peer_takes_at_a_time_wait_for_each_other() -> None:
    """As they do for an engine here."""
    async with pools(asker=config(), server=config(f"{FAKE}=2")) as (asker, server):
        server.serves(max_parallel=2)
        asks = [asker.ask(request_id=f"req_{n:026}") for n in range(5)]
        for events in await asyncio.gather(*asks):
            assert len(tokens_of(events)) == 20


@pytest.mark.parametrize(
    ("policy", "why"),
    [
        ({"max_parallel": 0}, "0 requests at a time"),
        ({"models": ("other*",)}, "does not serve"),
        ({"blocked": "it does not pay"}, "it does not pay"),
        ({"hours": "00:00-00:00"}, "00:00-00:00"),
        ({"tokens_per_minute": 1}, None),
        ({"credit_limit": "0.000000005", "beyond": "refuse"}, "settle"),
        ({"credit_limit": "0.000000005", "beyond": "idle"}, None),
    ],
    ids=str,
)
async def test_a_peer_is_refused_by_each_of_its_limits(
    pair: list[PoolNode], policy: dict[str, object], why: str | None
) -> None:
    asker, server = pair
    server.serves(**policy)
    server.books.owed = 5
    if why is None:
        await asker.ask()
    else:
        with pytest.raises(NoNodesAvailable, match=why):
            await asker.ask()


async def test_tokens_in_any_minute(pair: list[PoolNode]) -> None:
    asker, server = pair
    server.serves(tokens_per_minute=60)
    await asker.ask()
    with pytest.raises(NoNodesAvailable, match="60 tokens per minute"):
        await asker.ask()


async def test_credit_is_for_who_is_not_idle(pair: list[PoolNode]) -> None:
    asker, server = pair
    server.serves(credit_limit="0.000000005")
    server.books.owed = 5
    with server.load.taken(FAKE), pytest.raises(NoNodesAvailable, match="settle"):
        await asker.ask()


async def test_a_file_of_another_digest_is_another_model(pair: list[PoolNode]) -> None:
    asker, _ = pair
    job = asker.job()
    other = replace(job.model, recorded_digest="1" * 64)
    with pytest.raises(NoNodesAvailable, match="another file"):
        await asker.serve(ChoiceRecord(replace(job, model=other)))
    with pytest.raises(ModelNotFound):
        asker.pool.candidates.find("unknown:1")


async def test_a_replaced_file_is_served_once_it_is_loaded(pair: list[PoolNode]) -> None:
    """Until then its engine serves the old one: a peer that wants the new one is refused, and has
    not been lied to, and a request that began with the old one goes on here."""
    asker, server = pair
    old = replace(server.catalog.find(FAKE), recorded_digest="1" * 64)
    server.placement.release(await server.placement.acquire(old))
    with pytest.raises(NoNodesAvailable, match="another file here"):
        await asker.ask()
    assert asker.pool.reputation.score(server.node_id) == 1
    started, *_ = await server.ask(digest=old.recorded_digest)
    assert isinstance(started, Started) and started.model_digest == old.recorded_digest


async def test_a_file_that_is_replaced_while_it_is_loaded_is_not_served_as_the_other(
    pair: list[PoolNode], monkeypatch: pytest.MonkeyPatch
) -> None:
    asker, server = pair
    acquire = server.placement.acquire

    async def replaced(model: Model, beginning: Any = ()) -> EngineProcess:
        return await acquire(replace(model, recorded_digest="1" * 64), beginning)

    monkeypatch.setattr(server.placement, "acquire", replaced)
    with pytest.raises(NoNodesAvailable, match="another file here"):
        await asker.ask()
    assert asker.pool.reputation.score(server.node_id) == 1
    assert server.kept == []


async def test_a_file_that_is_gone_is_served_while_it_is_loaded(
    pair: list[PoolNode], caplog: pytest.LogCaptureFixture
) -> None:
    _, server = pair
    server.placement.release(await server.placement.acquire(server.catalog.find(FAKE)))
    unreadable = replace(server.catalog.find(FAKE), recorded_digest="")
    catalog = server.catalog.with_models([unreadable])
    server.settings.current = replace(server.settings.current, catalog=catalog)
    for node in pair:
        assert isinstance((await node.ask())[0], Started)
    await server.placement.close()
    for node in pair:
        with pytest.raises(NoNodesAvailable, match="cannot be read: No such file") as refused:
            await node.ask()
        assert "Errno" not in refused.value.message
    assert not [one for one in caplog.records if one.exc_info]


async def test_a_key_for_this_box_only(pair: list[PoolNode]) -> None:
    asker, _ = pair
    with pytest.raises(NoNodesAvailable, match="this box only"):
        await asker.ask(local_only=True)
    with pytest.raises(NoNodesAvailable, match="peers that the key allows"):
        await asker.ask(peers=("somebody",))
    await asker.ask(peers=("server",))


# -- failures --------------------------------------------------------------------------------------


async def test_before_the_first_token_the_next_is_asked() -> None:
    """Also if the first has the request already and then hangs."""
    async with pools(asker=config(), one=config(f"{FAKE}=2"), two=config(f"{FAKE}=2")) as nodes:
        asker, *servers = nodes
        for _ in range(6):
            for server in servers:
                await asker.ask(peers=(server.name,))  # links and engines are there
        for server in servers[:1]:
            (engine,) = server.placement.engines
            os.kill(engine.pid, signal.SIGKILL)
            server.placement._failures.clear()
            server.serves(blocked="it is broken")
        events = await asker.ask()
        assert isinstance(events[0], Started) and events[0].node_id == servers[1].node_id
        assert len([one for one in events if isinstance(one, Started)]) == 1


async def test_a_box_that_failed_recently_is_asked_when_there_is_no_other(
    pair: list[PoolNode],
) -> None:
    """If its link stands: to call a box that is gone would take the client's time."""
    asker, server = pair
    asker.pool.boxes.breaker.failed(server.node_id)
    await asker.ask()
    asker.pool.boxes.breaker.failed(server.node_id)
    server.gone = True
    with pytest.raises(NoNodesAvailable, match="left alone"):
        await asker.ask()


async def test_a_model_of_peers_that_fell_silent_is_not_unknown(pair: list[PoolNode]) -> None:
    asker, server = pair
    await asker.ask()
    server.silent = True
    with pytest.raises(NoNodesAvailable, match="no box offers it") as caught:
        await asker.ask()
    assert caught.value.retry_after
    assert asker.pool.candidates.remote_models() == []


async def test_a_peer_that_is_lost_before_the_first_token_is_no_reason_for_more_legs() -> None:
    """The error is not one after which `requests` asks again: all have been asked."""
    async with pools(asker=config(), server=config(f"{FAKE}=2")) as (asker, server):
        await asker.ask()
        await server.transport.close()
        with pytest.raises(NoNodesAvailable, match="nobody else") as caught:
            await asker.ask()
        assert not isinstance(caught.value, EngineLost)


async def test_log_probabilities_of_held_back_text_are_not_lost_at_a_seam(
    pair: list[PoolNode],
) -> None:
    """Text that may be the beginning of a stop string waits, and they with it."""
    asker, _ = pair
    job = asker.job(max_tokens=60, logprobs=2, stop=["fox jumps high", "lazy dog?"])
    whole = await asker.serve(ChoiceRecord(job))
    held = 0
    for end in range(3, len(whole), 2):  # a leg is lost after so many pieces of the output
        # Of another request each time, for a leg is served once.
        choice = ChoiceRecord(replace(job, request_id=f"req_{ULID()}".lower()))
        for event in whole[:end]:
            if isinstance(event, Started):
                choice.begin(LegRecord(choice.job, event))
            else:
                choice.legs[-1].take(event)
        held += choice.unsaid > 0
        events = [*whole[:end], *await asker.serve(choice)]
        assert text_of(events) == text_of(whole) and tokens_of(events) == tokens_of(whole)
        assert logprobs_of(events) == logprobs_of(whole)
    assert held > 2


async def test_before_a_request_leaves_others_are_asked_who_is_busy() -> None:
    """Its advert says that the first is free; those that are linked with it know better."""
    config_ = config(f"{FAKE}=1")
    async with pools(asker=config(), full=config_, free=config_) as (asker, full, free):

        def looked() -> None:
            now = time.monotonic()
            full.told = {FAKE: ReportedLoad(ModelLoad(0, 0, 9), now)}
            free.told = {FAKE: ReportedLoad(ModelLoad(4, 4096, 0), now)}

        asker.links.looked = looked
        for number in range(8):
            full.told = free.told = {}
            events = await asker.ask(text=f"{PROMPT} {number}")
            assert isinstance(events[0], Started) and events[0].node_id == free.node_id
        assert asker.links.looks == 8
        await asker.ask(text="Nobody need be asked: both are known.")
        assert asker.links.looks == 8


async def test_requests_that_come_together_see_where_the_others_went() -> None:
    """Else they would all take the same place that is free."""
    two = config(f"{FAKE}=20", engine={"max_sequences": 2})
    async with pools(here=two, one=two, other=two) as nodes:
        here, *peers = nodes
        for node in nodes:  # its model is loaded
            await node.ask(max_tokens=1, local_only=True)
        heard = ReportedLoad(ModelLoad(2, 4096, 0), time.monotonic())
        for peer in peers:
            peer.told = {FAKE: heard}
        for count in (6, 12):  # none of them waits, and half of them do
            asks = [here.ask(text=f"{PROMPT} {n}", max_tokens=5) for n in range(count)]
            began = [events[0] for events in await asyncio.gather(*asks)]
            went = Counter(one.node_id for one in began if isinstance(one, Started))
            assert went.total() == count
            assert all(2 <= went[node.node_id] <= count / 2 - 1 for node in nodes)


async def test_places_are_given_back_however_a_request_ends() -> None:
    """Answered, refused for its own fault, left by its client early or late, its peer lost."""
    one = config(f"{FAKE}=20", engine={"max_sequences": 1})
    async with pools(here=one, peer=one) as (here, peer):
        for node in (here, peer):
            await node.ask(max_tokens=1, local_only=True)
        peer.told = {FAKE: ReportedLoad(ModelLoad(1, 4096, 0), time.monotonic())}

        def idle() -> bool:
            found = here.pool.candidates.of(here.job(), "")
            return here.load.idle and not any(candidate.sent for candidate in found)

        assert await asyncio.gather(here.ask(text="a"), here.ask(text="b"))
        assert idle()
        with pytest.raises(ContextOverflow):
            await here.ask(text="x" * 3000)
        assert idle()
        for seconds in (0, 0.01, 0.2):
            asking = [asyncio.create_task(here.ask(text=f"{seconds} {n}")) for n in range(2)]
            await asyncio.sleep(seconds)
            for task in asking:
                task.cancel()
            await asyncio.wait(asking)
            await wait_until(idle)
        asking = [asyncio.create_task(here.ask(text=f"lost {n}")) for n in range(2)]
        await wait_until(lambda: not peer.load.idle)
        for engine in peer.placement.engines:
            os.kill(engine.pid, signal.SIGKILL)
        await asyncio.wait(asking)
        assert idle()


async def test_hedging_asks_a_second_box() -> None:
    slow = config(f"{FAKE}=1500")
    async with pools(asker=config(hedge_ms=200), slow=slow, fast=config(f"{FAKE}=2")) as (
        asker,
        slow_node,
        fast_node,
    ):
        for node in (slow_node, fast_node):
            await node.ask(max_tokens=1, local_only=True)
        slow_node.load._ttft.clear()  # nobody knows how slow it is
        for number in range(6):  # one of them goes to the slow one first, almost surely
            events = await asker.ask(text=f"{number} {'x' * number}", max_tokens=5)
            assert isinstance(events[0], Started) and events[0].node_id == fast_node.node_id
        await wait_until(lambda: slow_node.load.idle)
        # What the slow one had computed until it was told to stop is owed to it, and accepted.
        served = [one for one in slow_node.kept if one.served_by_us]
        assert served and all(one.acceptance for one in served)
        proofs = [msgspec.json.decode(one.proof, type=Proof) for one in served]
        assert {proof.finish_reason for proof in proofs} == {"cancelled"}
        owed = {one.proof for one in asker.kept if one.peer == slow_node.node_id}
        assert owed == {one.proof for one in served}


def all_busy(nodes: list[PoolNode]) -> bool:
    return all(not node.load.idle for node in nodes)


async def test_hedging_when_a_box_is_lost() -> None:
    """Whichever of the two it is, and whether the other one has spoken or not."""
    slow = config(f"{FAKE}=1500")
    async with pools(asker=config(hedge_ms=100), one=slow, two=slow) as (asker, *servers):
        for server in servers:
            await asker.ask(peers=(server.name,), max_tokens=1)
        for lost, asked in itertools.product(servers, (servers, servers[:1])):
            asking = asyncio.create_task(asker.ask(max_tokens=1))
            await wait_until(partial(all_busy, asked))
            for engine in lost.placement.engines:
                os.kill(engine.pid, signal.SIGKILL)
            events = await asking
            assert len([one for one in events if isinstance(one, Started)]) == 1
            assert len(tokens_of(events)) == 1
            await wait_until(lambda: all(one.load.idle for one in servers))
            for server in servers:
                server.placement._failures.clear()
                asker.pool.boxes.breaker.served(server.node_id)


async def test_after_a_lost_engine_another_leg_goes_on_without_a_seam(pair: list[PoolNode]) -> None:
    asker, server = pair
    choice = ChoiceRecord(asker.job(max_tokens=60))

    def kill(run: LegRun, events: list[Event]) -> None:
        if len(tokens_of(events)) == 10 and isinstance(events[-1], Output):
            (engine,) = server.placement.engines
            os.kill(engine.pid, signal.SIGKILL)

    events = await asker.serve(choice, kill)
    first, second = choice.legs
    assert choice.lost == (server.node_id,)
    assert first.finish_reason == "engine_lost" and second.finish_reason == "length"
    assert len(first.tokens) >= 10 and second.job.output == first.tokens
    assert text_of(events) == choice.text == told(first.prompt or [], 60)
