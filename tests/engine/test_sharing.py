"""What sequences share: prefixes that run, that are kept, and that are being computed."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pinaivu_box.engine.messages import Add, Cancel
from pinaivu_box.engine.sequence import Sequence
from tests.support.engine_harness import Heard, add, alone, assert_only_kept, finish, make, run
from tests.support.scheduler_driver import SchedulerDriver, sequence

LONG = list(range(200))


def cached(driven: SchedulerDriver) -> int:
    """How many finished sequences are kept."""
    return sum(map(driven.scheduler.prefixes.is_cached, range(driven.ids)))


def steps(driven: SchedulerDriver, count: int) -> None:
    for _ in range(count):
        driven.step()


# -- prefixes that are there -----------------------------------------------------------------------


def test_the_prefix_of_a_running_sequence_is_copied() -> None:
    driven = SchedulerDriver(budget=300)
    first, second = sequence(0, [*LONG, 1001], 50), sequence(1, [*LONG, 1002, 1003], 50)
    driven.add(first)
    driven.step()
    driven.add(second)
    chunks = driven.plan()
    assert driven.cells.moves == [("copy", first.sequence_id, second.sequence_id, 200)]
    assert second.cached_tokens == 200 and first.cached_tokens == 0
    assert [c.count for c in chunks if c.sequence is second] == [2]  # only what is its own
    driven.compute(chunks)
    assert driven.scheduler.kv_used == driven.cells.used == 201 + 1 + 2
    driven.run()


def test_a_conversation_that_goes_on_takes_over_its_cells() -> None:
    """Nothing is copied or computed again, and nothing of the old sequence stays behind."""
    driven = SchedulerDriver(budget=300)
    first = sequence(0, 100, 10)
    driven.add(first)
    driven.step()
    its_id = first.sequence_id
    driven.run()
    second = sequence(1, [*first.tokens, 7, 8, 9], 5)
    driven.add(second)
    driven.step()
    assert second.sequence_id == its_id and second.cached_tokens == 109
    assert "copy" not in driven.cells.kinds
    assert driven.computed["r1"] == 4  # the last token that the first one said, and the new ones
    driven.run()


def test_a_part_of_a_cached_sequence_is_copied_while_there_are_ids() -> None:
    driven = SchedulerDriver(budget=300, sequences=2, ids=4)
    driven.add(sequence(0, [*LONG, 1001], 5))
    driven.run()
    second = sequence(1, [*LONG[:150], 1002], 5)
    driven.add(second)
    driven.step()
    assert second.cached_tokens == 150 and driven.cells.kinds == ["copy"]
    driven.run()
    third = sequence(2, [*LONG, 1003], 5)  # the first one's cells are still all there
    driven.add(third)
    driven.step()
    assert third.cached_tokens == 200


@pytest.mark.parametrize(("shared", "moves"), [(150, ["truncate"]), (20, ["remove", "copy"])])
def test_without_a_free_id_a_cached_sequence_is_cut_or_evicted(
    shared: int, moves: list[str]
) -> None:
    """It is cut if half of it is used; else another one gives its id, and the part is copied."""
    driven = SchedulerDriver(budget=300, sequences=2, ids=2)
    driven.add(sequence(0, 10, 5), sequence(1, [*LONG, 1001], 5))
    driven.run()
    driven.cells.moves.clear()
    second = sequence(2, [*LONG[:shared], 1002], 5)
    driven.add(second)
    driven.step()
    assert second.cached_tokens == shared
    assert driven.cells.kinds == moves
    driven.run()


def test_the_last_token_of_a_prompt_is_computed_even_if_all_is_there() -> None:
    """Its logits are needed."""
    driven = SchedulerDriver(budget=300)
    driven.add(sequence(0, LONG, 5))
    driven.run()
    again = sequence(1, LONG, 5)
    driven.add(again)
    driven.step()
    assert again.cached_tokens == 199 and driven.computed["r1"] == 1


def test_cached_tokens_never_counts_the_sequences_own_output() -> None:
    """A later leg of a request finds the cells of the earlier one, also those of its output."""
    driven = SchedulerDriver(sequences=1, ids=4)
    one = sequence(0, 20, 30, tenant="a")
    driven.add(one)
    steps(driven, 10)
    resumed = sequence(1, one.tokens, 5)
    resumed.prompt_length = 20
    driven.end(one)
    driven.add(resumed)
    driven.step()
    assert resumed.computed > 20 and resumed.cached_tokens == 20


# -- prefixes that are being computed --------------------------------------------------------------


@pytest.mark.parametrize("budget", [16, 64, 250, 1000])
@pytest.mark.parametrize("own", [0, 3])
@pytest.mark.parametrize("output", [1, 2, 20])
def test_the_same_long_prompt_is_computed_once(budget: int, own: int, output: int) -> None:
    """Also if all come together: the later ones wait for what the first one computes."""
    driven = SchedulerDriver(kv=3000, budget=budget)
    family = [
        sequence(n, LONG + [1000 * (n + 1) + m for m in range(own)], output) for n in range(6)
    ]
    driven.add(*family)
    driven.run()
    assert len(driven.ended) == 6
    # What remains of the prompt may be too little to wait for.
    most = len(LONG) + 6 * (own + output) + 5 * 32
    assert sum(driven.computed.values()) <= most
    if budget >= 250:  # the whole prompt in one step
        assert sum(driven.computed.values()) <= len(LONG) + 6 * (own + output)


@pytest.mark.parametrize("cancelled", [True, False])
def test_a_sequence_that_waits_for_a_prefix_starts_after_its_source_ends(cancelled: bool) -> None:
    """Ended in the same step in which it had computed the prefix, or before."""
    driven = SchedulerDriver(kv=3000, budget=300)
    first, second = sequence(0, LONG, 20 if cancelled else 1), sequence(1, LONG, 20)
    driven.add(first, second)
    driven.step()
    assert second not in driven.started
    if cancelled:
        driven.end(first)
    driven.run()
    assert second in driven.ended and second.cached_tokens == 199


def test_a_sequence_does_not_wait_for_a_short_prefix() -> None:
    driven = SchedulerDriver(budget=64)
    driven.add(sequence(0, [*LONG[:20], 1001], 5), sequence(1, [*LONG[:20], 1002], 5))
    driven.step()
    assert len(driven.started) == 2


def test_a_sequence_that_waits_for_a_prefix_delays_no_other() -> None:
    driven = SchedulerDriver(budget=300)
    other = sequence(2, 10, 5)
    driven.add(sequence(0, LONG, 5), sequence(1, LONG, 5), other)
    driven.step()
    assert [one.id for one in driven.started] == ["r0", "r2"]


def test_the_engine_computes_a_shared_prompt_once_and_says_so() -> None:
    """Whole answers, over a model that looks at all of its cells."""
    for size in (32, 400):
        adds = [add(f"r{n}", "y" * 100, max_tokens=1 + n % 3, seed=n) for n in range(8)]
        engine, runner = make(token_budget=size)
        heard = run(engine, adds)
        prompt = len(heard.prompts["r0"])
        assert {one.id: heard.answer(one.id) for one in adds} == alone(adds)
        assert heard.cached.pop("r0") == [0]
        # Of a prompt that comes in chunks the rest may be too short to wait for.
        assert all(prompt - 32 <= found < prompt for (found,) in heard.cached.values())
        assert runner.computed < prompt + 8 * (32 if size < prompt else 4)
        assert heard.load.tokens_cached == sum(sum(found) for found in heard.cached.values())
        assert_only_kept(engine, runner)


def test_cancelling_who_computes_a_shared_prompt_leaves_the_others_going() -> None:
    for taken in range(1, 5):
        engine, _ = make(token_budget=100)
        heard = Heard()
        engine.receive(add("s", "s", max_tokens=100))
        heard.take(engine.step())
        adds = [add(name, "y" * 100) for name in ("a", "b", "c")]
        for one in adds:
            engine.receive(one)
        for _ in range(taken):
            heard.take(engine.step())
        engine.receive(Cancel("a"))
        finish(engine, heard)
        assert heard.ends == {"s": "length", "a": "cancelled", "b": "length", "c": "length"}
        assert heard.answer("b") == alone(adds)["b"]


# -- scopes ----------------------------------------------------------------------------------------

SCOPES = {"another scope": "other", "its own only": ""}


@pytest.mark.parametrize("whose", SCOPES)
@pytest.mark.parametrize("when", ["together", "beside", "after"])
def test_nothing_is_shared_beyond_a_scope(whose: str, when: str) -> None:
    """Whether the other one is being computed (nobody waits for it), runs on, or has ended."""
    driven = SchedulerDriver(kv=3000, budget=1000, ids=20)
    first, second = sequence(0, LONG, 20), sequence(1, LONG, 20, scope=SCOPES[whose])
    third = sequence(2, LONG, 20, scope=SCOPES[whose])
    driven.add(first)
    if when != "together":
        driven.step()
    if when == "after":
        driven.run()
    driven.add(second)
    driven.step()
    assert second in driven.started and driven.computed["r1"] == 200
    driven.run()
    assert first.cached_tokens == second.cached_tokens == 0
    assert "copy" not in driven.cells.kinds
    driven.add(third)  # within a scope it goes on as ever
    driven.run()
    assert third.cached_tokens == (199 if SCOPES[whose] else 0)


def test_a_private_sequence_leaves_no_cells_behind() -> None:
    """Also if it has to step back for another tenant in the middle."""
    driven = SchedulerDriver(kv=3000, sequences=2, budget=500, ids=20)
    private = [sequence(n, LONG, 100, scope="") for n in range(2)]
    driven.add(*private)
    steps(driven, 3)
    driven.add(sequence(2, 10, 50, tenant="another"))
    steps(driven, 3)
    waiting = [one for one in private if one not in driven.scheduler.running]
    assert len(waiting) == 1 and waiting[0] in driven.started
    assert driven.scheduler.kv_cached == 0
    driven.run()
    assert set(private) <= set(driven.ended)
    assert cached(driven) == 1  # the other tenant's
    for scope in ("", "s", "t"):
        one = sequence(5, LONG, 5, scope=scope)
        assert driven.scheduler.prefixes.match(one.tokens, one.share) == (0, -1)


@pytest.mark.parametrize("together", [False, True])
def test_a_named_prefix_is_shared_beyond_scopes_and_nothing_after_it(together: bool) -> None:
    driven = SchedulerDriver(kv=3000, budget=300, ids=20)
    first = sequence(0, [*LONG, 7, 7, 7], 5, scope="a", public=100)
    second = sequence(1, [*LONG, 7, 7, 7], 5, scope="b", public=100)
    driven.add(first)
    if not together:
        driven.run()
    driven.add(second)
    driven.run()
    assert second.cached_tokens == 100
    for scope, public, found in (("c", 100, 100), ("c", 0, 0), ("", 100, 0), ("b", 100, 202)):
        one = sequence(5, [*LONG, 7, 7, 7], 5, scope=scope, public=public)
        driven.add(one)
        driven.step()
        assert one.cached_tokens == found
        driven.end(one)


def test_an_account_with_other_prompts_before_still_shares_a_named_prefix() -> None:
    """All prompts of a template begin alike: what it has of its own does not hide the others'."""
    driven = SchedulerDriver(kv=3000, budget=300, ids=20)
    for n, scope in enumerate("ab"):
        driven.add(sequence(n, [*LONG[:50], 5000 + n], 2, scope=scope))
        driven.run()
    for n, scope in enumerate("ab"):
        one = sequence(10 + n, [*LONG, 6000 + n], 2, scope=scope, public=200)
        driven.add(one)
        driven.run()
    assert one.cached_tokens == 200


def test_many_scopes_keep_no_more_than_there_is() -> None:
    driven = SchedulerDriver(kv=500, sequences=2, ids=6, budget=300)
    for n in range(30):
        driven.add(sequence(n, LONG[: 50 + n], 5, scope=f"s{n % 7}", tenant=f"t{n % 3}"))
        driven.run()
        assert driven.scheduler.prefixes.cells <= 500
        assert cached(driven) <= 6


def test_a_guess_costs_the_same_whether_it_is_right() -> None:
    """Letter by letter, over the whole of an engine: tokens found, tokens computed, steps."""
    secret = "The launch code of customer A is 7391-XQ"
    for scope in ("b", ""):
        seen = set()
        for guess in (secret[:-1], secret[:-2] + "?", "?" * (len(secret) - 1)):
            engine, runner = make(token_budget=16)
            run(engine, [add("victim", secret, scope="a")])
            engine.receive(add("runs", secret, scope="a", max_tokens=100))
            heard = Heard()
            heard.take(engine.step())
            before, steps = runner.computed, 0
            engine.receive(add("guess", guess, scope=scope, max_tokens=1))
            while "guess" not in heard.ends:
                heard.take(engine.step())
                steps += 1
            seen.add((heard.cached["guess"][0], runner.computed - before, steps))
        assert len(seen) == 1 and seen.pop()[0] == 0


# -- pressure --------------------------------------------------------------------------------------


def test_under_pressure_the_least_recently_used_goes_first() -> None:
    """The first one was used again, so the second one is the oldest."""
    driven = SchedulerDriver(kv=400, sequences=2, ids=10)
    kept = [sequence(n, 100, 2) for n in range(3)]
    for one in kept:
        driven.add(one)
        driven.run()
    driven.add(sequence(3, [*kept[0].tokens, 1], 2))
    driven.run()
    driven.add(sequence(4, 150, 2))
    driven.run()
    found = []
    for number, one in enumerate(kept):
        again = sequence(10 + number, one.tokens[:100], 1)
        found.append(driven.scheduler.prefixes.match(again.tokens, again.share)[0])
    assert found == [100, 0, 100]


def test_cached_sequences_never_delay_an_arrival() -> None:
    """Prompts are read in as few steps beside a full cache of kept ones as beside an empty one."""

    def read(fill: int) -> int:
        driven = SchedulerDriver(kv=3000, sequences=16, ids=256, budget=512)
        for n in range(fill):
            driven.add(sequence(n, 147, 2))
            driven.run()
        before = driven.steps
        family = [sequence(1000 + n, 150, 50) for n in range(16)]
        driven.add(*family)
        while any(len(one.tokens) == one.prompt_length for one in family):
            driven.step()
        return driven.steps - before

    assert read(fill=0) == 5
    assert read(fill=20) <= 6


@st.composite
def families(draw: st.DrawFn) -> list[Sequence]:
    beginnings = [[n] * 40 for n in range(3)]
    return [
        sequence(
            n,
            [*draw(st.sampled_from(beginnings))[draw(st.integers(0, 39)) :], 1000 + n],
            draw(st.integers(1, 15)),
            tenant=draw(st.sampled_from("ab")),
            scope=draw(st.sampled_from(["a", "b", ""])),
        )
        for n in range(draw(st.integers(2, 14)))
    ]


@settings(max_examples=100)
@given(families(), st.integers(60, 200), st.integers(1, 5))
def test_without_sharing_nothing_is_kept_copied_or_cut(
    family: list[Sequence], kv: int, places: int
) -> None:
    """The state of a recurrent model can only be thrown away."""
    driven = SchedulerDriver(kv=kv, sequences=places, ids=20, sharing=False)
    driven.add(*family)
    while driven.scheduler:
        driven.step()
        assert driven.scheduler.kv_cached == 0
    assert set(driven.cells.kinds) <= {"remove"}
    assert all(one.cached_tokens == 0 for one in family)
    assert driven.cells.used - driven.scheduler.kv_used in range(200)
    assert len(driven.ended) == len(family)


def test_an_engine_without_sharing_says_the_same() -> None:
    """Nor are there drafts: a rejected one would have to be cut."""
    adds: list[Add] = [add(f"r{n}", "ab" * 40, max_tokens=30, seed=n) for n in range(6)]
    sizes: dict[str, Any] = {"kv_tokens": 400, "sharing": False, "draft": 4}
    engine, _ = make(**sizes)
    heard = run(engine, adds)
    assert {one.id: heard.answer(one.id) for one in adds} == alone(adds)
    assert all(found == [0] for found in heard.cached.values())
    assert heard.load.kv_cached == 0 and engine.scheduler.preemptions > 0
