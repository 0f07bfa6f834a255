"""Exact mode over a model whose words depend on how each of its cells was computed: in tiles or row
by row, as ggml's attention would.  So a token that takes another way changes an answer.

`test_exact_bits` has the same promises of llama.cpp itself.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pinaivu_box.engine import exact_path, exactness, llama_exact
from pinaivu_box.engine.exact_path import BLOCK, MOST_ROWS, image_part, in_block, names
from pinaivu_box.engine.messages import Add, SavedPrefixes
from pinaivu_box.engine.prefix_store import PrefixStore
from pinaivu_box.engine.runner import Batch
from tests.support.engine_harness import (
    Heard,
    add,
    finish,
    run,
)
from tests.support.path_runner import LONG, made, others


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
    engine, runner = made(pool=pool)
    requests = others(beside)
    requests.insert(beside // 2, one())
    assert said(run(engine, requests)) == expected()
    assert runner.largest <= 512 + 63


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
    """Once after each of several tokens: what it has made is computed in rows again."""
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
    assert third.cached["third"][0] >= len(LONG) - BLOCK


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 400), min_size=2, max_size=5), st.integers(0, 40))
def test_whatever_of_others_is_found_it_was_computed_in_the_same_way(
    lengths: list[int], answer: int
) -> None:
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


def test_a_chat_that_goes_on_finds_the_blocks_of_the_turn_before() -> None:
    engine, _ = made()
    prompt = list(range(1, 101))
    first = run(engine, [one("first", prompt=prompt, max_tokens=60)])
    longer = [*prompt, *first.tokens["first"], 5, 6, 7]
    request = one("second", prompt=longer)
    second = run(engine, [request])
    assert second.cached["second"] == [BLOCK]  # the rest was computed in rows, and is in blocks now
    assert said(second, "second") == expected(request)


def test_it_is_the_same_after_a_restart(tmp_path: Path) -> None:
    def store(binding: str = "exact") -> PrefixStore:
        return PrefixStore(SavedPrefixes(str(tmp_path), bytes(32), 10**7), binding)

    request = one(text=LONG + "and then?")
    engine, _ = made(store=store())
    run(engine, [one()])
    assert engine.save_prefixes().prefixes
    heard = run(made(store=store())[0], [request])
    assert heard.load.tokens_restored > 0 and heard.cached["r"][0] > BLOCK
    assert said(heard) == expected(request)


def test_it_is_the_same_after_a_context_shift() -> None:
    """All that a shift has left is computed anew, in blocks: also in another leg, and split."""
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
    """Little room: blocks wait for it, others are preempted, and nobody waits for ever."""
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


# -- what the tests above would not see is no test -------------------------------------------------


BROKEN: dict[str, tuple[Any, str, Any]] = {
    "blocks that are cut": (exact_path, "whole_blocks", lambda tokens: tokens),
    "cells of another way": (exact_path, "names", lambda tokens, *_: tokens),
    "a block that is begun": (exact_path, "cut", lambda length, _: length),
    "no blocks": (exact_path, "in_block", lambda position, given, images=(): position % 3 == 0),
}


@pytest.mark.parametrize("what", BROKEN)
def test_it_is_seen_if_a_token_takes_another_way(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By another answer, or since the runner is given what is no block."""
    prompt = list(range(1, 101))
    begun = one("a", prompt=prompt, max_tokens=70)
    prompt = [*prompt, *expected(begun)[0], 3, 4]
    requests = [begun, *(one(f"b{n}", prompt=prompt[:n]) for n in (90, 120, len(prompt)))]
    requests.append(one("c", prompt=[*prompt[:40], *([7, 9] * 100)]))
    answers = [expected(request) for request in requests]

    def check() -> None:
        engine, _ = made(budget=100)
        for request, answer in zip(requests, answers, strict=True):
            assert said(run(engine, [request]), request.id) == answer

    check()
    monkeypatch.setattr(*BROKEN[what])
    with pytest.raises(AssertionError):
        check()


# -- one function at a time ------------------------------------------------------------------------


def test_the_way_follows_from_the_place() -> None:
    assert [in_block(p, 130) for p in (0, 63, 64, 127, 128, 129, 500)] == [True] * 4 + [False] * 3
    assert not in_block(0, 63)
    assert names(list(range(130)), 0, 130)[126:] == [126, 127, ~128, ~129]
    assert names([5, 6], 127, 130) == [5, ~6]
    assert names([5, 6], 300, 130) == [~5, ~6]


@given(st.integers(1, 2000), st.integers(1, 700))
def test_an_image_is_cut_into_blocks_at_least(cells: int, budget: int) -> None:
    left, parts = cells, []
    while left:
        parts.append(image_part(left, budget))
        left -= parts[-1]
    assert sum(parts) == cells and min(parts) >= min(cells, BLOCK)
    assert max(parts) <= max(budget, 2 * BLOCK)


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 63)), min_size=1, max_size=20))
def test_a_pool_gets_fewer_rows_than_a_block_at_a_time(counts: list[tuple[int, int]]) -> None:
    ids = sorted(sequence_id for sequence_id, count in counts for _ in range(count))
    batch = Batch.of(ids, range(len(ids)), ids, [1] * len(ids))
    parts = llama_exact.parts(batch, pool=True)
    assert sum(len(part.tokens) for part in parts) == len(ids)
    assert all(len(part.tokens) <= MOST_ROWS for part in parts)
    assert len(parts) == 1 or min(len(part.tokens) for part in parts) > 16
    assert llama_exact.parts(batch, pool=False) == [batch]


def test_a_row_that_would_be_alone_gets_company() -> None:
    def positions(ids: list[int], at: int, **more: Any) -> dict[int, int]:
        places = [at + ids[:n].count(each) for n, each in enumerate(ids)]
        batch = Batch.of(ids, places, ids, [1] * len(ids), len(ids))
        company, extra = llama_exact.with_company(batch, **{"pool": False, "ubatch": 512, **more})
        assert len(company.tokens) == len(ids) + len(extra)
        assert company.outputs.sum() == len(ids)
        assert sorted(company.sequence_ids.tolist()) == company.sequence_ids.tolist()
        return extra

    assert positions([3], 600) == {3: 601}
    assert positions([3], 100) == {}  # of so few cells there is one way only
    assert positions([3], 100, pool=True) == {3: 101}
    assert positions([3, 4], 600) == {}  # computed together
    assert positions([3, 5], 600) == {3: 601, 5: 601}  # not: their ids do not follow one another
    assert positions([3, 4, 4], 600) == {4: 602}
    assert positions([3, 4, 4, 4], 600) == {}
    assert positions([3, 5], 600, pool=True) == {}


SETUP = exactness.Setup(frozenset({"q8_0", "f32"}), "haswell", "llama.cpp 1", fixed_split=1)


@pytest.mark.parametrize(
    ("changed", "by_itself", "if_wanted"),
    [
        ({}, True, True),
        ({"fixed_split": 0}, False, True),
        ({"pool": True}, False, False),
        ({"pool": True, "fixed_split": 2}, True, True),
        ({"weights": frozenset({"q4_K"})}, False, False),
        ({"weights": frozenset({"q4_K", "q6_K", "f32"}), "fixed_split": 2}, True, True),
        ({"weights": frozenset({"q2_K"}), "fixed_split": 2}, False, False),
        ({"weights": frozenset({"f16"}), "fixed_split": 2}, False, False),
        ({"fixed_split": 2, "variant": "ivybridge"}, False, False),
        ({"fixed_split": 2, "variant": "alderlake"}, False, False),
        ({"fixed_split": 2, "variant": "zen4"}, True, True),
        ({"variant": "zen4"}, False, False),
        ({"kv_type": "q8_0", "fixed_split": 2}, True, True),
        ({"experts": True, "fixed_split": 2}, True, True),
        ({"weights": frozenset()}, False, False),
        ({"kv_type": "q8_0"}, False, False),
        ({"plain": False}, False, False),
        ({"windows": True}, False, False),
        ({"windows": True, "fixed_split": 2}, True, True),
        ({"states": True}, False, False),
        ({"experts": True}, False, False),
        ({"adapted": True}, False, False),
    ],
)
def test_exactness_is_promised_where_it_holds(
    changed: dict[str, Any], by_itself: bool, if_wanted: bool
) -> None:
    setup = replace(SETUP, **changed)
    assert bool(exactness.of("auto", setup)) is by_itself
    assert bool(exactness.of(True, setup)) is if_wanted
    assert exactness.of(False, setup) == ""
    if if_wanted:
        assert exactness.of(True, setup) == f"bitwise:{setup.variant} llama.cpp 1 {setup.kv_type}"
