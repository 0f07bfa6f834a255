"""Drafts: with them an engine says what it says without them, only sooner."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from pinaivu_box.engine.fake_runner import END, N_VOCAB
from pinaivu_box.engine.messages import Add, Cancel, Sampling
from pinaivu_box.engine.runner import Batch
from tests.support.engine_harness import (
    BUDGET,
    Engine,
    Fixed,
    Heard,
    StrictRunner,
    add,
    finish,
    load,
    make,
    run,
    sampling,
)

LETTERS = b"abcdef"


class Repeating(StrictRunner):
    """A model of few letters that likes to go on as it did after the same two letters.

    It looks at all of its cells as well, so that it now and then says something else: some drafts
    are right, some wrong.  "$" in a prompt is an end token.
    """

    def tokenize(self, text: str, limit: int | None = None, *, special: bool = True) -> list[int]:
        return [END if token == ord("$") else token for token in super().tokenize(text)]

    def logits(self, cells: list[int]) -> npt.NDArray[np.float32]:
        def noise(seen: list[int], size: float) -> npt.NDArray[np.float32]:
            state = zlib.crc32(np.array(seen, np.int32).tobytes())
            return np.random.default_rng(state).normal(0, size, N_VOCAB).astype(np.float32)

        likes = noise(cells[-2:], 3) + noise(cells, 1)
        logits = np.full(N_VOCAB, -50, np.float32)
        logits[list(LETTERS)] = likes[list(LETTERS)]
        if self._can_end:
            logits[END] = likes[END] - 3
        return logits


KINDS: dict[str, Sampling] = {
    "greedy": sampling(0),
    "sampled": sampling(0.6, seed=3),
    "top-p": sampling(1.0, seed=4, top_k=0, min_p=0.0),
    "whole": sampling(1.0, seed=5, top_k=0, min_p=0.0, top_p=1.0),
    "penalised": sampling(0.6, seed=6, frequency_penalty=0.3, presence_penalty=0.2),
    "rewarded": sampling(0.6, seed=7, frequency_penalty=-0.2),
    "biased": sampling(0.6, seed=8, logit_bias={str(LETTERS[0]): 3.0, str(LETTERS[1]): -100.0}),
    "endless": sampling(0.6, seed=9, ignore_eos=True),
}
PROMPTS = ["abcdef" * 4, "abcabcabd" * 3, "fedcba", "aaaaaaaaaa", "abc$abd$abe$"]


def questions(kind: Sampling, max_tokens: int | None = 80, **more: Any) -> list[Add]:
    return [add(f"r{n}", text, max_tokens, sampling=kind, **more) for n, text in enumerate(PROMPTS)]


def answers(adds: list[Add], draft: int, **more: Any) -> tuple[dict[str, Any], Heard, StrictRunner]:
    engine, runner = make(Repeating, draft=draft, context=400, **more)
    heard = run(engine, adds)
    return {one.id: heard.answer(one.id) for one in adds}, heard, runner


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("draft", [1, 6])
def test_answers_are_the_same_with_drafts(kind: str, draft: int) -> None:
    adds = questions(KINDS[kind])
    plain, slowly, _ = answers(adds, 0)
    drafted, fast, _ = answers(adds, draft)
    assert drafted == plain
    assert fast.load.steps < slowly.load.steps  # drafts were made, and some were right
    assert fast.load.tokens_computed > slowly.load.tokens_computed  # and some wrong


@pytest.mark.parametrize("kind", ["greedy", "sampled", "penalised"])
def test_answers_that_end_are_the_same_with_drafts(kind: str) -> None:
    """An end token may be what was drafted, or come in the middle of what was."""
    adds = questions(KINDS[kind])
    plain, _, _ = answers(adds, 0, can_end=True)
    assert any(end == "stop" for _, _, end in plain.values())
    assert answers(adds, 5, can_end=True)[0] == plain


def test_drafts_begin_where_the_text_begins_to_repeat_itself() -> None:
    """Not only where the engine happens to make a plan: most of its steps have none."""

    class Hopeful(Fixed):
        def draft_length(self, rows: int, expected: float, rate: float, max_tokens: int) -> int:
            return min(self.draft, max_tokens) if rate else 0

    class Loops(Repeating):
        """An alphabet, then for ever its end."""

        def logits(self, cells: list[int]) -> npt.NDArray[np.float32]:
            made = len(cells) - self.prompt
            logits = np.full(N_VOCAB, -50, np.float32)
            logits[ord("A") + (made if made < 30 else 25 + made % 5)] = 0
            return logits

        def tokenize(
            self, text: str, limit: int | None = None, *, special: bool = True
        ) -> list[int]:
            tokens = super().tokenize(text)
            self.prompt = len(tokens)
            return tokens

    engine = Engine(Loops(load()), token_budget=BUDGET, policy=Hopeful(6))
    heard = run(engine, [add("r", "", 90, sampling=sampling(0))])
    assert len(heard.tokens["r"]) == 90
    assert heard.load.steps < 60  # without drafts 90; the last 60 tokens could take 9


def test_nothing_is_said_after_an_end_token_that_was_drafted() -> None:
    """The model says again what the prompt says, end token and all."""

    class Copies(Repeating):
        def tokenize(
            self, text: str, limit: int | None = None, *, special: bool = True
        ) -> list[int]:
            return super().tokenize(text.split("user\n")[1].split("<|im_end|>")[0])

        def logits(self, cells: list[int]) -> npt.NDArray[np.float32]:
            logits = np.full(N_VOCAB, -50, np.float32)
            logits[cells[-4]] = 0
            return logits

    def answer(draft: int, **more: Any) -> tuple[list[int], str]:
        one = add("r", "abc$abc$ab", 20, sampling=sampling(0, **more))
        heard = run(make(Copies, draft=draft)[0], [one])
        return heard.tokens["r"], heard.ends["r"]

    assert answer(0) == answer(6) == ([ord("c"), END], "stop")
    # An end token is never drawn then, whatever is drafted.
    endless = answer(0, ignore_eos=True)
    assert END not in endless[0] and answer(6, ignore_eos=True) == endless


@pytest.mark.parametrize("length", [1, 2, 4, 9])
def test_stop_strings_end_the_same_with_drafts(length: int) -> None:
    """Also one that is complete in the middle of an accepted draft."""
    texts = [text for text, _, _ in answers(questions(KINDS["sampled"]), 0)[0].values()]
    stop = [text[at : at + length] for text, at in zip(texts[:4], (8, 30, 50, 70), strict=True)]
    adds = questions(KINDS["sampled"], stop=stop)
    plain, _, _ = answers(adds, 0)
    assert any(end == "stop" for _, _, end in plain.values())
    assert answers(adds, 6)[0] == plain


@pytest.mark.parametrize("most", [1, 2, 3, 4, 5, 7, 20, 33])
def test_max_tokens_is_kept_with_drafts(most: int) -> None:
    adds = questions(KINDS["greedy"], max_tokens=most)
    drafted, _, _ = answers(adds, 6)
    assert drafted == answers(adds, 0)[0]
    assert all(len(tokens) == most and end == "length" for _, tokens, end in drafted.values())


def test_drafts_never_reach_beyond_the_context() -> None:
    """`StrictRunner` refuses a position that the model does not have."""
    adds = questions(KINDS["greedy"], max_tokens=None)
    plain = run(make(Repeating, context=100)[0], adds)
    drafted = run(make(Repeating, context=100, draft=8)[0], adds)
    assert drafted.tokens == plain.tokens and drafted.ends == plain.ends


@pytest.mark.parametrize("kv_tokens", [250, 400])
def test_on_a_tight_cache_answers_are_the_same_with_drafts(kv_tokens: int) -> None:
    """Sequences are thrown out, and what they had drafted with them."""
    adds = questions(KINDS["sampled"], max_tokens=60)
    engine, runner = make(Repeating, context=150, kv_tokens=kv_tokens, draft=5)
    heard = run(engine, adds)
    assert engine.scheduler.preemptions > 0
    assert {one.id: heard.answer(one.id) for one in adds} == answers(adds, 0)[0]
    assert runner.used <= kv_tokens


def checked_by(check: Callable[[], None]) -> Callable[[Batch], bool]:
    def no_slot(batch: Batch) -> bool:
        check()
        return False

    return no_slot


def test_rejected_drafts_leave_no_cells_behind() -> None:
    """When a step is computed, the cells are those of the books: after every rejection too."""

    def check() -> None:
        assert runner.used == engine.scheduler.prefixes.cells

    adds = questions(KINDS["sampled"], max_tokens=60)
    engine, runner = make(Repeating, context=400, draft=6, no_slot=checked_by(check))
    heard = run(engine, adds)
    assert heard.load.tokens_computed > answers(adds, 0)[1].load.tokens_computed
    # Also those that a sequence left when it ended, as soon as the next one starts.
    assert run(engine, [add("after", "abc", 30)]).ends == {"after": "length"}


def test_a_cancelled_sequence_leaves_no_drafts_behind() -> None:
    def check() -> None:
        assert runner.used == engine.scheduler.prefixes.cells

    engine, runner = make(Repeating, context=400, draft=6, no_slot=checked_by(check))
    heard = Heard()
    for one in questions(KINDS["sampled"], max_tokens=60):
        engine.receive(one)
    for number in range(12):
        heard.take(engine.step())
        if number > 6:
            engine.receive(Cancel(f"r{number - 7}"))
    finish(engine, heard)
    assert set(heard.ends.values()) == {"cancelled"}


def test_where_only_the_draft_finds_no_room_the_sequence_goes_on() -> None:
    """The cache has fewer cells than it says; alone, a sequence may use them to the last one."""
    one = add("r", "abcabcabc", max_tokens=None, sampling=KINDS["greedy"])
    lengths = []
    for cells in range(60, 80):
        plain = run(make(Repeating, cells=cells)[0], [one])
        drafted = run(make(Repeating, cells=cells, draft=6)[0], [one])
        assert drafted.answer("r") == plain.answer("r")
        lengths.append(len(plain.tokens["r"]))
    assert lengths == list(range(lengths[0], lengths[0] + 20))


def test_late_and_resumed_requests_are_the_same_with_drafts() -> None:
    """A leg that goes on after any token of another one drafts from what that one made."""
    whole = add("r", "abcabd" * 3, 40, sampling=KINDS["sampled"])
    tokens = run(make(Repeating)[0], [whole]).tokens["r"]
    for cut in range(0, 40, 3):
        resumed = add("r", "abcabd" * 3, 40, sampling=KINDS["sampled"], output=tokens[:cut])
        assert run(make(Repeating, draft=5)[0], [resumed]).tokens["r"] == tokens[cut:]
