"""Tenants share the engine by their weights: who is next, and who gives its place."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pinaivu_box.engine.fairness import FairQueue, State
from pinaivu_box.engine.sequence import Sequence
from tests.support.engine_harness import Heard, add, alone, finish, make
from tests.support.scheduler_driver import SchedulerDriver, sequence


class Arrivals:
    """New sequences of one shape, numbered."""

    def __init__(
        self, driven: SchedulerDriver, prompt: int = 10, output: int = 20, first: int = 0
    ) -> None:
        self._driven = driven
        self._shape = (prompt, output)
        self._number = first

    def add(self, tenant: str, count: int = 1, weight: float = 1.0) -> list[Sequence]:
        made = []
        for _ in range(count):
            self._number += 1
            made.append(sequence(self._number, *self._shape, tenant=tenant, weight=weight))
        self._driven.add(*made)
        return made

    def saturate(self, steps: int, weights: dict[str, float]) -> Counter[str]:
        """So many steps in which each tenant always has something waiting; starts by tenant."""
        driven = self._driven
        before = len(driven.started)
        for _ in range(steps):
            waiting = Counter(one.tenant for one in driven.scheduler.waiting)
            for tenant, weight in weights.items():
                self.add(tenant, max(0, 10 - waiting[tenant]), weight)
            driven.step()
        return Counter(one.tenant for one in driven.started[before:])


def tokens_of(driven: SchedulerDriver) -> Counter[str]:
    """Computed tokens, by tenant."""
    found: Counter[str] = Counter()
    for one in driven.started:
        found[one.tenant] += driven.computed[one.id]
    return found


# -- one beside many -------------------------------------------------------------------------------


@pytest.mark.parametrize("places", [2, 8, 32])
def test_one_request_starts_at_once_beside_a_hundred_of_another_tenant(places: int) -> None:
    """Also where all places are taken: one of the others steps back."""
    driven = SchedulerDriver(kv=20_000, sequences=places, budget=256)
    arrivals = Arrivals(driven, output=50)
    arrivals.add("many", 100)
    for _ in range(10):
        driven.step()
    assert len(driven.scheduler.running) == places
    (one,) = arrivals.add("one")
    driven.step()
    assert one in driven.started
    assert driven.scheduler.preemptions == 1
    while one not in driven.ended:
        driven.step()
    assert one.state is State.RUNNING  # it was never thrown out again
    assert driven.scheduler.preemptions == 1  # nor was anybody else
    driven.run()
    assert len(driven.ended) == 101


def test_a_preempted_sequence_keeps_its_cells_while_there_is_room() -> None:
    driven = SchedulerDriver(kv=20_000, sequences=4, ids=64, budget=256)
    arrivals = Arrivals(driven, prompt=100, output=50)
    arrivals.add("many", 20)
    for _ in range(10):
        driven.step()
    arrivals.add("one")
    driven.run()
    assert driven.scheduler.preemptions == 1
    # A token of each answer is never computed, one is computed twice: the last before the pause.
    assert sum(driven.computed.values()) <= 21 * (100 + 49) + 1


def test_beside_as_many_of_its_own_a_request_waits_its_turn() -> None:
    """Places are only given up for somebody who has less than its share."""
    driven = SchedulerDriver(kv=20_000, sequences=4, budget=256)
    arrivals = Arrivals(driven, output=50)
    arrivals.add("a", 10)
    arrivals.add("b", 10)
    driven.run()
    assert driven.scheduler.preemptions == 0


def test_by_weight_a_tenant_may_hold_more_places() -> None:
    driven = SchedulerDriver(kv=20_000, sequences=4, budget=256)
    arrivals = Arrivals(driven, output=200)
    arrivals.add("heavy", 10, weight=3)
    driven.step()
    driven.step()
    arrivals.add("light", 10)
    for _ in range(20):
        driven.step()
    held = Counter(one.tenant for one in driven.scheduler.running)
    assert held == {"heavy": 3, "light": 1}
    assert driven.scheduler.preemptions == 1


def test_places_change_hands_also_among_those_that_share_a_prefix() -> None:
    """What they share is in the cache once: there is room for another one."""
    driven = SchedulerDriver(kv=1000, sequences=8, budget=256)
    beginning = list(range(200))
    driven.add(*(sequence(n, [*beginning, 1000 + n], 50, tenant="many") for n in range(30)))
    for _ in range(8):
        driven.step()
    assert len(driven.scheduler.running) == 8 and driven.scheduler.kv_used < 300
    one = sequence(99, 10, 5, tenant="one")
    driven.add(one)
    driven.step()
    assert one in driven.started


@pytest.mark.parametrize("had_before", [1, 600])
def test_routing_does_not_oscillate(had_before: int) -> None:
    """Also if who asks has had more so far than who holds all the places."""
    driven = SchedulerDriver(kv=20_000, sequences=5, budget=64)
    driven.add(sequence(0, had_before, 2, tenant="asks"))
    driven.add(*(sequence(n, 5, 300, tenant="holds") for n in range(1, 6)))
    for _ in range(30):
        driven.step()
    assert [one.tenant for one in driven.scheduler.running] == ["holds"] * 5
    driven.add(sequence(9, 5, 5, tenant="asks"))
    driven.run()
    assert driven.scheduler.preemptions <= 1


@st.composite
def tenants(draw: st.DrawFn) -> list[tuple[int, Sequence]]:
    weights = {name: draw(st.sampled_from([1.0, 2.0])) for name in "abcd"}
    found = []
    for number in range(draw(st.integers(2, 20))):
        name = draw(st.sampled_from("abcd"))
        prompt, output = draw(st.integers(1, 60)), draw(st.integers(1, 60))
        one = sequence(number, prompt, output, tenant=name, weight=weights[name])
        found.append((draw(st.integers(0, 60)), one))
    return sorted(found, key=lambda arrival: arrival[0])


@settings(max_examples=80)
@given(tenants(), st.integers(1, 6), st.integers(8, 100))
def test_with_room_for_all_cells_preemptions_are_few(
    arrivals: list[tuple[int, Sequence]], places: int, budget: int
) -> None:
    """An arrival throws out one, and so may who comes in when another ends."""
    driven = SchedulerDriver(kv=20_000, sequences=places, budget=budget)
    number, todo = 0, list(arrivals)
    while todo or driven.scheduler:
        while todo and todo[0][0] <= number:
            driven.add(todo.pop(0)[1])
        if driven.scheduler:
            driven.step()
        number += 1
        assert number < 20_000
    assert driven.scheduler.preemptions <= 2 * len(arrivals)


def test_on_a_tight_cache_one_request_moves_on_beside_many() -> None:
    """The cells are full as well: it may wait for some, but not until the others are done."""
    driven = SchedulerDriver(kv=80, sequences=8, budget=32)
    arrivals = Arrivals(driven, prompt=5, output=20)
    arrivals.add("many", 60)
    for _ in range(8):
        driven.step()
    (one,) = arrivals.add("one")
    while one not in driven.ended:
        driven.step()
    assert len(driven.ended) < 20


def test_an_engine_answers_one_tenant_at_once_and_all_rightly() -> None:
    """Whole answers: those that stepped back go on as if nothing had happened."""
    many = [add(f"m{n}", f"{n}" * 20, max_tokens=20, seed=n, tenant="many") for n in range(20)]
    engine, _ = make(max_sequences=4, ids=32)
    heard = Heard()
    for request in many:
        engine.receive(request)
    for _ in range(8):
        heard.take(engine.step())
    one = add("one", "1" * 8, max_tokens=5, tenant="one")
    engine.receive(one)
    frames = 0
    while "one" not in heard.ends:
        heard.take(engine.step())
        frames += 1
    assert frames <= 8
    finish(engine, heard)
    assert engine.scheduler.preemptions > 0
    assert {request.id: heard.answer(request.id) for request in [*many, one]} == alone([*many, one])


# -- shares ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("places", [1, 2, 3, 8])
@pytest.mark.parametrize("weight", [1, 2, 3])
def test_under_saturation_tokens_are_shared_by_weight(weight: int, places: int) -> None:
    driven = SchedulerDriver(kv=20_000, sequences=places, budget=64)
    Arrivals(driven).saturate(800, {"heavy": float(weight), "light": 1.0})
    had = tokens_of(driven)
    assert had["heavy"] / had["light"] == pytest.approx(weight, rel=0.15)


def test_long_requests_do_not_earn_more_than_short_ones() -> None:
    driven = SchedulerDriver(kv=20_000, sequences=4, budget=64)
    long, short = Arrivals(driven, 100, 100), Arrivals(driven, 5, 5, first=10_000)
    for _ in range(2500):
        waiting = Counter(one.tenant for one in driven.scheduler.waiting)
        long.add("long", max(0, 4 - waiting["long"]))
        short.add("short", max(0, 20 - waiting["short"]))
        driven.step()
    queue = driven.scheduler.waiting
    assert queue.counter("long") / queue.counter("short") == pytest.approx(1, rel=0.15)


# -- counters --------------------------------------------------------------------------------------


def queue_of(*tenants_: str) -> tuple[FairQueue[Sequence], dict[str, Sequence]]:
    """Each tenant has one that runs."""
    queue: FairQueue[Sequence] = FairQueue()
    running = {name: sequence(n, 1, 1, tenant=name) for n, name in enumerate(tenants_)}
    for one in running.values():
        queue.push(one)
        queue.start(one)
        one.state = State.RUNNING
    return queue, running


def next_tenants(queue: FairQueue[Sequence], count: int) -> list[str]:
    return [one.tenant for one, _ in zip(queue.order(), range(count), strict=False)]


def test_a_pause_gives_no_credit() -> None:
    queue, running = queue_of("stays", "pauses")
    queue.stop(running["pauses"])
    queue.charge("stays", 1000, 0)
    for n in range(10, 20):
        queue.push(sequence(n, 10, 1, tenant="pauses"))
        queue.push(sequence(n + 10, 10, 1, tenant="stays"))
    assert queue.counter("pauses") == queue.counter("stays") == 1000
    assert Counter(next_tenants(queue, 10))["stays"] >= 4


def test_a_pause_does_not_pardon() -> None:
    queue, running = queue_of("stays", "pauses")
    queue.charge("pauses", 1000, 0)
    queue.stop(running["pauses"])
    queue.push(sequence(10, 10, 1, tenant="pauses"))
    assert queue.counter("pauses") == 1000 and queue.counter("stays") == 0


def test_an_empty_engine_neither_pardons_nor_gives_credit() -> None:
    """Whoever comes first to an engine where nobody is starts at what was had last."""
    queue, running = queue_of("a", "b")
    queue.charge("a", 1000, 0)
    queue.charge("b", 10, 0)
    queue.stop(running["a"])
    queue.stop(running["b"])
    for n, name in enumerate(("new", "a", "b")):
        queue.push(sequence(10 + n, 10, 1, tenant=name))
    assert [queue.counter(name) for name in ("new", "b", "a")] == [10, 10, 1000]


def test_one_running_stream_saves_no_credit_for_a_burst() -> None:
    """It could have had more all the time: nobody waits for it to catch up."""
    driven = SchedulerDriver(kv=50_000, sequences=8, budget=64)
    driven.add(sequence(100_000, 5, 5000, tenant="one"))
    arrivals = Arrivals(driven)
    arrivals.saturate(1000, {"many": 1.0})
    starts = arrivals.saturate(100, {"many": 1.0, "one": 1.0})
    assert starts["many"] >= 0.3 * starts.total()


def test_to_be_thrown_out_is_no_pause() -> None:
    """Its tenant's counter stays what it is, also if it has nothing else."""
    queue, running = queue_of("a", "b")
    queue.charge("b", 1000, 0)
    queue.charge("a", 10, 0)
    queue.stop(running["a"])
    running["a"].state = State.PREEMPTED
    queue.push(running["a"])
    assert queue.counter("a") == 10


def test_output_costs_twice_a_prompt() -> None:
    queue, _ = queue_of("a")
    queue.charge("a", 10, 0)
    assert queue.counter("a") == 10
    queue.charge("a", 0, 10)
    assert queue.counter("a") == 30


# -- priority --------------------------------------------------------------------------------------


def test_priority_then_age_orders_a_tenants_own() -> None:
    driven = SchedulerDriver(sequences=1)
    given_priorities = [0, 5, -3, 5, 0]
    driven.add(*(sequence(n, 5, 2, priority=p) for n, p in enumerate(given_priorities)))
    driven.run()
    assert [one.id for one in driven.started] == ["r1", "r3", "r0", "r4", "r2"]


@settings(max_examples=100)
@given(st.lists(st.integers(-5, 5), min_size=12, max_size=12), st.integers(1, 4))
def test_priority_changes_nothing_for_another_tenant(priorities: list[int], places: int) -> None:
    """With all alike in size, each of its requests starts at the same step as without."""

    def starts(priorities: list[int]) -> tuple[list[str], list[str]]:
        driven = SchedulerDriver(sequences=places, budget=32)
        for n, priority in enumerate(priorities):
            driven.add(sequence(2 * n, 6, 6, tenant="a", priority=priority))
            driven.add(sequence(2 * n + 1, 6, 6, tenant="b"))
        driven.run()
        order = [one.id for one in driven.started if one.tenant == "b"]
        return order, [one.tenant for one in driven.started]

    assert starts(priorities) == starts([0] * 12)
