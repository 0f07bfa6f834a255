"""The token scheduler alone: random workloads on a tight cache, and what a step holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from pinaivu_box.engine.sequence import Sequence, State
from tests.engine.driven import Driven, own_words, sequence


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
def loads(draw: st.DrawFn) -> Load:
    kv = draw(st.integers(8, 80))
    alike = draw(st.booleans())
    beginnings = [[], *([n] * draw(st.integers(1, kv - 2)) for n in (1, 2))] if alike else [[]]
    arrivals = []
    for number in range(draw(st.integers(1, 12))):
        begin = draw(st.sampled_from(beginnings))
        own = draw(st.integers(1, kv - 1 - len(begin)))
        prompt = begin + [1000 * (number + 1) + n for n in range(own)]
        # As the engine does it: prompt and output together fit into the cache.
        output = draw(st.integers(1, min(kv - len(prompt), 25)))
        one = sequence(
            number,
            prompt,
            output,
            tenant=draw(st.sampled_from("abc")),
            weight=draw(st.sampled_from([1.0, 1.0, 3.0])),
            priority=draw(st.integers(-1, 1)),
            lookup=alike,
        )
        arrivals.append((draw(st.integers(0, 30)), one))
    steps = st.integers(0, 40)
    sizes = {
        "kv": kv,
        "sequences": draw(st.integers(1, 6)),
        "budget": draw(st.integers(1, 40)),
        "ids": draw(st.integers(0, 9)),
        "sharing": draw(st.booleans()),
        "draft": draw(st.integers(0, 4)),
        "said": shared_words if alike else own_words,
    }
    return Load(
        sizes=sizes,
        arrivals=sorted(arrivals, key=lambda a: (a[0], a[1].arrival)),
        no_slot=draw(st.sets(steps, max_size=6)),
        cancelled=draw(st.dictionaries(steps, st.integers(0, 20), max_size=3)),
    )


@settings(max_examples=int(__import__("os").environ.get("EX", "600")), deadline=None)
@given(loads())
def test_every_sequence_finishes_within_bounds_whatever_comes(load: Load) -> None:
    """Random arrivals on a tight cache: all limits hold in each step and nobody starves."""
    driven = Driven(**load.sizes)
    scheduler, todo = driven.scheduler, list(load.arrivals)
    ends = {one.id: one.max_length for _, one in todo}
    most = 31 + 3 * sum(ends.values())
    for number in range(most):
        while todo and todo[0][0] <= number:
            driven.add(todo.pop(0)[1])
        there = [*scheduler.running, *scheduler.waiting]
        if there and number in load.cancelled:
            gone = there[load.cancelled[number] % len(there)]
            ends[gone.id] = len(gone.tokens)
            driven.end(gone)
        if scheduler:
            plan = driven.plan()
            if number in load.no_slot and len(scheduler.running) > 1:
                assert driven.no_slot(plan)  # there was somebody to make room
            else:
                driven.compute(plan)
    assert not scheduler and not todo
    assert {one.id: len(one.tokens) for one in driven.ended} == ends
    assert scheduler.kv_used == 0
