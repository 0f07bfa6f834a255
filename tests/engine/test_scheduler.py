"""The token scheduler alone: random workloads on a tight cache, and what a step holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from pinaivu_box.engine.fairness import State
from pinaivu_box.engine.sequence import Sequence
from tests.support.scheduler_driver import SchedulerDriver, own_words, sequence


def shared_words(one: Sequence, position: int) -> int:
    """Says a short phrase again and again with a slip now and then: drafts are right and wrong."""
    return position % 4 if (position * 7 + one.arrival) % 11 else 9


@dataclass
class Load:
    """A random workload: when each sequence comes, and what goes wrong at which steps."""

    sizes: dict[str, Any]
    arrivals: list[tuple[int, Sequence]]
    no_slot: set[int]
    cancelled: dict[int, int]  # step → which of those that are there


@st.composite
def arrivals(draw: st.DrawFn, kv: int, *, alike: bool, drafting: bool) -> list[Any]:
    """If they are `alike`, some begin with the same tokens."""
    beginnings: list[list[int]] = [[]]
    if alike:
        beginnings += [[n] * draw(st.integers(1, kv - 2)) for n in (1, 2)]
    found = []
    for number in range(draw(st.integers(1, 12))):
        begin = draw(st.sampled_from(beginnings))
        own = draw(st.integers(1, kv - 1 - len(begin)))
        prompt = begin + [1000 * (number + 1) + n for n in range(own)]
        one = sequence(
            number,
            prompt,
            # As the engine does it: prompt and output together fit into the cache.
            draw(st.integers(1, min(kv - len(prompt), 25))),
            tenant=draw(st.sampled_from("abc")),
            weight=draw(st.sampled_from([1.0, 1.0, 3.0])),
            priority=draw(st.integers(-1, 1)),
            drafter=drafting,
            scope=draw(st.sampled_from(["a", "a", "b", ""])),
            public=draw(st.sampled_from([0, len(begin)])),
        )
        found.append((draw(st.integers(0, 30)), one))
    return sorted(found, key=lambda arrival: (arrival[0], arrival[1].arrival))


@st.composite
def loads(draw: st.DrawFn) -> Load:
    kv = draw(st.integers(8, 80))
    alike, sharing, steady = (draw(st.booleans()) for _ in range(3))
    steps = st.integers(0, 40)
    return Load(
        sizes={
            "kv": kv,
            "sequences": draw(st.integers(1, 6)),
            "budget": draw(st.integers(1, 40)),
            "ids": draw(st.integers(0, 9)),
            "sharing": sharing,
            "draft": draw(st.integers(0, 4)),
            "steady": steady,
            "said": shared_words if alike else own_words,
        },
        arrivals=draw(arrivals(kv, alike=alike, drafting=alike and sharing)),
        no_slot=draw(st.sets(steps, max_size=6)),
        cancelled=draw(st.dictionaries(steps, st.integers(0, 20), max_size=3)),
    )


@settings(max_examples=500)
@given(loads())
def test_every_sequence_finishes_within_bounds_whatever_comes(load: Load) -> None:
    """Random arrivals on a tight cache: `SchedulerDriver` checks each step, and nobody starves."""
    driven = SchedulerDriver(**load.sizes)
    scheduler, todo = driven.scheduler, list(load.arrivals)
    ends = {one.id: one.max_length for _, one in todo}
    for number in range(31 + 2 * sum(ends.values())):
        while todo and todo[0][0] <= number:
            driven.add(todo.pop(0)[1])
        there = [*scheduler.running, *scheduler.waiting]
        if there and number in load.cancelled:
            gone = there[load.cancelled[number] % len(there)]
            ends[gone.id] = len(gone.tokens)
            driven.end(gone)
        if scheduler:
            chunks = driven.plan()
            if number in load.no_slot and len(scheduler.running) > 1:
                assert driven.no_slot(chunks), "there was somebody to make room"
            else:
                driven.compute(chunks)
    assert not scheduler and not todo
    assert {one.id: len(one.tokens) for one in driven.ended} == ends
    assert scheduler.kv_used == 0


# -- what a step holds -----------------------------------------------------------------------------


def test_a_long_prompt_comes_in_chunks_beside_decoding_sequences() -> None:
    driven = SchedulerDriver(budget=64)
    short = [sequence(n, 4, 100) for n in range(3)]
    driven.add(*short)
    driven.step()
    long = sequence(9, 300, 5)
    driven.add(long)
    sizes = []
    while long.pending > 1:
        counts = {chunk.sequence.id: chunk.count for chunk in driven.step()}
        assert [counts[one.id] for one in short] == [1, 1, 1]
        sizes.append(counts["r9"])
    assert sizes == [61, 61, 61, 61, 56]


def test_decode_tokens_come_before_prompt_chunks_when_the_budget_is_short() -> None:
    """Also a prompt admitted before the others does not take their tokens."""
    driven = SchedulerDriver(sequences=4, budget=4)
    driven.add(sequence(0, 40, 5), *(sequence(n, 1, 20) for n in (1, 2)))
    seen = []
    for _ in range(30):
        driven.step()
        seen.append([one.pending for one in driven.scheduler.running])
    assert [1, 1, 1] in seen


def test_only_the_last_chunk_of_a_prompt_gives_logits() -> None:
    driven = SchedulerDriver(budget=10, sequences=2)
    driven.add(sequence(0, 25, 1))
    wanted = []
    while driven.scheduler:
        chunks = driven.plan()
        wanted += [chunk.wants_logits for chunk in chunks]
        driven.compute(chunks)
    assert wanted == [False, False, True]


def test_the_budget_is_never_too_small_for_one_token_of_each_sequence() -> None:
    assert SchedulerDriver(sequences=64, budget=32).scheduler.token_budget == 64


def test_no_more_run_than_there_are_places_and_they_are_used_again() -> None:
    driven = SchedulerDriver(sequences=2)
    driven.add(*(sequence(n, 2, 2) for n in range(6)))
    while driven.scheduler:
        driven.step()
        assert len(driven.scheduler.running) <= 2
    assert [one.id for one in driven.started] == ["r0", "r1", "r2", "r3", "r4", "r5"]


def test_steady_steps_end_before_anybody_does_and_before_the_cells() -> None:
    """The engine computes them without asking again; `SchedulerDriver` checks each."""
    for kv in (1000, 100):
        driven = SchedulerDriver(kv=kv, sequences=4, steady=True)
        driven.add(sequence(0, 10, 60), sequence(1, 10, 85))
        driven.step()
        driven.step()
        assert driven.steps > 30, "none were offered"
        driven.run()


def test_a_prompt_that_gets_one_token_a_step_is_not_steady() -> None:
    driven = SchedulerDriver(sequences=2, budget=2, steady=True)
    driven.add(sequence(0, 1, 60), sequence(1, 20, 5))
    driven.run()
    assert len(driven.ended) == 2


def test_there_are_no_steady_steps_while_somebody_may_soon_start() -> None:
    """There is a place, and room for it may be found at any time."""
    driven = SchedulerDriver(kv=60, sequences=4, steady=True)
    stream, waits = sequence(0, 20, 30), sequence(1, 45, 5)
    driven.add(stream, waits)
    while waits not in driven.started:
        before = driven.steps
        driven.step()
        assert driven.steps == before + 1
    assert stream in driven.ended
    driven.run()


# -- making room -----------------------------------------------------------------------------------


def test_preemption_takes_the_youngest_and_it_is_the_next_to_go_on() -> None:
    driven = SchedulerDriver(kv=30, sequences=4)
    old, middle, young, waits = (sequence(n, 8, 20) for n in range(4))
    driven.add(old, middle, young, waits)
    preempted: list[Sequence] = []
    while not preempted:
        driven.step()
        preempted = [one for one in (old, middle, young) if one.state is State.PREEMPTED]
    assert preempted == [young]
    assert list(driven.scheduler.waiting) == [young, waits]
    assert young.computed == 0 and len(young.tokens) > 8  # what it has made is kept
    assert driven.scheduler.preemptions == 1


def test_a_sequence_alone_is_never_preempted() -> None:
    driven = SchedulerDriver(kv=30)
    driven.add(sequence(0, 8, 20))
    driven.step()
    assert not driven.scheduler.reclaim()
    assert len(driven.scheduler.running) == 1 and driven.scheduler.preemptions == 0


def test_cached_sequences_are_evicted_before_any_is_preempted() -> None:
    driven = SchedulerDriver()
    driven.add(sequence(0, 8, 2))
    driven.run()
    driven.add(sequence(1, 8, 20), sequence(2, 8, 20))
    driven.step()
    assert driven.scheduler.kv_cached > 0
    assert driven.scheduler.reclaim()
    assert driven.scheduler.kv_cached == 0 and driven.scheduler.preemptions == 0
    assert driven.scheduler.reclaim()
    assert driven.scheduler.preemptions == 1


def test_after_no_slot_less_is_planned_until_something_ends() -> None:
    """The cache has shown that it holds less than it said."""
    driven = SchedulerDriver(kv=1000, budget=200)
    first, second, third = (sequence(n, 40, 10) for n in range(3))
    driven.add(first, second, third)
    chunks = driven.plan()
    assert len(chunks) == 3
    assert driven.no_slot(chunks)
    for _ in range(9):
        driven.step()
        assert driven.cells.used < 120  # what did not fit is not tried again
    driven.run()
    assert len(driven.ended) == 3


def test_a_cache_that_is_full_to_the_last_cell_serves_the_next_one() -> None:
    """Finished sequences that fill it exactly are in nobody's way."""
    driven = SchedulerDriver(kv=20)
    driven.add(sequence(0, 6, 5), sequence(1, 6, 5))  # the last token of each needs no cell
    driven.run()
    assert driven.scheduler.kv_cached == 20
    driven.add(sequence(9, 10, 3))
    driven.run()
    assert [one.id for one in driven.ended][-1] == "r9"


# -- ends ------------------------------------------------------------------------------------------


def test_finish_frees_cells_and_place_of_a_running_one_and_forgets_a_waiting_one() -> None:
    driven = SchedulerDriver(kv=100, sequences=1)
    scheduler = driven.scheduler
    running, waiting = sequence(0, 10, 5), sequence(1, 10, 5)
    driven.add(running, waiting)
    driven.step()
    assert scheduler.kv_used == 10
    assert scheduler.find("r0") is running and scheduler.find("r1") is waiting
    driven.end(waiting)
    assert scheduler.find("r1") is None and scheduler.kv_used == 10
    driven.end(running)
    assert scheduler.kv_used == 0 and scheduler.kv_cached == 10
    assert not scheduler


def test_a_sequence_that_starts_over_computes_its_changed_tokens() -> None:
    """As after a context shift: none of its old cells are used again."""
    driven = SchedulerDriver()
    one = sequence(0, 20, 30)
    driven.add(one)
    for _ in range(5):
        driven.step()
    del one.tokens[4:14]
    one.prompt_length -= 10
    one.max_length -= 10
    driven.scheduler.restart(one)
    assert one.state is State.PREEMPTED and driven.scheduler.kv_used == 0
    before = driven.computed["r0"]
    driven.step()
    assert driven.computed["r0"] - before == one.computed == len(one.tokens) - 1
    driven.run()
    assert driven.ended == [one]
