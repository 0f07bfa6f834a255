"""The promises of exactness that the engine itself keeps, over a model whose words depend on all
tokens before them, and where they are made.

`test_exact_bits` has the same promises of llama.cpp, whose rows have to come out the same.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pinaivu_box.engine import exactness
from pinaivu_box.engine.messages import Add, SavedPrefixes
from pinaivu_box.engine.prefix_store import PrefixStore
from tests.support.engine_harness import (
    Heard,
    add,
    finish,
    run,
)
from tests.support.exact_runner import LONG, made, others


def one(name: str = "r", text: str = LONG, **more: Any) -> Add:
    return add(name, text, **{"max_tokens": 40, "logprobs": 2, "seed": 7, **more})


def said(heard: Heard, name: str = "r") -> tuple[list[int], Any]:
    return heard.tokens[name], heard.logprobs[name]


def expected(request: Add | None = None, **more: Any) -> tuple[list[int], Any]:
    """What is said alone, in one way of splitting it."""
    request = request or one()
    return said(run(made(**more)[0], [request]), request.id)


@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("beside", [1, 15, 63])
def test_an_answer_is_the_same_beside_others(beside: int, pool: bool) -> None:
    engine, _ = made(pool=pool)
    requests = others(beside)
    requests.insert(beside // 2, one())
    assert said(run(engine, requests)) == expected()


@pytest.mark.parametrize("budget", [32, 64, 100, 200, 448, 512, 2048])
def test_it_is_the_same_however_its_prompt_is_split(budget: int) -> None:
    assert expected(budget=budget) == expected()


@pytest.mark.parametrize("length", [1, 62, 63, 64, 65, 127, 128, 129, 640])
def test_prompts_of_all_lengths_are_read(length: int) -> None:
    request = one(prompt=[n % 200 for n in range(length)], max_tokens=3)
    alone = run(made()[0], [request])
    heard = run(made()[0], [*others(5), request])
    assert heard.ends["r"] == "length" and said(heard) == said(alone)


@pytest.mark.parametrize("draft", [3, 31, 63])
def test_it_is_the_same_with_drafts(draft: int) -> None:
    """The text repeats itself, so that there is something to draft."""
    request = one(text="one two three " * 20, prediction="q w e r t y " * 30)
    engine, _ = made(draft=draft)
    heard = run(engine, [request])
    assert heard.load.tokens_drafted > 0
    assert said(heard) == expected(request)


@pytest.mark.parametrize("pool", [False, True])
def test_it_is_the_same_if_it_was_preempted(pool: bool) -> None:
    """Once after each of several tokens."""
    engine, runner = made(pool=pool)
    heard = Heard()
    engine.receive(add("old", "x" * 200, 100))
    engine.receive(one())
    while len(heard.tokens.get("r", [])) < 36:
        heard.take(engine.step())
        if len(heard.tokens.get("r", [])) % 9 == 8:
            while engine.scheduler.preemptions < len(heard.tokens["r"]) // 9 + 1:
                assert engine.scheduler.reclaim()
    finish(engine, heard)
    assert engine.scheduler.preemptions >= 3
    assert said(heard) == expected()
    assert runner.computed > 3 * len(LONG)


@pytest.mark.parametrize("cut", [1, 13, 39])
def test_another_leg_goes_on_with_the_very_tokens(cut: int) -> None:
    tokens, logprobs = expected()
    heard = run(made()[0], [*others(3), one(output=tokens[:cut])])
    assert said(heard) == (tokens[cut:], logprobs[cut:])


def test_it_is_the_same_with_a_warm_cache() -> None:
    engine, _ = made()
    heard = run(engine, [one("first"), one("second")])
    third = run(engine, [one("third")])
    assert said(heard, "first") == said(heard, "second") == said(third, "third") == expected()
    assert third.cached["third"] == [len(third.prompts["third"]) - 1]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 400), min_size=2, max_size=5), st.integers(0, 40))
def test_whatever_of_others_is_found_an_answer_is_the_same(lengths: list[int], answer: int) -> None:
    """Prompts that begin alike, of many lengths, some of which go on with an answer."""
    text = [100 + n % 20 for n in range(500)]
    engine, _ = made(ids=8)
    spoken: list[int] = []
    for number, length in enumerate(lengths):
        prompt = [*text[:length], *spoken[:answer]]
        request = one(f"r{number}", prompt=prompt, max_tokens=answer + 1)
        heard = run(engine, [request])
        spoken = heard.tokens[request.id]
        assert said(heard, request.id) == expected(request)


def test_a_chat_that_goes_on_finds_all_of_the_turn_before() -> None:
    engine, _ = made()
    prompt = list(range(1, 101))
    first = run(engine, [one("first", prompt=prompt, max_tokens=60)])
    longer = [*prompt, *first.tokens["first"], 5, 6, 7]
    request = one("second", prompt=longer)
    second = run(engine, [request])
    assert second.cached["second"] == [len(prompt) + 59]  # its last token was not computed
    assert said(second, "second") == expected(request)


def test_it_is_the_same_after_a_restart(tmp_path: Path) -> None:
    def store(binding: str = "exact") -> PrefixStore:
        return PrefixStore(SavedPrefixes(str(tmp_path), bytes(32), 10**7), binding)

    request = one(text=LONG + "and then?")
    engine, _ = made(store=store())
    run(engine, [one()])
    assert engine.save_prefixes().prefixes
    heard = run(made(store=store())[0], [request])
    assert heard.load.tokens_restored > 0 and heard.cached["r"][0] > 64
    assert said(heard) == expected(request)


def test_it_is_the_same_after_a_context_shift() -> None:
    """All that a shift has left is computed anew: also in another leg, and split."""
    request = one(text="x" * 100, max_tokens=400)
    sizes: dict[str, Any] = {"context": 300, "shift": True}
    tokens, logprobs = expected(request, **sizes)
    beside = run(made(**sizes)[0], [*others(9)[:3], request])
    assert max(beside.shifted["r"]) > 0
    assert said(beside) == (tokens, logprobs)
    assert expected(request, budget=64, **sizes) == (tokens, logprobs)
    for cut in (150, 250, 399):
        leg = run(made(**sizes)[0], [replace_output(request, tokens[:cut])])
        assert said(leg) == (tokens[cut:], logprobs[cut:])


def replace_output(request: Add, tokens: list[int]) -> Add:
    return one(text="x" * 100, max_tokens=request.max_tokens, output=tokens)


def test_log_probabilities_of_a_prompt_are_the_same() -> None:
    request = one(echo=True)
    heard = run(made()[0], [*others(7), request])
    assert said(heard) == expected(request, budget=64)
    assert len(heard.logprobs["r"]) == len(heard.prompts["r"]) + 40


def test_a_tight_cache_ends_all_the_same() -> None:
    """Little room: some are preempted, and nobody waits for ever."""
    requests = [one(f"r{n}", f"{n} {LONG[:99]}", seed=n, max_tokens=120) for n in range(6)]
    engine, runner = made(pool=True, kv_tokens=1000, cells=900, ids=64)
    heard = run(engine, requests)
    assert engine.scheduler.preemptions > 0
    for request in requests:
        assert said(heard, request.id) == expected(request)
    assert runner.used == engine.scheduler.prefixes.cells


def test_a_long_prompt_does_not_stop_the_streams() -> None:
    engine, _ = made(budget=64)
    heard = Heard()
    for number in range(4):
        engine.receive(add(f"s{number}", "go", 60, seed=number))
    for _ in range(4):
        heard.take(engine.step())
    engine.receive(one(text=LONG * 3))
    while "r" not in heard.tokens:
        before = [len(heard.tokens[f"s{number}"]) for number in range(4)]
        for _ in range(2):
            heard.take(engine.step())
        after = [len(heard.tokens[f"s{number}"]) for number in range(4)]
        assert all(b > a for a, b in zip(before, after, strict=True))


# -- where it is promised --------------------------------------------------------------------------


SETUP = exactness.Setup(frozenset({"q8_0", "f32"}), "haswell", "llama.cpp 1", fixed_split=4)


@pytest.mark.parametrize(
    ("changed", "hindrance"),
    [
        ({}, ""),
        ({"weights": frozenset({"q4_K", "q6_K", "f32"})}, ""),
        ({"weights": frozenset({"f16", "bf16"})}, ""),
        ({"variant": "zen4"}, ""),
        ({"kv_type": "q8_0"}, ""),
        ({"fixed_split": 0}, "not the one that build/ makes"),
        ({"fixed_split": 3}, "not the one that build/ makes"),
        ({"weights": frozenset({"q2_K", "q8_0"})}, "weights of type q2_K"),
        ({"weights": frozenset({"q3_K", "f16"})}, "weights of type q3_K"),
        ({"weights": frozenset()}, "weights of type unknown"),
        ({"variant": "ivybridge"}, "the CPU variant ivybridge: set cpu_variant"),
        ({"kv_type": "q4_0"}, "a cache of type q4_0"),
        ({"plain": False}, "it does not compute on the CPU alone"),
        ({"states": True}, "the model is recurrent"),
        ({"adapted": True}, "the model has LoRA adapters"),
    ],
)
def test_exactness_is_promised_where_it_holds(changed: dict[str, Any], hindrance: str) -> None:
    setup = replace(SETUP, **changed)
    assert setup.hindrance.endswith(hindrance) and bool(setup.hindrance) is bool(hindrance)
    promised = "" if hindrance else f"bitwise:{setup.variant} llama.cpp 1+4 {setup.kv_type}"
    assert exactness.of("auto", setup) == exactness.of(True, setup) == promised
    assert exactness.of(False, setup) == ""
