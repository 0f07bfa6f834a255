"""Log-probabilities of a prompt's own tokens, in whatever pieces the prompt is computed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pinaivu_box.engine.messages import Add
from pinaivu_box.engine.scheduler import MAX_SCORED_POSITIONS
from tests.support.engine_harness import (
    Engine,
    Heard,
    StrictRunner,
    add,
    engine_prompt,
    finish,
    make,
    run,
)
from tests.support.scheduler_driver import SchedulerDriver, sequence

PROMPT = "The cat sat on the mat, and the dog sat on the log; " * 3


def scored(name: str = "r", text: str = PROMPT, max_tokens: int = 5, **more: Any) -> Add:
    return add(name, text, max_tokens, echo=True, logprobs=more.pop("logprobs", 2), **more)


def check(runner: StrictRunner, heard: Heard, name: str = "r", already: int = 0) -> None:
    """Each prompt token's is what the tokens before it give; then come those of the output."""
    prompt, entries = heard.prompts[name], heard.logprobs[name]
    own, rest = entries[: len(prompt) - already], entries[len(prompt) - already :]
    assert b"".join(entry.token for entry in own) == bytes(prompt[already:])
    assert b"".join(entry.token for entry in rest).decode() == heard.text[name]
    for at, entry in enumerate(own, already):
        if at == 0:
            assert (entry.logprob, entry.top) == (0, [])
            continue
        logits = runner.logits(prompt[:at]).astype(np.float64)
        expected = logits - logits.max()
        expected -= np.log(np.exp(expected).sum())
        assert entry.logprob == pytest.approx(expected[prompt[at]], abs=1e-5)
        assert [value for _, value in entry.top] == pytest.approx(
            list(np.sort(expected)[::-1][: len(entry.top)]), abs=1e-5
        )


@pytest.mark.parametrize("budget", [7, 32, 500])
def test_they_come_before_the_output_s(budget: int) -> None:
    """Of a prompt in chunks, beside others who run and others who want theirs too."""
    engine, runner = make(token_budget=budget, context=400, kv_tokens=6000)
    adds = [scored(f"r{n}", PROMPT[n:], 3 + n, seed=n) for n in range(4)]
    plain = [add(f"p{n}", PROMPT, 20, seed=n) for n in range(3)]
    heard = run(engine, [*plain, *adds])
    for one in adds:
        check(runner, heard, one.id)
    assert not any(heard.logprobs[one.id] for one in plain)
    alone = make(context=400)[0]
    quiet = run(alone, [add("r0", PROMPT, 3, seed=0)])
    assert heard.answer("r0") == quiet.answer("r0")  # what is said is what would be said


@pytest.mark.parametrize("logprobs", [0, 3])
def test_a_prompt_alone_can_be_scored(logprobs: int) -> None:
    engine, runner = make(context=400)
    heard = run(engine, [scored(max_tokens=0, logprobs=logprobs), scored("one", "", 0)])
    check(runner, heard)
    assert heard.answer("r") == ("", [], "length")
    assert len(heard.queue_ms["r"]) == len(heard.cached["r"]) == 1
    assert not engine.busy and engine.scheduler.kv_used == 0


def test_cells_of_others_are_not_used_where_log_probabilities_are_wanted() -> None:
    """It gives no logits.  Who comes after may take what was scored."""
    engine, runner = make(context=400)
    heard = run(engine, [add("before", PROMPT)])
    heard = run(engine, [scored()])
    check(runner, heard)
    assert heard.cached["r"] == [0]
    after = run(engine, [add("after", PROMPT)])
    assert after.cached["after"] == [len(heard.prompts["r"]) - 1]


@pytest.mark.parametrize("steps", [1, 3, 6, 9])
def test_a_preempted_sequence_repeats_no_output(steps: int) -> None:
    """With and without others' cells to begin with when it comes back."""
    for warm in (False, True):
        engine, runner = make(token_budget=20, context=400)
        engine.receive(add("old", "x", 60))
        heard = Heard()
        while "old" not in heard.tokens:
            heard.take(engine.step())
        engine.receive(scored())
        for _ in range(steps):
            heard.take(engine.step())
        found = engine.scheduler.find("r")
        assert found is not None and found.scored is not None and found.scored > 1
        engine.scheduler.restart(found)
        if warm:
            engine.receive(add("other", PROMPT))
        finish(engine, heard)
        check(runner, heard)
        assert found.cached_tokens == 0


def test_on_a_tight_cache_they_are_whole() -> None:
    engine, runner = make(token_budget=16, context=300, kv_tokens=420, max_sequences=4)
    adds = [scored(f"r{n}", PROMPT[: 60 + n], 120, seed=n) for n in range(6)]
    heard = run(engine, adds)
    assert heard.load.preemptions > 0
    for one in adds:
        check(runner, heard, one.id)


@pytest.mark.parametrize("said", [1, 2, 50, 158])
def test_another_leg_says_the_rest(said: int) -> None:
    engine, runner = make(context=400)
    assert len(engine_prompt(PROMPT)) > said
    heard = run(engine, [scored(scored=said)])
    check(runner, heard, already=said)


def test_a_leg_after_the_first_token_says_no_prompt() -> None:
    engine, _ = make(context=400)
    whole = run(engine, [scored()])
    prompt, tokens = whole.prompts["r"], whole.tokens["r"]
    rest = run(make(context=400)[0], [scored(scored=len(prompt), output=tokens[:2])])
    assert rest.logprobs["r"] == whole.logprobs["r"][len(prompt) + 2 :]


def test_a_leg_that_finds_all_said_ends() -> None:
    whole = run(make(context=400)[0], [scored()])
    heard = run(make(context=400)[0], [scored(scored=999, output=whole.tokens["r"])])
    assert heard.answer("r") == ("", [], "length")


def test_a_step_scores_so_many_positions_at_most() -> None:
    """Whatever the budget: each is a row of the whole vocabulary."""
    driven = SchedulerDriver(budget=1000, kv=2000)
    long = [sequence(n, 300, 3) for n in range(2)]
    for one in long:
        one.logprobs, one.scored = 0, 1
    driven.add(*long, sequence(2, 300, 3))
    while driven.scheduler:
        chunks = driven.plan()
        assert sum(len(chunk.scored) for chunk in chunks) <= MAX_SCORED_POSITIONS
        driven.compute(chunks)
        for chunk in chunks:
            if chunk.scored:
                chunk.sequence.scored = chunk.scored.stop + 1
    assert len(driven.ended) == 3 and all(one.scored == 300 for one in long)


def test_the_text_of_an_echo_has_the_prompt_as_it_is() -> None:
    engine: Engine = make()[0]
    engine.receive(add("r", prompt="ab", echo=True, max_tokens=1))
    assert engine.step().prompts["r"].text == "ab"
