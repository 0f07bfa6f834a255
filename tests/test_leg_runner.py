"""Which box serves a leg, who is asked beside it, who goes on after it: boxes that follow a script.

Of the boxes here the own one is the dearest, and `peer-1` is cheaper than `peer-2`; all have room.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from pinaivu_box.engine.messages import SamplingParams
from pinaivu_box.errors import (
    ContextOverflow,
    EngineLost,
    InvalidBody,
    NoNodesAvailable,
    PeerFaulty,
    RateLimited,
)
from pinaivu_box.gateway.backend import Event
from pinaivu_box.gateway.request import Finished
from tests.support.scripted_boxes import (
    PROMPT,
    TEXT,
    Listener,
    Network,
    Script,
    ScriptedBox,
    ScriptedLeg,
    answer,
    busy,
    lost,
    never_retry,
    refuse,
    set_patience,
    silent,
)
from tests.support.waiting import DEADLINE

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def own(*scripts: Script) -> ScriptedBox:
    return ScriptedBox(9, *scripts, peer=False)


def peer(number: int, *scripts: Script) -> ScriptedBox:
    return ScriptedBox(number, *scripts)


async def whole(listener: Listener, tokens: int = 12) -> None:
    """It ends well, and nothing of its text is missing, doubled or out of order."""
    assert isinstance(await listener.end(), Finished), listener.heard[-1]
    assert listener.text() == TEXT[:tokens]
    assert bytes(listener.tokens).decode() == TEXT[:tokens]


def served_by(network: Network) -> list[str]:
    """The boxes of the legs in the only receipt, in their order."""
    ((account, _),) = network.ledger.recorded
    return [leg.started.node_id for leg in account.served]


# -- before the first output -----------------------------------------------------------------------


async def test_the_cheapest_box_serves_and_the_receipt_says_why() -> None:
    first, second = peer(1), peer(2)
    network = Network(own(), second, first)
    await whole(network.ask())
    assert served_by(network) == [first.node_id] and second.legs == []
    ((account, _),) = network.ledger.recorded
    (leg,) = account.served
    assert leg.route is not None
    assert leg.route["chosen"] == first.node_id and leg.header


@pytest.mark.parametrize(
    "error",
    [
        busy,
        lambda: RateLimited("Enough for this minute."),
        lambda: EngineLost("It is gone.", node_id="node_x"),
        lambda: PeerFaulty("It broke the rules.", node_id="node_x"),
        lambda: InvalidBody("It finds fault with the request."),
    ],
    ids=["busy", "limited", "lost", "faulty", "fault"],
)
async def test_a_box_that_refuses_is_replaced_before_the_first_output(error: object) -> None:
    first, second = peer(1, refuse(error)), peer(2)  # type: ignore[arg-type]
    network = Network(None, first, second)
    await whole(network.ask())
    assert served_by(network) == [second.node_id]
    assert (len(first.legs), len(second.legs)) == (1, 1)
    assert second.legs[0].job.leg == 0 and second.legs[0].output == []


async def test_a_leg_without_tokens_is_replaced_and_leaves_no_proof() -> None:
    first, second = peer(1, answer(until=0, error=lost)), peer(2)
    network = Network(None, first, second)
    await whole(network.ask())
    assert served_by(network) == [second.node_id]


async def test_an_error_of_the_request_that_this_box_finds_is_final() -> None:
    here, other = own(refuse(lambda: ContextOverflow("Too long."))), peer(1)
    network = Network(here, other, policy="prefer-local")
    listener = network.ask()
    await listener.end()
    assert isinstance(listener.error, ContextOverflow) and other.legs == []


async def test_an_error_of_the_request_that_a_peer_finds_is_final_once_a_second_confirms_it() -> (
    None
):
    boxes = [peer(n, refuse(lambda: ContextOverflow("Too long."))) for n in (1, 2, 3)]
    network = Network(None, *boxes)
    listener = network.ask()
    await listener.end()
    assert isinstance(listener.error, ContextOverflow)
    assert [len(box.legs) for box in boxes] == [1, 1, 0]


async def test_a_box_that_refused_recently_is_not_asked_by_the_next_request() -> None:
    first, second = peer(1, refuse(busy), answer()), peer(2)
    network = Network(None, first, second)
    await whole(network.ask())
    await whole(network.ask())
    assert (len(first.legs), len(second.legs)) == (1, 2)
    assert network.reputation.score(first.node_id) == 1.0  # it may say no


async def test_a_lost_box_loses_reputation_and_is_not_asked() -> None:
    first, second = peer(1, answer(until=0, error=lost), answer()), peer(2)
    network = Network(None, first, second)
    await whole(network.ask())
    assert network.reputation.score(first.node_id) < 1.0
    await whole(network.ask())
    assert (len(first.legs), len(second.legs)) == (1, 2)


async def test_a_box_is_asked_once_for_an_answer_that_has_not_begun() -> None:
    """All have been asked: the loss of the last one is no reason for another leg."""
    boxes = [peer(n, answer(until=0, error=lost)) for n in (1, 2)]
    network = Network(None, *boxes)
    listener = network.ask()
    await listener.end()
    assert [len(box.legs) for box in boxes] == [1, 1]
    assert type(listener.error) is NoNodesAvailable
    assert "nobody else" in listener.error.message and network.ledger.recorded == []


async def test_an_engine_here_that_dies_is_started_anew_if_nobody_else_serves() -> None:
    here = own(answer(until=0, error=lost), answer())
    network = Network(here, peer(1, refuse(busy)))
    await whole(network.ask())
    assert len(here.legs) == 2


async def test_a_key_for_this_box_only_is_never_served_elsewhere() -> None:
    here, other = own(), peer(1)
    network = Network(here, other)
    await whole(network.ask(network.job(local_only=True)))
    assert len(here.legs) == 1 and other.legs == []


async def test_a_box_is_free_again_however_its_leg_has_ended() -> None:
    scripts = [answer(), refuse(busy), answer(until=3, error=lost), answer(until=0, error=lost)]
    box = own(*scripts, *3 * [answer()])
    network = Network(box)
    for _ in range(3):
        await network.ask().end()
        assert network.load.idle
    held = network.ask()
    held.request.cancel()
    await held.running
    assert network.load.idle


# -- hedging ---------------------------------------------------------------------------------------


async def test_a_second_box_is_asked_if_the_first_says_nothing_in_time() -> None:
    first, second = peer(1, silent()), peer(2)
    network = Network(None, first, second, hedge=0.05)
    await whole(network.ask())
    assert served_by(network) == [second.node_id]
    async with asyncio.timeout(DEADLINE):
        await first.legs[0].cancelled.wait()
        await first.legs[0].ended.wait()  # it was heard out: what it has computed is owed to it
    assert network.candidates.of(network.job(), "")[0].sent == 0


async def test_the_first_box_to_answer_serves_also_if_it_was_asked_first() -> None:
    said, second_asked = asyncio.Event(), asyncio.Event()

    async def asked(leg: ScriptedLeg) -> AsyncIterator[Event]:
        second_asked.set()
        async for event in silent()(leg):
            yield event

    first, second = peer(1, answer(before=said)), peer(2, asked)
    network = Network(None, first, second, hedge=0.05)
    listener = network.ask()
    await second_asked.wait()
    said.set()
    await whole(listener)
    assert served_by(network) == [first.node_id]
    async with asyncio.timeout(DEADLINE):
        await second.legs[0].ended.wait()
    assert second.legs[0].cancelled.is_set()


async def test_hedging_works_without_a_second_box() -> None:
    go_on = asyncio.Event()
    first = peer(1, answer(until=0, hold=go_on))
    network = Network(None, first, hedge=0.02)
    listener = network.ask()
    await first.asked()
    await asyncio.sleep(0.1)
    go_on.set()
    await whole(listener)
    assert len(first.legs) == 1


async def test_if_the_second_box_fails_the_first_serves_all_the_same() -> None:
    go_on = asyncio.Event()

    async def refuses(leg: ScriptedLeg) -> AsyncIterator[Event]:
        go_on.set()
        raise busy()
        yield

    first, second = peer(1, answer(until=0, hold=go_on)), peer(2, refuses)
    network = Network(None, first, second, hedge=0.03)
    await whole(network.ask())
    assert served_by(network) == [first.node_id]


async def test_a_cancellation_reaches_both_boxes_of_a_hedge() -> None:
    first, second = peer(1, silent()), peer(2, silent())
    network = Network(None, first, second, hedge=0.02)
    listener = network.ask()
    await second.asked()
    listener.request.cancel()
    await listener.running
    async with asyncio.timeout(DEADLINE):
        for box in (first, second):
            await box.legs[0].ended.wait()
    assert all(box.legs[0].cancelled.is_set() for box in (first, second))
    assert listener.tokens == [] and listener.request.status == 499


async def test_a_cancellation_that_comes_while_a_box_is_looked_for_starts_none_that_goes_on() -> (
    None
):
    box = peer(1)
    network = Network(None, box)
    listener = network.ask()
    await asyncio.sleep(0)
    listener.request.cancel()
    await listener.running
    assert listener.request.status == 499
    assert listener.tokens == [] and all(leg.cancelled.is_set() for leg in box.legs)


# -- after the first output ------------------------------------------------------------------------


async def test_another_box_goes_on_where_one_was_lost() -> None:
    first, second = peer(1, answer(until=5, error=lost)), peer(2)
    network = Network(None, first, second)
    asked = network.job(sampling=SamplingParams(seed=3))
    await whole(network.ask(asked))
    assert served_by(network) == [first.node_id, second.node_id]
    leg = second.legs[0]
    assert (leg.job.leg, leg.output) == (1, list(TEXT[:5].encode()))
    assert leg.job.drawn_with is not None and leg.job.drawn_with.seed == 3
    assert leg.job.prompt_tokens == PROMPT and leg.job.nonce == asked.nonce
    assert network.reputation.score(first.node_id) < 1.0


async def test_a_box_that_has_lost_one_leg_is_asked_last_for_the_next() -> None:
    first, second, third = peer(1, answer(until=5, error=lost)), peer(2, refuse(busy)), peer(3)
    network = Network(None, first, second, third)
    await whole(network.ask())
    assert served_by(network) == [first.node_id, third.node_id] and len(first.legs) == 1


async def test_a_begun_answer_waits_for_a_box_that_appears(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is told of it, and does not look time and again."""
    first, second = peer(1, answer(until=5, error=lost)), peer(2)
    second.offers = False
    network = Network(None, first, second)
    never_retry(monkeypatch, network)
    listener = network.ask()
    await listener.hear(5)
    await asyncio.sleep(0.1)
    second.offers = True
    network.changed()
    async with asyncio.timeout(10):  # which is less than its patience
        await whole(listener)
    assert served_by(network) == [first.node_id, second.node_id]


async def test_a_begun_answer_waits_for_the_same_box_to_come_back() -> None:
    box = peer(1, answer(until=5, error=lost), refuse(lambda: lost(box.legs[0])), answer())
    network = Network(None, box)
    await whole(network.ask())
    assert served_by(network) == [box.node_id] * 2 and len(box.legs) == 3


async def test_a_begun_answer_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    set_patience(monkeypatch, 0.3)
    box = peer(1, answer(until=5, error=lost), refuse(busy))
    network = Network(None, box)
    listener = network.ask()
    await listener.end()
    assert type(listener.error) is NoNodesAvailable and listener.text() == TEXT[:5]
    ((account, reason),) = network.ledger.recorded
    assert (account.completion_tokens, reason) == (5, "error")


async def test_an_answer_that_has_not_begun_does_not_wait() -> None:
    box = peer(1)
    box.offers = False
    network = Network(None, box)
    began = time.monotonic()
    listener = network.ask()
    await listener.end()
    assert isinstance(listener.error, NoNodesAvailable) and listener.error.retry_after
    assert time.monotonic() - began < 10  # which is less than the patience of one that has


async def test_a_cancellation_ends_the_wait_for_a_box() -> None:
    box = peer(1, answer(until=5, error=lost), refuse(busy))
    network = Network(None, box)
    listener = network.ask()
    await listener.hear(5)
    await asyncio.sleep(0.05)
    listener.request.cancel()
    async with asyncio.timeout(DEADLINE):
        await listener.running
    ((account, reason),) = network.ledger.recorded
    assert (account.completion_tokens, reason) == (5, "cancelled")


async def test_legs_come_to_an_end() -> None:
    """Boxes that are lost with every leg are not asked for ever."""

    async def one_token(leg: ScriptedLeg) -> AsyncIterator[Event]:
        async for event in answer(until=len(leg.output) + 1, error=lost)(leg):
            yield event

    boxes = [peer(n, one_token) for n in range(1, 11)]
    network = Network(None, *boxes)
    listener = network.ask(network.job(max_tokens=60))
    await listener.end()
    assert isinstance(listener.error, EngineLost)
    assert [len(box.legs) for box in boxes] == [1] * 8 + [0] * 2
    ((account, reason),) = network.ledger.recorded
    assert (len(account.served), account.completion_tokens, reason) == (8, 8, "error")


# -- requests of ours that meet --------------------------------------------------------------------


async def test_a_request_waits_for_a_peer_that_is_full_of_our_requests() -> None:
    go_on = asyncio.Event()
    box = peer(1, answer(until=3, hold=go_on), refuse(busy), answer())
    network = Network(None, box)
    first = network.ask()
    await first.hear(3)
    second = network.ask()
    await box.asked(legs=2)
    await asyncio.sleep(0.1)
    assert not second.running.done()
    go_on.set()
    await whole(first)
    await whole(second)


async def test_of_choices_at_one_peer_the_first_pays_for_their_prompt() -> None:
    box = peer(1)
    network = Network(None, box)
    first = network.job()
    listener = network.ask(first, replace(first, choice=1), replace(first, choice=2))
    assert isinstance(await listener.end(), Finished)
    assert sorted(leg.job.choice for leg in box.legs) == [0, 1, 2]
    assert [leg.pays_prompt for leg in box.legs] == [True, False, False]


async def test_if_who_pays_for_the_prompt_gets_no_proof_the_next_leg_pays() -> None:
    box, other = peer(1, answer(until=3, error=lost), answer()), peer(2, refuse(busy))
    network = Network(None, box, other)
    await whole(network.ask())
    assert [leg.pays_prompt for leg in box.legs] == [True, True]


async def test_all_legs_of_a_request_are_of_one_file() -> None:
    first, second = peer(1, answer(until=5, error=lost)), peer(2)
    network = Network(None, first, second)
    await whole(network.ask())
    assert second.legs[0].job.digest == "d" * 64
