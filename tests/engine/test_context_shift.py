"""Context shift: an answer longer than the context goes on, forgetting what is in the middle."""

from __future__ import annotations

from itertools import pairwise

import pytest

from pinaivu_box.engine.messages import Named
from tests.support.draws import draw
from tests.support.engine_harness import (
    Heard,
    add,
    alone,
    assert_only_kept,
    engine_prompt,
    make,
    run,
    sampling,
)

CONTEXT = 80


def long_answer(name: str = "r", max_tokens: int = 300, seed: int = 1, text: str = "go") -> Heard:
    """`make` refuses positions beyond the context, and a cell that was not freed."""
    engine, runner = make(context=CONTEXT, shift=True)
    heard = run(engine, [add(name, text, max_tokens, seed=seed)])
    assert_only_kept(engine, runner)
    return heard


def test_an_answer_goes_on_beyond_the_context() -> None:
    heard = long_answer()
    assert len(heard.tokens["r"]) == 300 and heard.ends["r"] == "length"
    assert heard.text["r"] == bytes(heard.tokens["r"]).decode()


def test_the_deltas_say_how_many_tokens_were_forgotten() -> None:
    """As many as leave the rest within the context; half of what is after the beginning a time."""
    heard = long_answer()
    shifted, prompt = heard.shifted["r"], len(heard.prompts["r"])
    assert shifted == sorted(shifted) and shifted[0] == 0
    assert shifted[CONTEXT - prompt - 2] == 0  # nothing is forgotten before the context is full
    assert CONTEXT / 2 <= prompt + 300 - shifted[-1] <= CONTEXT
    steps = {after - before for before, after in pairwise(shifted)}
    kept = CONTEXT // 4
    assert steps == {0, (CONTEXT - kept) // 2}


def test_output_after_a_shift_follows_from_the_kept_tokens() -> None:
    """By hand: the beginning and the newest tokens, at positions that go on counting."""
    heard, count = long_answer(), 100
    _, runner = make(context=CONTEXT)
    tokens, position, said = list(heard.prompts["r"]), len(heard.prompts["r"]), []
    kept = min(len(tokens), CONTEXT // 4)
    for _ in range(count):
        said.append(draw(runner.logits(tokens), sampling(), position))
        tokens.append(said[-1])
        position += 1
        if len(tokens) == CONTEXT:
            del tokens[kept : kept + (CONTEXT - kept) // 2]
    assert heard.tokens["r"][:count] == said


def test_without_it_an_answer_ends_by_length_at_the_context() -> None:
    """Which is how it is unless it is asked for."""
    engine, _ = make(context=CONTEXT)
    heard = run(engine, [add("r", "go", 300)])
    assert heard.ends["r"] == "length"
    assert len(heard.prompts["r"]) + len(heard.tokens["r"]) == CONTEXT
    assert set(heard.shifted["r"]) == {0}


def test_without_a_limit_an_answer_ends_at_the_context_all_the_same() -> None:
    """It would never end."""
    engine, _ = make(context=CONTEXT, shift=True)
    heard = run(engine, [add("r", "go", None)])
    assert len(heard.prompts["r"]) + len(heard.tokens["r"]) == CONTEXT
    assert heard.ends["r"] == "length" and set(heard.shifted["r"]) == {0}


def test_a_stop_string_ends_a_shifted_answer() -> None:
    text = long_answer().text["r"]
    at = next(n for n in range(200, 290) if text.find(text[n : n + 3]) == n)
    engine, _ = make(context=CONTEXT, shift=True)
    heard = run(engine, [add("r", "go", 300, stop=[text[at : at + 3]])])
    assert heard.ends["r"] == "stop" and heard.text["r"] == text[:at]
    assert heard.shifted["r"][-1] >= 30 * 4  # it says what was forgotten, however it ends


@pytest.mark.parametrize("kv_tokens", [2000, 200])
def test_shifts_beside_others_change_nothing_that_is_said(kv_tokens: int) -> None:
    """Also on a cache that is too small for all, and for those that share the prompt."""
    adds = [add(f"r{n}", "go" * (n % 3), 60 * n + 5, seed=n // 2) for n in range(6)]
    engine, runner = make(context=CONTEXT, kv_tokens=kv_tokens, shift=True)
    heard = run(engine, adds)
    one_by_one = alone(adds, context=CONTEXT, shift=True)
    assert {one.id: heard.answer(one.id) for one in adds} == one_by_one
    assert (engine.scheduler.preemptions > 0) == (kv_tokens == 200)
    assert_only_kept(engine, runner)


@pytest.mark.parametrize("text", ["go", "go" * 12])
def test_a_shifted_answer_goes_on_after_any_token(text: str) -> None:
    """Another engine, with what the first one has made, forgets the same and says the same."""
    assert len(engine_prompt(text)) < CONTEXT
    whole = long_answer(max_tokens=150, text=text)
    tokens, shifted = whole.tokens["r"], whole.shifted["r"]
    for cut in (5, 20, 40, 60, 90, 149):
        engine, _ = make(context=CONTEXT, shift=True)
        rest = run(engine, [add("r", text, 150, output=tokens[:cut])])
        assert rest.tokens["r"] == tokens[cut:]
        assert rest.shifted["r"][-1] == shifted[-1]


def test_cached_and_queue_times_come_once_with_a_shift() -> None:
    heard = long_answer()
    assert len(heard.queue_ms["r"]) == len(heard.cached["r"]) == 1


def test_a_named_beginning_that_a_shift_has_cut_is_shared_no_more() -> None:
    text = "x" * 40
    engine, runner = make(context=120, shift=True)
    engine.receive(Named([text]))
    first = run(engine, [add("a", text, 5, scope="a", named=True)])
    second = run(engine, [add("b", text, 300, scope="b", named=True)])
    shared = len("<|im_start|>user\n" + text)
    assert (first.cached["a"], second.cached["b"]) == ([0], [shared])
    assert second.shifted["b"][-1] > 0 and shared > 120 // 4
    third = run(engine, [add("c", text, 5, scope="c", named=True)])
    assert third.cached["c"] == [shared]  # of the first one
    assert_only_kept(engine, runner)
