"""The life of a request, from its admission to its receipt, on boxes that follow a script."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest

from pinaivu_box.config import Config, EngineConfig, PricingConfig
from pinaivu_box.engine.messages import SamplingParams, Tokenized
from pinaivu_box.errors import (
    BudgetExceeded,
    InvalidBody,
    NoNodesAvailable,
    RateLimited,
    TooLate,
    Unauthorized,
)
from pinaivu_box.gateway.admission import Admission
from pinaivu_box.gateway.backend import Job
from pinaivu_box.gateway.metering import Meter
from pinaivu_box.gateway.request import Failed, Finished, Request, RunningRequests
from pinaivu_box.policy import Budget, Policy
from pinaivu_box.settings import BoxSettings, LiveSettings
from pinaivu_box.store import accounts
from pinaivu_box.store.audit import Actor
from pinaivu_box.store.database import Database
from pinaivu_box.store.keys import Key
from pinaivu_box.store.new_keys import Draft, create
from tests.support.scripted_boxes import (
    OWN,
    PROMPT,
    TEXT,
    Ledger,
    Listener,
    Network,
    ScriptedBox,
    admitted,
    alone,
    answer,
    job,
    lost,
    refuse,
    silent,
)

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def settings(**sections: Any) -> LiveSettings:
    return LiveSettings(BoxSettings(Config(**sections)))


class Books:
    """A database with a key, and what stands in its file for another reader."""

    def __init__(self, database: Database, key: Key, path: Path) -> None:
        self.database, self.key, self.path = database, key, path
        self.meter = Meter(OWN, database, settings())

    def receipts(self) -> dict[str, dict[str, Any]]:
        """As they are on disk now, by request."""
        with sqlite3.connect(f"file:{self.path}?mode=ro", uri=True) as connection:
            rows = connection.execute("SELECT request_id, signed FROM receipts").fetchall()
        return {name: msgspec.json.decode(signed) for name, signed in rows}

    def proofs(self, request_id: str) -> list[dict[str, Any]]:
        proofs = self.receipts()[request_id]["proofs"]
        return [msgspec.json.decode(one["signed"]) for one in proofs]


@pytest.fixture
async def books(tmp_path: Path) -> AsyncIterator[Books]:
    path = tmp_path / "pinaivu.db"
    database = Database(path)
    await database.open()
    try:
        yield Books(database, await new_key(database), path)
    finally:
        await database.close()


async def new_key(database: Database, **policy: Any) -> Key:
    draft = Draft("one", accounts.OWNER, Policy(**policy))
    key, _ = await create(database, draft, Actor("test", "local"))
    return key


def start(box: ScriptedBox, *jobs: Job, meter: Any = None, **more: Any) -> Listener:
    """On a box without peers."""
    taken = admitted(*(jobs or [job()]), **more)
    return Listener(Request(taken, alone(box), cast(Any, meter or Ledger())))


def own(*scripts: Any) -> ScriptedBox:
    return ScriptedBox(0, *scripts, peer=False)


# -- the receipt -----------------------------------------------------------------------------------


async def test_the_receipt_is_on_disk_before_the_last_event(books: Books) -> None:
    asked = job()
    listener = start(own(), asked, meter=books.meter, key=books.key)
    on_disk: list[tuple[Any, bool]] = []
    put = listener.request.events.put

    def spy(event: Any) -> None:
        on_disk.append((event, asked.request_id in books.receipts()))
        put(event)

    listener.request.events.put = spy  # type: ignore[method-assign, assignment]
    end = await listener.end()
    assert end == Finished("length", len(PROMPT), 12, 0)
    assert listener.text() == TEXT[:12]
    *before, (last, written) = on_disk
    assert isinstance(last, Finished) and written
    assert before and not any(found for _, found in before)
    (proof,) = books.proofs(asked.request_id)
    assert proof["completion_tokens"] == 12 and proof["sampling"]["seed"] == "11"


async def test_a_client_that_leaves_gets_a_receipt_of_what_was_made(books: Books) -> None:
    asked = job(max_tokens=40)
    box = own(answer(until=20, hold=asyncio.Event()))
    listener = start(box, asked, meter=books.meter, key=books.key)
    await listener.hear(20)
    listener.request.cancel()  # and nobody listens any more
    end = await listener.running
    assert end == Finished("cancelled", len(PROMPT), 20, 0)
    assert listener.request.status == 499
    assert books.receipts()[asked.request_id]["finish_reason"] == "cancelled"
    assert books.proofs(asked.request_id)[0]["completion_tokens"] == 20


async def test_a_client_that_leaves_while_the_receipt_is_written_finds_it(books: Books) -> None:
    asked = job()
    settling, go_on = asyncio.Event(), asyncio.Event()

    class Slow:
        node_id = OWN.node_id

        async def record(self, *account: Any) -> None:
            settling.set()
            await go_on.wait()
            await books.meter.record(*account)

    listener = start(own(), asked, meter=Slow(), key=books.key)
    await settling.wait()
    listener.request.cancel()
    go_on.set()
    assert isinstance(await listener.running, Finished)
    assert asked.request_id in books.receipts()


async def test_tokens_made_before_a_failure_are_recorded(books: Books) -> None:
    """An engine that dies with every leg ends the request, and the tokens that were sent count."""
    asked = job()
    box = own(*(answer(until=at, error=lost) for at in (3, 5, 6)), answer())
    listener = start(box, asked, meter=books.meter, key=books.key)
    await listener.end()
    assert listener.error.status == 503 and len(box.legs) == 3
    assert listener.text() == TEXT[:6]
    assert books.receipts()[asked.request_id]["finish_reason"] == "error"
    assert [proof["completion_tokens"] for proof in books.proofs(asked.request_id)] == [3, 2, 1]


async def test_a_failure_before_the_first_token_leaves_no_receipt(books: Books) -> None:
    asked = job()
    box = own(refuse(lambda: NoNodesAvailable("It does not start.")))
    listener = start(box, asked, meter=books.meter, key=books.key)
    await listener.end()
    assert listener.error.message == "It does not start." and len(box.legs) == 1
    assert books.receipts() == {}


async def test_a_reservation_ends_however_the_request_ends() -> None:
    ended: list[tuple[int, int]] = []

    def end(tokens: int, cost: int) -> None:
        ended.append((tokens, cost))

    class Broken:
        node_id = OWN.node_id

        async def record(self, *_: Any) -> None:
            raise RuntimeError("a mistake of ours")

    await start(own(), end=end).end()
    await start(own(refuse(lambda: InvalidBody("No."))), end=end).end()
    failed = start(own(), end=end, meter=Broken())
    await failed.end()
    assert failed.error.status == 500
    assert ended == [(len(PROMPT) + 12, 0), (0, 0), (len(PROMPT) + 12, 0)]


# -- legs ------------------------------------------------------------------------------------------


async def test_a_second_leg_goes_on_with_the_same_seed_and_position(books: Books) -> None:
    asked = job(sampling=SamplingParams(seed=5))
    box = own(answer(until=7, error=lost), answer())
    listener = start(box, asked, meter=books.meter, key=books.key)
    assert await listener.end() == Finished("length", len(PROMPT), 12, 0)
    assert listener.text() == TEXT[:12]
    first, second = box.legs
    assert (first.job.leg, first.output, first.job.drawn_with) == (0, [], None)
    assert (second.job.leg, second.output) == (1, list(TEXT[:7].encode()))
    assert second.job.drawn_with is not None and second.job.drawn_with.seed == 5
    assert second.job.prompt_tokens == PROMPT and second.job.digest is not None
    assert first.job.nonce == second.job.nonce  # one commitment to the prompt
    proofs = books.proofs(asked.request_id)
    assert [(one["leg"], one["completion_tokens"]) for one in proofs] == [(0, 7), (1, 5)]
    assert [one["finish_reason"] for one in proofs] == ["engine_lost", "length"]
    assert proofs[0]["sampling"] == proofs[1]["sampling"]


async def test_an_engine_that_dies_before_it_says_anything_is_asked_again() -> None:
    box = own(refuse(lambda: lost(box.legs[0])), answer())
    listener = start(box)
    assert isinstance(await listener.end(), Finished)
    assert listener.text() == TEXT[:12] and len(box.legs) == 2
    assert box.legs[1].job.leg == 0  # there was none before that has a proof


async def test_choices_run_side_by_side_and_share_a_prompt() -> None:
    first = job()
    box, ledger = own(), Ledger()
    listener = start(
        box, first, replace(first, choice=1, sampling=SamplingParams(seed=12)), meter=ledger
    )
    assert await listener.end() == Finished("length", len(PROMPT), 24, 0)
    assert [listener.text(choice) for choice in (0, 1)] == [TEXT[:12]] * 2
    ((account, reason),) = ledger.recorded
    assert reason == "length" and account.prompt_tokens == len(PROMPT)


async def test_a_choice_that_fails_ends_the_others() -> None:
    first = job(max_tokens=100)
    held = answer(until=3, hold=asyncio.Event())
    box = own(held, answer(until=5, error=lambda _: InvalidBody("No.")))
    listener = start(box, first, replace(first, choice=1))
    await listener.end()
    assert listener.error.message == "No."
    assert box.legs[0].cancelled.is_set() and box.legs[0].ended.is_set()


# -- cancellation ----------------------------------------------------------------------------------


async def test_a_cancellation_before_the_leg_has_begun_reaches_it() -> None:
    """The engine is still being started, or the peer called: no token is made."""
    loaded, ledger = asyncio.Event(), Ledger()
    box = own(answer(before=loaded))
    listener = start(box, meter=ledger)
    await box.asked()
    listener.request.cancel()
    loaded.set()
    await listener.running
    assert box.legs[0].cancelled.is_set() and box.legs[0].ended.is_set()
    assert listener.request.status == 499
    assert listener.tokens == [] and ledger.recorded == []


async def test_a_request_that_waits_for_its_key_s_turn_is_cancelled_at_once() -> None:
    box = own()
    listener = start(box, turn=False)
    await asyncio.sleep(0)
    listener.request.cancel()
    assert isinstance(await listener.running, Failed)
    assert listener.request.status == 499 and box.legs == []


async def test_a_cancellation_reaches_all_choices_and_no_leg_follows() -> None:
    first = job(max_tokens=100)
    box = own(answer(until=5, hold=asyncio.Event()))
    listener = start(box, first, replace(first, choice=1))
    await listener.hear(10)
    listener.request.cancel()
    assert await listener.running == Finished("cancelled", len(PROMPT), 10, 0)
    assert len(box.legs) == 2 and all(leg.ended.is_set() for leg in box.legs)


async def test_a_leg_that_is_lost_after_the_cancellation_has_no_successor() -> None:
    held, ledger = asyncio.Event(), Ledger()

    def die(leg: Any) -> Exception:
        return lost(leg)

    async def script(leg: Any) -> AsyncIterator[Any]:
        async for event in answer(until=4, hold=held)(leg):
            if leg.cancelled.is_set():
                raise die(leg)
            yield event

    box = own(script)
    listener = start(box, meter=ledger)
    await listener.hear(4)
    listener.request.cancel()
    await listener.running
    assert len(box.legs) == 1 and listener.request.status == 499
    ((account, reason),) = ledger.recorded
    assert (account.completion_tokens, reason) == (4, "cancelled")


async def test_nothing_comes_after_a_refusal() -> None:
    """A listener that is told more after the end of it would wait for another end for ever."""
    box = own(answer(until=1, hold=asyncio.Event(), deaf=True))
    listener = start(box, job(max_tokens=3))
    await listener.hear(1)
    error = Unauthorized("The key has been revoked.")
    listener.request.refuse(error)
    last = await listener.running
    # All that was said until the request was over comes at once, to a slow listener.
    assert await listener.request.events.take() == [Failed(error)]
    assert last == Failed(error) and listener.request.status == 401


# -- deadlines -------------------------------------------------------------------------------------


class Running:
    """All requests of a box without peers that serves one at a time."""

    def __init__(self, box: ScriptedBox) -> None:
        metrics: Any = SimpleNamespace(observe=lambda account, status: None)
        ledger: Any = Ledger()
        self.requests = RunningRequests(
            alone(box), ledger, metrics, settings(engine=EngineConfig(max_sequences=1))
        )
        self.ended: list[tuple[int, int]] = []

    def start(self, timeout: float | None = None, **more: Any) -> Request:
        key = SimpleNamespace(id="key_1", name="", policy=SimpleNamespace(max_parallel=None))
        taken = admitted(job(**more), key=key, end=lambda *used: self.ended.append(used))
        return self.requests.start(taken, timeout)


async def test_a_deadline_that_cannot_be_kept_refuses_at_once() -> None:
    box = own(answer(), answer(until=2, hold=asyncio.Event()), answer())
    running = Running(box)
    running.start()
    await running.requests.drained()
    running.requests._service["scripted:1"] = 30.0  # what its requests took lately
    held = running.start(max_tokens=20)
    with pytest.raises(TooLate, match=r"within 5 s: it would wait about 30\.0 s"):
        running.start(timeout=5)
    assert running.ended[-1] == (0, 0) and len(running.ended) == 2
    assert running.requests.count == 1
    patient = running.start(timeout=60)
    await box.asked(legs=3)
    held.cancel()
    await running.requests.drained()
    assert (held.status, patient.status) == (499, 200)


async def test_a_request_that_has_not_begun_by_its_deadline_is_refused() -> None:
    box = own(silent())
    running = Running(box)
    request = running.start(timeout=0.05)
    await running.requests.drained()
    assert request.status == 503 and box.legs[0].cancelled.is_set()
    events = await request.events.take()
    assert isinstance(events[-1], Failed) and isinstance(events[-1].error, TooLate)


async def test_a_request_that_began_before_its_deadline_is_completed() -> None:
    go_on = asyncio.Event()
    box = own(answer(until=3, hold=go_on))
    running = Running(box)
    request = running.start(timeout=0.05)
    await asyncio.sleep(0.15)
    go_on.set()
    await running.requests.drained()
    assert request.status == 200


async def test_requests_of_a_key_that_is_stopped_are_refused_and_so_are_late_ones() -> None:
    box = own(silent())
    running = Running(box)
    request = running.start()
    await box.asked()
    error = Unauthorized("The key has been revoked.")
    loop = asyncio.get_running_loop()
    came = loop.time() - 1
    assert running.requests.stop_key("key_1", error) == 1
    taken = admitted(job(), end=lambda *used: running.ended.append(used))
    with pytest.raises(Unauthorized):
        running.requests.start(taken, since=came)
    await running.requests.drained()
    assert request.status == 401 and len(running.ended) == 2


# -- what a key may use ----------------------------------------------------------------------------


class Tokenizer:
    """Takes a moment for a prompt: meanwhile others come."""

    async def tokenize(self, job: Job, *_: Any, **__: Any) -> tuple[Tokenized, int]:
        await asyncio.sleep(0.01)
        return Tokenized(job.id, PROMPT), 2048


async def test_requests_that_come_together_do_not_exceed_a_budget(
    books: Books,
) -> None:
    """What one may cost at most is reserved in the same moment in which it is found to fit."""

    key = await new_key(books.database, budget=Budget("0.000055"))
    pricing = PricingConfig(per_1k_tokens="0.001")  # each of the requests may cost 0.000015
    admission = Admission(settings(pricing=pricing), Tokenizer(), books.database, lambda model: 0)
    admitting = [admission.admit(key, [job()]) for _ in range(20)]
    found = await asyncio.gather(*admitting, return_exceptions=True)
    taken = [one for one in found if not isinstance(one, BaseException)]
    assert len(taken) == 3
    assert all(isinstance(one, RateLimited) for one in found if one not in taken)
    for one in taken[:2]:
        one.reservation.end(15, 5_000)
    again = await admission.admit(key, [job()])
    again.reservation.end(15, 15_000)
    taken[2].reservation.end(15, 20_000)
    with pytest.raises(BudgetExceeded):
        await admission.admit(key, [job()])


async def test_a_request_without_budget_is_refused_for_that_though_nothing_can_be_written(
    books: Books, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def locked(within: float) -> str:
        return "another program has locked the database"

    monkeypatch.setattr(books.database, "why_not_writable", locked)
    pricing = PricingConfig(per_1k_tokens="0.001")
    admission = Admission(settings(pricing=pricing), Tokenizer(), books.database, lambda model: 0)
    poor = await new_key(books.database, budget=Budget("0"))
    with pytest.raises(BudgetExceeded):
        await admission.admit(poor, [job()])
    with pytest.raises(NoNodesAvailable, match="another program has locked"):
        await admission.admit(books.key, [job()])


async def test_tokens_per_minute_are_reserved_before_a_request_runs_and_corrected_after(
    books: Books,
) -> None:
    key = await new_key(books.database, tpm=40)
    admission = Admission(settings(), Tokenizer(), books.database, lambda model: 0)
    first = await admission.admit(key, [job()])  # 15 tokens at most
    await admission.admit(key, [job()])
    with pytest.raises(RateLimited):
        await admission.admit(key, [job()])
    first.reservation.end(5, 0)  # 10 fewer than it might have used
    await admission.admit(key, [job()])


async def test_a_box_without_peers_says_in_the_receipt_that_it_served_itself(books: Books) -> None:
    asked = job()
    await start(own(), asked, meter=books.meter, key=books.key).end()
    receipt = books.receipts()[asked.request_id]
    assert receipt["routing"] == {"policy": "local", "chosen": OWN.node_id}
    with_peers = Network(own())
    again = job()
    await with_peers.ask(again, meter=books.meter, key=books.key).end()
    receipt = books.receipts()[again.request_id]
    assert receipt["routing"]["chosen"] == OWN.node_id and "candidates" in receipt["routing"]
