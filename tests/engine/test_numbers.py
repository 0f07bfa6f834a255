"""What a proof commits to of the numbers: the tokens that were reported and their raw logits,
whatever adjusted the draws, and however the tokens came to be computed."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from typing import Any

import pytest

from pinaivu_box.engine.fake_runner import END
from pinaivu_box.engine.messages import Add, Cancel, Constraint
from tests.support.engine_harness import Heard, StrictRunner, add, assorted, make, run, sampling

BENT: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "top-k": {},
    "without top-k": {"top_k": 0, "top_p": 1.0, "min_p": 0.0},
    "typical": {"typical_p": 0.5},
    "penalties": {"frequency_penalty": 1.5, "presence_penalty": -0.5, "repeat_penalty": 1.3},
    "biases": {"logit_bias": {str(ord("e")): 6.0, str(ord("q")): -100.0}},
    "no end": {"ignore_eos": True, "logit_bias": {str(END): 100.0}},
    "a late end": {"min_tokens": 6, "temperature": 1.5},
}


def expected(runner: StrictRunner, cells: list[int], made: Sequence[int]) -> bytes:
    """Of tokens that were made one after another in a sequence with these cells before them."""
    digest, cells = hashlib.sha256(), list(cells)
    for token in made:
        digest.update(struct.pack("<If", token, runner.logits(cells)[token]))
        cells.append(token)
    return digest.digest()


def check(heard: Heard, runner: StrictRunner, name: str = "r") -> None:
    made = heard.tokens.get(name, [])
    assert heard.numbers[name] == expected(runner, heard.prompts[name], made)


@pytest.mark.parametrize("bent", BENT.values(), ids=[*BENT])
@pytest.mark.parametrize("draft", [0, 7])
def test_they_are_the_models_own_whatever_bends_the_draw(bent: dict[str, Any], draft: int) -> None:
    """With steps without a plan, and with drafts; beside others that are bent otherwise."""
    engine, runner = make(draft=draft, can_end=True)
    kinds = [sampling(seed=n, **values) for n, values in enumerate(BENT.values())]
    others = [
        add(f"o{n}", f"other {n}", 30, sampling=kind, tenant=f"t{n}")
        for n, kind in enumerate(kinds)
    ]
    mine = add(text="abc abc abc abc", max_tokens=40, sampling=sampling(**{"seed": 9, **bent}))
    heard = run(engine, [*others, mine])
    assert heard.tokens["r"]
    for name in heard.ends:
        check(heard, runner, name)


def test_what_a_grammar_forces_counts_with_its_own_logit() -> None:
    engine, runner = make(draft=5)
    constraint = Constraint("regex", "The answer is (yes|no), and [a-f]{9}!")
    biased = sampling(frequency_penalty=2.0)
    heard = run(engine, [add(max_tokens=60, constraint=constraint, sampling=biased)])
    assert heard.text["r"].endswith("!") and heard.ends["r"] == "stop"
    check(heard, runner)


@pytest.mark.parametrize("draft", [0, 9])
def test_they_end_with_what_was_reported_before_a_stop_string(draft: int) -> None:
    """The engine computes on until it hears of it."""
    whole = run(make(draft=draft)[0], [add(max_tokens=60)])
    stop = whole.text["r"][11:14]
    engine, runner = make(draft=draft)
    heard = run(engine, [add(max_tokens=60, stop=[stop])])
    assert heard.ends["r"] == "stop" and len(heard.tokens["r"]) < 60
    check(heard, runner)


def test_they_end_where_a_request_is_cancelled() -> None:
    engine, runner = make()
    heard = Heard()
    engine.receive(add(max_tokens=150))
    for _ in range(20):
        heard.take(engine.step())
    engine.receive(Cancel("r"))
    while engine.busy:
        heard.take(engine.step())
    assert heard.ends["r"] == "cancelled" and 5 < len(heard.tokens["r"]) < 150
    check(heard, runner)


def test_one_that_is_cancelled_while_it_waits_has_none() -> None:
    engine, _ = make()
    engine.receive(add())
    heard = run(engine, [Cancel("r")])
    assert heard.numbers["r"] == hashlib.sha256(b"").digest()


def test_they_are_the_same_for_who_was_preempted() -> None:
    engine, runner = make(kv_tokens=260, ids=16, max_sequences=8)
    requests = assorted(12)
    heard = run(engine, requests)
    assert heard.load.preemptions
    for one in requests:
        if one.id in heard.ends:
            check(heard, runner, one.id)


def test_a_leg_has_those_of_its_own_tokens() -> None:
    heard = run(make()[0], [whole := add(max_tokens=30)])
    tokens, prompt = heard.tokens["r"], heard.prompts["r"]
    engine, runner = make()
    rest = run(engine, [replaced(whole, tokens[:13])])
    assert rest.tokens["r"] == tokens[13:]
    assert rest.numbers["r"] == expected(runner, prompt + tokens[:13], tokens[13:])


def test_they_go_on_over_a_context_shift() -> None:
    engine, runner = make(context=80, shift=True)
    heard = run(engine, [add(text="x" * 20, max_tokens=100)])
    tokens, cells = heard.tokens["r"], list(heard.prompts["r"])
    digest = hashlib.sha256()
    for token in tokens:
        digest.update(struct.pack("<If", token, runner.logits(cells)[token]))
        cells.append(token)
        if len(cells) == 80:  # half of what comes after the first quarter goes
            del cells[20:50]
    assert heard.shifted["r"][-1] >= 30
    assert heard.numbers["r"] == digest.digest()


def replaced(request: Add, output: list[int]) -> Add:
    fields = {name: getattr(request, name) for name in request.__struct_fields__}
    return Add(**{**fields, "output": output})
