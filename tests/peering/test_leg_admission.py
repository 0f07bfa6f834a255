"""Which legs of a peer are admitted, and when: without a box, a link or an engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest

from pinaivu_box.engine.messages import SamplingParams
from pinaivu_box.errors import Conflict, RateLimited
from pinaivu_box.gateway.backend import Job
from pinaivu_box.ledger.entry import Balance
from pinaivu_box.legs import admission as module
from pinaivu_box.legs.admission import LegAdmission, LegPermit
from pinaivu_box.models.catalog import Model
from pinaivu_box.policy import PeerPolicy
from tests.support.waiting import soon

pytestmark = pytest.mark.anyio
PEER = "carl"
UNITS = 10**9


class Load:
    idle = False


class Accounts:
    """What the ledger would say.  While `reading` is not set, whoever reads the balance waits."""

    def __init__(self, policy: PeerPolicy) -> None:
        self.peer_policy = policy
        self.owed = 0
        self.legs: set[tuple[str, int, int]] = set()  # in the ledger
        self.lately: list[tuple[float, int]] = []
        self.reading = asyncio.Event()
        self.reading.set()
        self.readers = 0

    async def policy(self, peer: str) -> PeerPolicy:
        return self.peer_policy

    async def balance(self, peer: str, currency: str) -> Balance:
        owed = self.owed
        self.readers += 1
        await self.reading.wait()
        return Balance(waiting=owed)

    async def recent(self, peer: str) -> list[tuple[float, int]]:
        return self.lately

    async def served(self, peer: str, request_id: str, leg: int, choice: int) -> bool:
        return (request_id, leg, choice) in self.legs


def admission_with(**policy: Any) -> tuple[LegAdmission, Accounts]:
    accounts = Accounts(PeerPolicy(**policy))
    return LegAdmission(accounts.policy, cast("Any", accounts), cast("Any", Load())), accounts


@asynccontextmanager
async def running(
    admission: LegAdmission, accounts: Accounts, *, cost: int = 0, tokens: int = 0
) -> AsyncIterator[None]:
    async with admission.request(PEER, accounts.peer_policy, "credits") as request:
        await request.reserve(tokens=tokens, cost=cost)
        yield


async def check(admission: LegAdmission, accounts: Accounts) -> None:
    async with admission.request(PEER, accounts.peer_policy, "credits") as request:
        await request.check()


def job(request_id: str = "req_1", text: str = "Hello", **more: Any) -> Job:
    model = Model("fake:1", Path("fake:0"))
    messages = [{"role": "user", "content": text}]
    return Job(request_id, model, messages, SamplingParams(), None, [], PEER, **more)


def leg(admission: LegAdmission, job: Job, *, pays: bool = True) -> Any:
    return admission.leg(PEER, job, pays=pays)


async def settled() -> None:
    """Whatever can go on without another event has done so."""
    for _ in range(20):
        await asyncio.sleep(0)


# -- what a peer may use ---------------------------------------------------------------------------


async def test_of_legs_that_come_together_credit_admits_what_it_has_room_for() -> None:
    """All of them read the same balance; what one reserves the next one sees."""
    admission, accounts = admission_with(credit_limit="10", beyond="refuse", max_parallel=9)
    accounts.reading.clear()
    release = asyncio.Event()

    async def run() -> None:
        async with running(admission, accounts, cost=4 * UNITS):
            await release.wait()

    tasks = [asyncio.create_task(run()) for _ in range(8)]
    await settled()
    assert accounts.readers == 8
    accounts.reading.set()
    await settled()
    refused = [task for task in tasks if task.done()]
    assert len(refused) == 5  # the third began while anything was left
    for task in refused:
        assert isinstance(task.exception(), RateLimited)
    assert (await admission.debt(PEER, "credits")).total == 12 * UNITS
    release.set()
    await soon(admission.idle.wait())
    assert (await admission.debt(PEER, "credits")).total == 0


async def test_a_leg_that_ends_while_the_balance_is_read_still_counts() -> None:
    """What it cost is in the ledger, and the balance was read before: it is read again."""
    admission, accounts = admission_with(credit_limit="10", beyond="refuse")
    async with running(admission, accounts, cost=10 * UNITS):
        accounts.reading.clear()
        asking = asyncio.create_task(check(admission, accounts))
        await settled()
        accounts.owed = 10 * UNITS  # it is recorded, then its reservation ends
    accounts.reading.set()
    with pytest.raises(RateLimited, match="owes this one 10 credits of at most 10"):
        await asking


async def test_tokens_of_a_minute_outlive_a_restart() -> None:
    admission, accounts = admission_with(tokens_per_minute=100)
    accounts.lately = [(70.0, 1000), (30.0, 60), (1.0, 30)]
    async with running(admission, accounts, tokens=10):
        with pytest.raises(RateLimited, match="100 tokens per minute"):
            async with running(admission, accounts, tokens=1):
                pass


async def test_a_request_larger_than_the_limit_of_a_minute_takes_all_of_it() -> None:
    """It is served, once in a minute: a peer cannot know the limit."""
    admission, accounts = admission_with(tokens_per_minute=100)
    async with running(admission, accounts, tokens=5000):
        pass
    with pytest.raises(RateLimited):
        await check(admission, accounts)


async def test_places_are_given_back_whatever_happens() -> None:
    admission, accounts = admission_with(max_parallel=1)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            async with running(admission, accounts, cost=1):
                assert not admission.idle.is_set()
                with pytest.raises(RateLimited, match="1 requests at a time"):
                    await check(admission, accounts)
                raise ZeroDivisionError
        assert admission.idle.is_set()


async def test_a_new_limit_of_a_peer_holds_for_its_next_request() -> None:
    admission, accounts = admission_with(max_parallel=1)
    async with running(admission, accounts):
        accounts.peer_policy = msgspec.structs.replace(accounts.peer_policy, max_parallel=2)
        async with running(admission, accounts):
            assert (await admission.quotas.of(PEER)).running == 2


# -- each leg once ---------------------------------------------------------------------------------


async def test_a_leg_waits_for_the_end_of_the_same_leg_and_goes_on_at_once() -> None:
    """Its stream broke, and the peer asks again before this box knows: no time need pass."""
    admission, accounts = admission_with()
    entered: list[LegPermit] = []

    async def again() -> None:
        async with leg(admission, job()) as permit:
            entered.append(permit)

    async with leg(admission, job()):
        waiting = asyncio.create_task(again())
        await settled()
        assert not entered
    await settled()
    assert waiting.done() and len(entered) == 1
    # It is in the ledger now: neither memory nor the ledger lets it in again.
    entered[0].served()
    with pytest.raises(Conflict, match="served already"):
        async with leg(admission, job()):
            pass
    accounts.legs.add(("req_2", 0, 0))
    async with leg(admission, job("req_2")) as permit:
        with pytest.raises(Conflict, match="served already"):
            await permit.check_new()


async def test_of_two_that_wait_for_a_leg_only_one_goes_on() -> None:
    admission, _ = admission_with()
    entered, release = [], asyncio.Event()

    async def again(number: int) -> None:
        async with leg(admission, job()):
            entered.append(number)
            await release.wait()

    async with leg(admission, job()):
        tasks = [asyncio.create_task(again(number)) for number in (1, 2)]
        await settled()
    await settled()
    assert entered == [1]  # who has waited longest
    release.set()
    await soon(asyncio.gather(*tasks))
    assert entered == [1, 2]


async def test_a_leg_that_does_not_end_soon_is_a_conflict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SIBLING_SECONDS", 0.01)
    admission, _ = admission_with()
    async with leg(admission, job()):
        with pytest.raises(Conflict, match="being served"):
            async with leg(admission, job()):
                pass
        async with leg(admission, job("req_2")), leg(admission, job(choice=1)):
            pass


# -- each prompt paid once -------------------------------------------------------------------------


async def test_a_leg_that_does_not_pay_waits_for_the_one_that_does() -> None:
    admission, _ = admission_with()
    entered: list[LegPermit] = []

    async def free() -> None:
        async with leg(admission, job(choice=1), pays=False) as permit:
            entered.append(permit)
            permit.check_paid()

    waiting = asyncio.create_task(free())
    await settled()
    assert not entered
    async with leg(admission, job()):
        await settled()
        assert len(entered) == 1
    await waiting


async def test_a_prompt_counts_as_paid_only_with_a_proof(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing that was computed for the others may be sent then."""
    monkeypatch.setattr(module, "_SIBLING_SECONDS", 0.01)
    admission, _ = admission_with()
    async with leg(admission, job()):
        free = leg(admission, job(choice=1), pays=False)
        permit = await free.__aenter__()
        permit.check_paid()
    with pytest.raises(Conflict, match="pays for its prompt"):
        permit.check_paid()
    await free.__aexit__(None, None, None)
    with pytest.raises(Conflict, match="pays for its prompt"):
        async with leg(admission, job(choice=2), pays=False):
            pass
    async with leg(admission, job(choice=3)) as permit:
        permit.proven = True
    async with leg(admission, job(choice=4), pays=False) as permit:
        permit.check_paid()
    # Another prompt, or the same one sooner, is another prompt.
    for other in (job(choice=5, text="Other"), job(choice=6, priority=1)):
        with pytest.raises(Conflict, match="pays for its prompt"):
            async with leg(admission, other, pays=False):
                pass
