"""Drafts by a second model: with them an engine says what it says without them, only sooner."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
import pytest

from pinaivu_box.engine import draft_model
from pinaivu_box.engine import engine as engines
from pinaivu_box.engine.drafting import MAX_ALLOWANCE_STEPS
from pinaivu_box.engine.fake_runner import END, N_VOCAB, UNLIKELY
from pinaivu_box.engine.messages import Add, Cancel, Constraint, LoadModel, Sampling
from pinaivu_box.engine.runner import Batch
from pinaivu_box.engine.vocabulary import Vocabulary, check_same
from pinaivu_box.errors import BoxError
from tests.support.engine_harness import (
    Engine,
    Fixed,
    Heard,
    StrictRunner,
    add,
    finish,
    load,
    run,
    sampling,
)

CONTEXT = 400
LETTERS = b"abcdef"
KINDS: dict[str, Sampling] = {
    "greedy": sampling(0),
    "sampled": sampling(0.8, seed=3),
    "whole": sampling(1.0, seed=5, top_k=0, min_p=0.0, top_p=1.0),
    "typical": sampling(1.0, seed=6, typical_p=0.7),
    "penalised": sampling(0.8, seed=7, frequency_penalty=0.3, repeat_penalty=1.2),
    "biased": sampling(0.8, seed=8, logit_bias={str(LETTERS[0]): 3.0, str(LETTERS[1]): -100.0}),
    "endless": sampling(0.8, seed=9, ignore_eos=True),
    "not too short": sampling(0.8, seed=10, min_tokens=20),
}
PROMPTS = ["abcdef" * 4, "abd", "fedcba" * 9, "a", "abcabd" * 20, "b"]


class Letters(StrictRunner):
    """A model of few letters; another one of it draws like it in most places, if its `other` is
    small."""

    def __init__(self, given_load: LoadModel, *, other: float = 0.0, **more: Any) -> None:
        super().__init__(given_load, can_end=True, **more)
        self._other = other

    def logits(self, cells: list[int]) -> npt.NDArray[np.float32]:
        def noise(salt: int) -> npt.NDArray[np.float64]:
            state = zlib.crc32(np.array([salt, *cells], np.int32).tobytes())
            return np.random.default_rng(state).normal(0, 2, N_VOCAB)

        likes = noise(0) + self._other * noise(1)
        logits = np.full(N_VOCAB, -50, np.float32)
        for token in (*LETTERS, *b'{"x":1} '):
            logits[token] = likes[token]
        logits[END] = likes[END] - 4
        return logits


class Stupid(Letters):
    """Says one thing only."""

    def logits(self, cells: list[int]) -> npt.NDArray[np.float32]:
        logits = np.full(N_VOCAB, -50, np.float32)
        logits[ord("z")] = 0
        return logits


def engine_of(
    draft: Letters | None,
    by_model: int = 4,
    *,
    ngram: int = 0,
    shift: bool = False,
    runner: dict[str, Any] | None = None,
    **sizes: Any,
) -> tuple[Engine, Letters]:
    given = load(**{"context": CONTEXT, **sizes})
    model = Letters(given, **(runner or {}))
    policy = Fixed(ngram, by_model if draft is not None else 0)
    engine = Engine(model, token_budget=given.token_budget, policy=policy, shift=shift, draft=draft)
    return engine, model


def drafter(kind: type[Letters] = Letters, other: float = 0.3, **more: Any) -> Letters:
    ours = {name: more.pop(name) for name in ("cells", "no_slot", "ids") if name in more}
    return kind(load(**{"context": CONTEXT, **more}), other=other, **ours)


def questions(kind: Sampling, max_tokens: int | None = 60, **more: Any) -> list[Add]:
    return [add(f"r{n}", text, max_tokens, sampling=kind, **more) for n, text in enumerate(PROMPTS)]


def named(one: Add, name: str) -> Add:
    return msgspec.structs.replace(one, id=name)


def answers(engine: Engine, adds: Sequence[Add]) -> tuple[dict[str, Any], Heard]:
    heard = run(engine, adds)
    assert not heard.refused
    return {one.id: heard.answer(one.id) for one in adds}, heard


def plain(adds: Sequence[Add], **more: Any) -> tuple[dict[str, Any], Heard]:
    return answers(engine_of(None, **more)[0], adds)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("by_model", [1, 5])
def test_answers_are_the_same_with_a_draft_model(kind: str, by_model: int) -> None:
    adds = questions(KINDS[kind])
    alone, slowly = plain(adds)
    drafted, fast = answers(engine_of(drafter(), by_model)[0], adds)
    assert drafted == alone
    assert fast.load.steps < slowly.load.steps
    assert 0 < fast.load.tokens_accepted < fast.load.tokens_drafted  # some were wrong
    saved = slowly.load.steps - fast.load.steps
    assert saved <= fast.load.tokens_accepted


def test_a_model_that_drafts_for_itself_is_always_right() -> None:
    """At any temperature: it draws with the same noise."""
    adds = questions(sampling(1.5, seed=11, top_k=0, min_p=0.0, top_p=1.0, ignore_eos=True))
    alone, _ = plain(adds)
    drafted, heard = answers(engine_of(drafter(other=0.0), 3)[0], adds)
    assert drafted == alone
    assert heard.load.tokens_accepted == heard.load.tokens_drafted > 0


def test_a_model_that_is_never_right_changes_nothing() -> None:
    adds = questions(KINDS["sampled"])
    drafted, heard = answers(engine_of(drafter(Stupid), 3)[0], adds)
    assert drafted == plain(adds)[0]
    assert heard.load.tokens_accepted == 0 < heard.load.tokens_drafted


@pytest.mark.parametrize("other", [0.0, 0.3])
def test_n_gram_drafts_and_those_of_a_model_go_together(other: float) -> None:
    adds = questions(KINDS["sampled"])
    assert answers(engine_of(drafter(other=other), 3, ngram=4)[0], adds)[0] == plain(adds)[0]


GRAMMARS = {
    "schema": Constraint(
        "json_schema",
        '{"type":"object","properties":{"x":{"type":"integer"}},"required":["x"],'
        '"additionalProperties":false}',
    ),
    "gbnf": Constraint("gbnf", "root ::= [a-f]{5,40} [1x]"),
}


@pytest.mark.parametrize("name", GRAMMARS)
@pytest.mark.parametrize("other", [0.0, 0.5])
def test_answers_that_follow_a_grammar_are_the_same(name: str, other: float) -> None:
    adds = questions(sampling(1.0, seed=12), constraint=GRAMMARS[name])
    alone, slowly = plain(adds)
    drafted, fast = answers(engine_of(drafter(other=other), 5)[0], adds)
    assert drafted == alone
    assert any(end == "stop" for _, _, end in alone.values())
    assert fast.load.steps < slowly.load.steps and fast.load.tokens_accepted > 0
    if other == 0:  # also where the grammar forbids what either would say
        assert fast.load.tokens_accepted == fast.load.tokens_drafted


@pytest.mark.parametrize("length", [1, 2, 5])
def test_stop_strings_end_the_same(length: int) -> None:
    texts = [text for text, _, _ in plain(questions(KINDS["endless"]))[0].values()]
    stop = [text[at : at + length] for text, at in zip(texts, (8, 20, 31, 50), strict=False)]
    adds = questions(KINDS["endless"], stop=stop)
    alone, _ = plain(adds)
    assert any(end == "stop" for _, _, end in alone.values())
    assert answers(engine_of(drafter(), 6)[0], adds)[0] == alone


def test_log_probabilities_are_the_same() -> None:
    adds = questions(KINDS["sampled"], logprobs=2)
    slowly, fast = plain(adds)[1], answers(engine_of(drafter(), 4)[0], adds)[1]
    assert fast.logprobs == slowly.logprobs and fast.load.tokens_accepted > 0


@pytest.mark.parametrize("most", [1, 2, 3, 4, 9])
def test_max_tokens_is_kept(most: int) -> None:
    adds = questions(KINDS["endless"], most)
    drafted, _ = answers(engine_of(drafter(), 6)[0], adds)
    assert drafted == plain(adds)[0]
    assert all(len(tokens) == most for _, tokens, _ in drafted.values())


def test_drafts_never_reach_beyond_the_context() -> None:
    adds = questions(KINDS["endless"], None)
    short: dict[str, Any] = {"context": 180}
    drafted, _ = answers(engine_of(drafter(**short), 8, **short)[0], adds)
    assert drafted == plain(adds, **short)[0]


def test_a_draft_model_of_a_shorter_context_drafts_as_far_as_it_can() -> None:
    adds = questions(KINDS["endless"], 100)
    drafted, heard = answers(engine_of(drafter(context=120), 4)[0], adds)
    assert drafted == plain(adds)[0]
    assert heard.load.tokens_accepted > 0


@pytest.mark.parametrize("kv_tokens", [450, 700])
def test_on_a_tight_cache_answers_are_the_same(kv_tokens: int) -> None:
    """Sequences are thrown out, and what was drafted for them; their ids go to others."""
    adds = [one for n in range(3) for one in questions(KINDS["sampled"])]
    adds = [named(one, f"q{n}") for n, one in enumerate(adds)]
    engine, runner = engine_of(drafter(kv_tokens=kv_tokens), 5, kv_tokens=kv_tokens)
    drafted, heard = answers(engine, adds)
    assert engine.scheduler.preemptions > 0 and heard.load.tokens_accepted > 0
    assert drafted == plain(adds)[0]
    assert runner.used <= kv_tokens


def test_the_draft_models_cells_follow_prefixes_that_are_shared() -> None:
    """A second request with the same prompt finds the draft model's cells of it, too."""
    draft = drafter(max_sequences=4, ids=4)
    engine, _ = engine_of(draft, 4, max_sequences=4, runner={"ids": 4})
    one = add("r0", "abcdef" * 20, 30, sampling=KINDS["endless"])
    run(engine, [one])
    computed = draft.computed
    heard = run(engine, [named(one, "r1")])
    assert heard.cached["r1"][0] > 100
    assert heard.load.tokens_accepted > 0
    assert draft.computed - computed < 80  # and not the prompt's 150 again


def test_nothing_is_left_of_what_has_ended() -> None:
    """Whatever the model's cells hold, the draft model's hold no more."""
    draft = drafter()
    engine, runner = engine_of(draft, 5)
    heard = Heard()
    for one in questions(KINDS["endless"]):
        engine.receive(one)
    for number in range(14):
        heard.take(engine.step())
        if number > 7:
            engine.receive(Cancel(f"r{number - 8}"))
        for sequence in engine.scheduler.running:
            known = draft.kv.tokens(sequence.sequence_id)
            assert known[: len(sequence.tokens)] == sequence.tokens[: len(known)]
    finish(engine, heard)
    assert set(heard.ends.values()) == {"cancelled"}
    for sequence_id, cells in draft.cells.items():
        assert len(cells) <= len(runner.kv.tokens(sequence_id))


def test_after_a_context_shift_the_draft_model_goes_on() -> None:
    adds = [add("r", "go", 300, sampling=KINDS["endless"])]
    short: dict[str, Any] = {"context": 80}
    alone, slowly = plain(adds, shift=True, **short)
    drafted, fast = answers(engine_of(drafter(**short), 5, shift=True, **short)[0], adds)
    assert drafted == alone and fast.shifted["r"][-1] > 0
    assert fast.load.steps < 0.8 * slowly.load.steps


@pytest.mark.parametrize("cells", [100, 250, 1000])
def test_a_draft_model_without_room_drafts_less(cells: int) -> None:
    adds = questions(KINDS["endless"])
    drafted, heard = answers(engine_of(drafter(cells=cells), 4)[0], adds)
    assert drafted == plain(adds)[0]
    roomy = answers(engine_of(drafter(), 4)[0], adds)[1]
    assert (heard.load.tokens_accepted < roomy.load.tokens_accepted) == (cells < 1000)


def test_where_only_the_draft_finds_no_room_the_sequence_goes_on() -> None:
    one = add("r", "abcabcabc", None, sampling=KINDS["endless"])
    for cells in range(80, 90):
        alone = plain([one], runner={"cells": cells})[0]
        assert answers(engine_of(drafter(), 6, runner={"cells": cells})[0], [one])[0] == alone


def test_resumed_requests_are_the_same() -> None:
    whole = add("r", "abcabd" * 3, 40, sampling=KINDS["endless"])
    tokens = run(engine_of(None)[0], [whole]).tokens["r"]
    for cut in range(0, 40, 7):
        resumed = add("r", "abcabd" * 3, 40, sampling=KINDS["endless"], output=tokens[:cut])
        assert run(engine_of(drafter(), 5)[0], [resumed]).tokens["r"] == tokens[cut:]


def test_a_smaller_vocabulary_drafts_what_it_has() -> None:
    """Sequences with tokens that it does not know get no drafts."""
    known = ord("e")

    class Small(Letters):
        def __init__(self, given_load: LoadModel, **more: Any) -> None:
            super().__init__(given_load, **more)
            self.facts = replace(self.facts, n_vocab=known)

        def logits(self, cells: list[int]) -> npt.NDArray[np.float32]:
            assert max(cells) < known
            return super().logits(cells)[:known]

    banned = {str(token): -100.0 for token in b"efx{}"}
    kind = sampling(0.8, seed=3, ignore_eos=True, logit_bias=banned)
    adds = [add(f"r{n}", max_tokens=40, prompt=text, sampling=kind) for n, text in enumerate("abf")]
    drafted, heard = answers(engine_of(drafter(Small), 3)[0], adds)
    assert drafted == plain(adds)[0]
    assert heard.load.tokens_accepted > 0


TEXTS = [b"%d" % number for number in range(300)]


def same(**changes: Any) -> Vocabulary:
    return replace(Vocabulary(2, 1, None, TEXTS), **changes)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"kind": 1}, "tokenizers are of different kinds"),
        ({"bos": 2}, "begin with different tokens"),
        ({"eos": 2}, "end with different tokens"),
        ({"texts": [b"x"] * 100}, "it has 100 tokens, and the model 300"),
        ({"texts": TEXTS[:250] + [b"another"] * 50}, "its token 250 is 'another', and"),
    ],
)
def test_a_draft_model_with_another_vocabulary_is_refused(
    changes: dict[str, Any], why: str
) -> None:
    with pytest.raises(BoxError, match=why) as refused:
        check_same(same(**changes), same(), "small:1b")
    assert refused.value.message.startswith("small:1b cannot draft for this model")


def test_a_draft_model_may_have_a_few_tokens_more_or_less_and_other_special_ones() -> None:
    check_same(same(texts=[b"x"] * 5 + TEXTS[5:290]), same(), "small:1b")
    with pytest.raises(
        BoxError, match="its token 5 is 'x', and"
    ):  # the first that is no special one
        check_same(same(texts=[b"x"] * 6 + TEXTS[6:290]), same(), "small:1b")


class Cheap(StrictRunner):
    """Draws by the last two tokens; another one draws the same in so many of a thousand places."""

    def __init__(self, given_load: LoadModel, *, alike: int = 1000) -> None:
        super().__init__(given_load)
        self._alike = alike

    def logits(self, cells: list[int]) -> npt.NDArray[np.float32]:
        state = 7919 * len(cells) + 31 * cells[-1] + cells[-2]
        logits = UNLIKELY.copy()
        logits[97 + state % 26 if state * 613 % 1000 < self._alike else ord("z")] = 0
        return logits


class Clock:
    """Time that passes while a runner computes, and not otherwise."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        for module in (engines, draft_model):
            monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: self.now))

    def timed(self, runner: Cheap, step: float, row: float, prompt_token: float) -> Cheap:
        decode = runner.decode

        def timed(batch: Batch) -> npt.NDArray[np.float32]:
            rows = int(batch.outputs.sum())
            self.now += step + rows * row + (len(batch.tokens) - rows) * prompt_token
            return decode(batch)

        runner.decode = timed  # type: ignore[method-assign]
        return runner


class Question(NamedTuple):
    prompt: int
    output: int
    streams: int


PACE = (0.020, 0.001, 0.001)  # seconds of a step, of a row, of a token of a prompt
QUESTIONS = [
    Question(40, 300, 1),
    Question(40, 150, 4),
    Question(40, 60, 16),
    Question(300, 30, 4),
    Question(20, 4, 1),
]


def seconds_of(
    monkeypatch: pytest.MonkeyPatch,
    question: Question,
    alike: int | None,
    draft_step: float,
) -> tuple[float, Heard]:
    """How long an engine takes that learns its own pace.  A step of its model takes 20 ms, and 1 ms
    for each row; one of the draft model that part of it."""
    clock = Clock(monkeypatch)
    given = load(context=CONTEXT, kv_tokens=10_000, token_budget=512)
    draft = None
    if alike is not None:
        draft = clock.timed(Cheap(given, alike=alike), *(draft_step * each for each in PACE))
    model = clock.timed(Cheap(given), *PACE)
    engine = Engine(model, token_budget=512, policy=None, draft=draft)
    heard = Heard()
    for number in range(5):
        asked = [
            add(
                f"q{number}r{stream}",
                f"{number} {stream} {'x' * question.prompt}",
                question.output,
                sampling=sampling(0, ignore_eos=True),
            )
            for stream in range(question.streams)
        ]
        heard = run(engine, asked)
    return clock.now, heard


@pytest.mark.parametrize("question", QUESTIONS, ids=str)
@pytest.mark.parametrize(
    ("alike", "draft_step"),
    [(0, 0.1), (200, 0.1), (900, 0.9)],
    ids=["never right", "often wrong", "slow"],
)
def test_drafts_that_do_not_pay_cost_less_than_three_per_cent(
    monkeypatch: pytest.MonkeyPatch, question: Question, alike: int, draft_step: float
) -> None:
    """And, at most, what the two allowances have at first."""
    alone, _ = seconds_of(monkeypatch, question, None, 0)
    drafted, _ = seconds_of(monkeypatch, question, alike, draft_step)
    step = PACE[0] + question.streams * PACE[1]
    assert drafted < 1.03 * alone + MAX_ALLOWANCE_STEPS * step


@pytest.mark.parametrize("streams", [1, 4])
def test_drafts_that_pay_save_time(monkeypatch: pytest.MonkeyPatch, streams: int) -> None:
    question = Question(40, 300, streams)
    alone, _ = seconds_of(monkeypatch, question, None, 0)
    drafted, heard = seconds_of(monkeypatch, question, 950, 0.1)
    assert heard.load.tokens_accepted > 0.7 * heard.load.tokens_drafted
    assert drafted < 0.7 * alone
