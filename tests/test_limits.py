"""What a key may use: every decision is that of a reference model which remembers everything."""

from __future__ import annotations

import asyncio
import gc
from dataclasses import dataclass, field
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from pinaivu_box.amount import UNITS, Prices, prices, to_text
from pinaivu_box.errors import ApiError, BudgetExceeded, ExceedsKeyLimit, RateLimited
from pinaivu_box.gateway import quota as quota_module
from pinaivu_box.gateway.admission import limits_of
from pinaivu_box.gateway.quota import Credit, Entry, Limits, Quota, Quotas, Reservation, Window
from pinaivu_box.policy import Budget, Policy, check, parse_budget
from pinaivu_box.store.keys import Key

MINUTE = 60.0


def key(policy: Policy, name: str = "key_1", **more: Any) -> Key:
    return Key(name, "acct_1", "a", "", "sk-pnv-abc", "wxyz", policy, created_at=0, **more)


@dataclass
class Past:
    """One request that was admitted, as the reference remembers it."""

    at: float
    period: int
    tokens: int
    cost: int
    reservation: Reservation
    running: bool
    ended: bool = False


@dataclass
class Reference:
    """The rules in their plainest form, over the whole history.  Slow, and obviously right."""

    policy: Policy
    past: list[Past] = field(default_factory=list)

    def lately(self, now: float) -> list[Past]:
        return [one for one in self.past if one.at + MINUTE > now]

    def running(self) -> list[Past]:
        return [one for one in self.past if one.running and not one.ended]

    def waiting(self) -> list[Past]:
        return [one for one in self.past if not one.running and not one.ended]

    def period(self, now: float) -> int:
        budget = self.policy.budget
        if budget is None or budget.period is None:
            return 0
        length = float(budget.period.removesuffix("s"))
        return int(now // length) * int(length) * 1000

    def refusal(self, now: float, tokens: int, cost: int) -> type[ApiError] | None:
        policy, lately = self.policy, self.lately(now)
        if policy.rpm is not None and len(lately) + 1 > policy.rpm:
            return RateLimited
        if policy.tpm is not None and tokens > policy.tpm:
            return ExceedsKeyLimit
        if policy.tpm is not None and sum(one.tokens for one in lately) + tokens > policy.tpm:
            return RateLimited
        full = policy.max_parallel is not None and len(self.running()) >= policy.max_parallel
        if full and len(self.waiting()) >= policy.max_queue:
            return RateLimited
        if policy.budget is not None:
            mine = [one for one in self.past if one.period == self.period(now)]
            spent = sum(one.cost for one in mine if one.ended)
            held = sum(one.cost for one in mine if not one.ended)
            if spent + cost > policy.budget.units:
                return BudgetExceeded
            if spent + held + cost > policy.budget.units:
                return RateLimited
        return None


POLICIES = st.builds(
    Policy,
    rpm=st.none() | st.integers(1, 6),
    tpm=st.none() | st.integers(1, 200),
    max_parallel=st.none() | st.integers(1, 3),
    max_queue=st.integers(0, 2),
    budget=st.none()
    | st.builds(
        Budget,
        st.integers(0, 300).map(to_text),
        st.none() | st.sampled_from(["45s", "90s", "300s"]),
    ),
)


# What happens next: time passes; a request of a key comes (which, tokens, cost); one that was
# admitted ends, having used a part of what it took; a client waits as it is told.
ACTIONS = st.one_of(
    st.tuples(st.just("pass"), st.sampled_from([0.0, 0.001, 1.0, 15.0, 29.999, 30.0, 60.0, 400.0])),
    *2 * [st.tuples(st.just("ask"), st.integers(0, 1), st.integers(0, 120), st.integers(0, 120))],
    st.tuples(st.just("end"), st.integers(0, 99), st.floats(0, 1)),
    st.tuples(st.just("wait"), st.integers(0, 1), st.integers(0, 120)),
)


class Schedule:
    """Two keys, a clock of our own, and the references beside them."""

    def __init__(self, policies: tuple[Policy, Policy]) -> None:
        self.now = 0.0
        self.limits = [limits_of(key(policy)) for policy in policies]
        self.quotas = [Quota(now=lambda: self.now, wall=lambda: self.now) for _ in policies]
        self.references = [Reference(policy) for policy in policies]

    def do(self, what: str, *how: Any) -> None:
        getattr(self, f"do_{what}")(*how)
        for reference in self.references:
            check_never_more_than_allowed(reference, self.now)

    def do_pass(self, seconds: float) -> None:
        self.now += seconds

    def do_ask(self, which: int, tokens: int, cost: int) -> None:
        reference = self.references[which]
        expected = reference.refusal(self.now, tokens, cost)
        try:
            reservation = self.reserve(which, tokens, cost)
        except ApiError as error:
            assert type(error) is expected, error
            return
        assert expected is None
        period, running = reference.period(self.now), reservation.turn.is_set()
        reference.past.append(Past(self.now, period, tokens, cost, reservation, running))

    def do_end(self, index: int, used: float) -> None:
        pairs = [(n, one) for n, r in enumerate(self.references) for one in r.past if not one.ended]
        if not pairs:
            return
        which, one = pairs[index % len(pairs)]
        tokens, cost = int(one.tokens * used), int(one.cost * used)
        one.reservation.end(tokens, cost)
        one.ended, one.tokens, one.cost = True, tokens, cost
        reference = self.references[which]
        most = reference.policy.max_parallel
        while (waiting := reference.waiting()) and len(reference.running()) < (most or 10**9):
            waiting[0].running = True  # first come, first served

    def do_wait(self, which: int, tokens: int) -> None:
        """No starvation: with nobody else coming, who comes back when told passes both rates."""
        policy = self.references[which].policy
        rates = Reference(Policy(rpm=policy.rpm, tpm=policy.tpm), self.references[which].past)
        for _ in ("rpm", "tpm"):
            if rates.refusal(self.now, tokens, 0) is RateLimited:
                with pytest.raises(RateLimited) as caught:
                    self.reserve(which, tokens, 0)
                assert caught.value.retry_after is not None
                assert 1 <= caught.value.retry_after <= MINUTE
                self.now += caught.value.retry_after
        assert rates.refusal(self.now, tokens, 0) is not RateLimited
        self.do_ask(which, tokens, 0)

    def reserve(self, which: int, tokens: int, cost: int) -> Reservation:
        return self.quotas[which].reserve(self.limits[which], tokens=tokens, cost=cost)


def check_never_more_than_allowed(reference: Reference, now: float) -> None:
    policy, lately = reference.policy, reference.lately(now)
    assert policy.rpm is None or len(lately) <= policy.rpm
    assert policy.tpm is None or sum(one.tokens for one in lately) <= policy.tpm
    assert policy.max_parallel is None or len(reference.running()) <= policy.max_parallel
    for one in reference.past:
        assert one.ended or one.reservation.turn.is_set() == one.running
    if policy.budget is not None:
        for period in {one.period for one in reference.past}:
            used = sum(one.cost for one in reference.past if one.period == period)
            assert used <= policy.budget.units


@settings(max_examples=400)
@given(st.tuples(POLICIES, POLICIES), st.lists(ACTIONS, min_size=20, max_size=80))
def test_every_decision_is_that_of_the_reference(
    policies: tuple[Policy, Policy], actions: list[tuple[Any, ...]]
) -> None:
    schedule = Schedule(policies)
    for action in actions:
        schedule.do(*action)


# -- the pieces ----------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.floats(0, 30), st.integers(0, 9)), max_size=30),
    st.integers(0, 9),
    st.integers(0, 40),
)
def test_a_window_tells_when_there_is_room(
    arrivals: list[tuple[float, int]], amount: int, limit: int
) -> None:
    """Just then it fits, and a moment earlier it did not."""
    now = 0.0
    window = Window(lambda: now)
    for gap, entered in arrivals:
        now += gap
        window.enter(entered)
    wait, moment = window.wait(amount, limit), now
    if amount > limit:
        assert wait == float("inf")
    elif wait:
        now = moment + wait - 1e-6
        assert window.used + amount > limit
        now = moment + wait + 1e-6
        assert window.used + amount <= limit
    else:
        assert window.used + amount <= limit


def test_what_is_older_than_a_minute_is_kept_of_nobody() -> None:
    """Nor of a key without limits, with which what it has used is never compared."""
    now = 0.0
    quota = Quota(now=lambda: now, wall=lambda: now)
    for _ in range(500):
        now += 1.0
        quota.end(quota.reserve(Limits("The key"), tokens=10), 0)
    windows = (quota.requests, quota.tokens)
    kept = [one for one in gc.get_objects() if isinstance(one, Entry) and one.window in windows]
    assert 2 <= len(kept) <= 2 * MINUTE


def test_a_restart_remembers_the_last_minute_and_the_budget() -> None:
    """Rows as the store has them: (age, tokens); what is older counts no more."""
    now = 1000.0
    limits = limits_of(key(Policy(rpm=3, tpm=100, budget=Budget("1", "1h"))))
    quota = Quota({0: UNITS - 10}, [(60, 50), (59, 40), (1, 30)], now=lambda: now, wall=lambda: now)
    with pytest.raises(RateLimited, match="tokens per minute"):
        quota.reserve(limits, tokens=31)
    with pytest.raises(BudgetExceeded, match="0\\.99999999 is spent"):
        quota.reserve(limits, tokens=30, cost=11)
    quota.reserve(limits, tokens=30, cost=10)
    with pytest.raises(RateLimited, match="requests per minute"):
        quota.reserve(limits)
    now += 2700.0  # another period of the budget
    quota.reserve(limits, cost=UNITS)


@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 1)])
def test_places_that_are_changed_count_for_those_that_wait(before: int, after: int) -> None:
    """More of them let the first of those in that wait, before anybody who comes later; with fewer
    nobody is let in before enough have ended."""
    quota = Quota()
    changed = [Limits("The key", max_parallel=most, max_queue=9) for most in (before, after)]
    reservations = [quota.reserve(changed[0], tokens=1) for _ in range(before + 3)]
    reservations.append(quota.reserve(changed[1], tokens=1))
    assert [n for n, one in enumerate(reservations) if one.turn.is_set()] == [0, 1, 2]
    for ended, reservation in enumerate(reservations, 1):
        reservation.end(1, 0)
        running = sum(one.turn.is_set() for one in reservations[ended:])
        assert running == min(max(before - ended, after), len(reservations) - ended)


def test_an_answer_without_a_limit_gets_what_is_left_once_nobody_else_holds_any() -> None:
    quota = Quota(now=lambda: 0.0, wall=lambda: 0.0)
    limits = Limits("The key", budget=Budget("0.0000001"))  # a hundred units
    reservation = quota.reserve(limits, cost=60)
    assert quota.unreserved(limits) is None
    with pytest.raises(RateLimited, match="try again when one has ended"):
        quota.reserve(limits, cost=500, explicit=False)
    reservation.end(0, 30)
    assert quota.unreserved(limits) == 70


def test_the_headers_tell_the_limits_that_there_are() -> None:
    now = 5.0
    quota = Quota(now=lambda: now, wall=lambda: now)
    limits = Limits("The key", rpm=10)
    quota.reserve(limits, tokens=7)
    now = 20.0
    assert quota.headers(limits) == {
        "x-ratelimit-limit-requests": "10",
        "x-ratelimit-remaining-requests": "9",
        "x-ratelimit-reset-requests": "45.000s",
    }
    assert quota.headers(Limits("The key")) == {}


# -- peers ---------------------------------------------------------------------------------------


def credit(limit: int, owed: int, *, waived: bool = False) -> Limits:
    return Limits("Your box", credit=Credit(limit, owed, 0, "credits", waived, waived))


def test_credit_counts_what_runs_until_it_is_owed() -> None:
    """A request may begin while anything is left, and what it may cost counts at once."""
    quota = Quota()
    first = quota.reserve(Limits("Your box"))
    quota.increase(first, credit(100, 50), tokens=0, cost=50)
    with pytest.raises(RateLimited, match=r"owes this one 0\.0000001 credits of") as refused:
        quota.check(credit(100, 50))
    assert "0.00000005 of it for running requests" in refused.value.message
    quota.check(credit(100, 50, waived=True))  # while there is nothing else to do
    first.end(0, 0)
    quota.check(credit(100, 99))  # what it has cost is in the ledger
    with pytest.raises(RateLimited, match="settle"):
        quota.check(credit(100, 100))


def test_a_request_gets_its_place_before_its_tokens() -> None:
    """While a prompt is read its request has a place, and no tokens; they count from then on."""
    now = 0.0
    quota = Quota(now=lambda: now)
    places, tokens = Limits("Your box", max_parallel=1), Limits("Your box", tpm=100)
    first = quota.reserve(places)
    with pytest.raises(RateLimited, match="1 requests at a time"):
        quota.reserve(places)
    now = 50.0
    quota.increase(first, tokens, tokens=80, cost=0)
    now = 109.0
    with pytest.raises(RateLimited, match="100 tokens per minute"):
        quota.check(tokens, tokens=21)
    first.tokens.correct(70)
    quota.check(tokens, tokens=30)
    quota.end(first, 0)
    assert (quota.running, quota.tokens.used, quota.reserved) == (0, 70, 0)
    now = 110.0
    assert quota.tokens.used == 0
    quota.reserve(places)


@pytest.mark.anyio
async def test_a_quota_is_read_once_however_many_ask_for_it() -> None:
    reads, go_on = [], asyncio.Event()

    async def read(principal: str) -> Quota:
        reads.append(principal)
        await go_on.wait()
        return Quota()

    quotas = Quotas(read)
    asking = [asyncio.create_task(quotas.of(name)) for name in "aabb"]
    go_on.set()
    first, again, other, _ = await asyncio.gather(*asking)
    assert first is again and first is not other and reads == ["a", "b"]


@pytest.mark.anyio
async def test_a_quota_in_use_is_not_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many principals those that do nothing are read again; whoever does something counts on."""
    monkeypatch.setattr(quota_module, "_MAX_QUOTAS", 4)
    now = 0.0

    async def read(_: str) -> Quota:
        return Quota(now=lambda: now)

    quotas = Quotas(read)
    first = {name: await quotas.of(name) for name in ("idle", "runs", "asked", "asked earlier")}
    first["runs"].reserve(Limits("The key"))
    first["asked earlier"].count_request(Limits("The key"))
    now = 30.0
    first["asked"].count_request(Limits("The key"))
    now = 60.0
    await quotas.of("another")
    again = [name for name in first if await quotas.of(name) is not first[name]]
    assert again == ["idle", "asked earlier"]


def test_a_request_that_is_counted_is_not_in_its_own_way() -> None:
    """It takes its request of the minute when it comes, and counts anew when it is admitted."""
    now = 0.0
    quota = Quota(now=lambda: now)
    limits = Limits("The key", rpm=1)
    counted = quota.count_request(limits)
    with pytest.raises(RateLimited, match="try again in 60 s"):
        quota.count_request(limits)
    now = 50.0
    quota.check(limits, counted=counted)
    with pytest.raises(RateLimited, match="try again in 10 s"):
        quota.check(limits)
    quota.reserve(limits, counted=counted)
    with pytest.raises(RateLimited, match="try again in 60 s"):
        quota.count_request(limits)
    now = 110.0
    quota.count_request(limits)


# -- policies ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("10", Budget("10")),
        ("10 per 30d", Budget("10", "30d")),
        ("0.000000001 per 1h", Budget("0.000000001", "1h")),
    ],
)
def test_a_budget_as_it_is_written(text: str, budget: Budget) -> None:
    assert parse_budget(text) == budget


@pytest.mark.parametrize(
    "text",
    [
        "",
        "ten",
        "-1",
        "1e400",
        "0.0000000001",
        "1 per",
        "1 per 0s",
        "1 per -1d",
        "1 per day",
        "NaN",
        "1 per 4000d",
    ],
)
def test_an_invalid_budget_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="budget"):
        parse_budget(text)


@pytest.mark.parametrize(
    ("policy", "word"),
    [
        (Policy(networks=("10.0.0.1/8",)), "networks"),
        (Policy(networks=("home",)), "networks"),
        (Policy(models=("",)), "models"),
        (Policy(max_queue=3), "max_parallel"),
        (Policy(prices={"*": "free"}), "prices"),
        (Policy(prices={"*": Prices("1", "-1")}), "prices"),
        (Policy(budget=Budget("1", "often")), "budget"),
    ],
)
def test_an_invalid_policy_is_refused(policy: Policy, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        check(policy)


def test_models_and_networks_of_a_key() -> None:
    some = Policy(models=("llama3.2:*", "smollm2:135m"), networks=("192.168.0.0/16", "fd00::/8"))
    assert some.serves("llama3.2:1b") and some.serves("smollm2:135m")
    assert not some.serves("llama3:1b") and not some.serves("Llama3.2:1b")
    for address in ("192.168.7.7", "::ffff:192.168.0.1", "fd12::1"):
        assert some.admits(address)
    for address in ("192.169.0.1", "::1", "", "localhost", "::ffff:10.0.0.1"):
        assert not some.admits(address)
    assert Policy().serves("anything") and Policy().admits("")


# -- prices --------------------------------------------------------------------------------------

PRICE = st.decimals(0, 1000, places=6).map(str)


@given(PRICE, PRICE, PRICE, *(st.integers(0, 10**6) for _ in range(3)))
def test_a_cost_is_exact(p: str, c: str, o: str, anew: int, found: int, made: int) -> None:
    from fractions import Fraction

    cost = Prices(p, o, c).cost(anew + found, found, made)
    exact = (anew * Fraction(p) + found * Fraction(c) + made * Fraction(o)) / 1000
    assert Fraction(cost, UNITS) == exact
    assert Prices(p, o, c).most(anew + found, made) >= cost
    assert Prices(p, o).cost(anew + found, found, made) == Prices(p, o, p).cost(
        anew + found, found, made
    )
    assert prices(p) == Prices(p, p)
