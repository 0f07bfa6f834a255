"""Completions that repeat their prompt and say how likely it was, as evaluations want it."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from typing import Any

import openai
import pytest

from pinaivu_box.engine.fake_runner import N_VOCAB, SENTENCE
from tests.support.process_box import MODEL, UNDRAFTED, Box, wait_until

FAKE = "fake:1"
TEXT = "Once upon a time there was a 😀 in a wood."


def create(box: Box, prompt: Any = TEXT, **more: Any) -> Any:
    options = {"model": MODEL, "echo": True, "max_tokens": 4, "temperature": 0, **more}
    return box.client.completions.create(prompt=prompt, **options)


def tokens_of(box: Box, text: str, model: str = MODEL) -> list[int]:
    body = {"model": model, "text": text, "special": True}
    found: list[int] = box.http("POST", "/v1/tokenize", json=body).json()["tokens"]
    return found


def check_shape(choice: Any, count: int) -> None:
    """As OpenAI documents it: the first token has no log-probability; offsets are in the text."""
    held = choice.logprobs
    lists = (held.tokens, held.token_logprobs, held.top_logprobs, held.text_offset)
    assert len({len(one) for one in lists}) == 1
    assert held.token_logprobs[0] is None and held.top_logprobs[0] is None
    for token, value, top in list(zip(*lists[:3], strict=True))[1:]:
        assert value <= 0 and token in top and top[token] >= value
        assert count <= len(top) <= count + 1
        assert max(top.values()) >= value
    for token, offset in zip(held.tokens, held.text_offset, strict=True):
        if not token.startswith("bytes:\\x"):
            assert choice.text[offset : offset + len(token)] == token


@pytest.mark.parametrize("as_tokens", [False, True])
def test_scoring_alone(box: Box, as_tokens: bool) -> None:
    """`max_tokens` 0, as evaluation harnesses ask: nothing is made, and it has its receipt."""
    tokens = tokens_of(box, TEXT)
    answer = create(box, tokens if as_tokens else TEXT, max_tokens=0, logprobs=3)
    (choice,) = answer.choices
    assert choice.text == TEXT and choice.finish_reason == "length"
    assert len(choice.logprobs.tokens) == len(tokens)
    check_shape(choice, 3)
    assert answer.usage.completion_tokens == 0
    assert answer.usage.prompt_tokens == len(tokens)
    receipt = box.http("GET", f"/v1/receipts/{answer.request_id}").json()
    assert json.loads(receipt["signed_receipt"])["usage"]["completion_tokens"] == 0


def test_likely_text_scores_higher(box: Box) -> None:
    """The second word decides, and the sums say so: this is what an evaluation does."""
    beginning = "The capital of France is"
    sums = []
    for end in (" Paris", " Oslo", " banana"):
        held = create(box, beginning + end, max_tokens=0, logprobs=1).choices[0].logprobs
        at = held.text_offset.index(len(beginning))
        sums.append(sum(held.token_logprobs[at:]))
    assert sums[0] > sums[1] > sums[2]


def test_logprobs_of_generated_text_are_the_same_in_a_prompt(box: Box) -> None:
    """To within what kernels round: the answer's own log-probabilities, then those of a prompt."""
    prompt = tokens_of(box, "Once upon a time there was a king who")
    said = create(box, prompt, logprobs=2, max_tokens=12).choices[0]
    check_shape(said, 2)
    assert len(said.logprobs.tokens) == len(prompt) + 12
    made = [tokens_of(box, token)[0] for token in said.logprobs.tokens[len(prompt) :]]
    read = create(box, prompt + made, logprobs=2, max_tokens=0).choices[0]
    assert read.text == said.text
    assert read.logprobs.tokens == said.logprobs.tokens
    assert read.logprobs.text_offset == said.logprobs.text_offset
    pairs = zip(said.logprobs.token_logprobs[1:], read.logprobs.token_logprobs[1:], strict=True)
    assert all(a == pytest.approx(b, abs=0.5) for a, b in pairs)


def test_control_tokens_are_shown_as_they_are_written(box: Box) -> None:
    text = "<|im_start|>user\nHi<|im_end|>\n"
    choice = create(box, text, max_tokens=0, logprobs=0).choices[0]
    assert choice.text == text == "".join(choice.logprobs.tokens)
    assert choice.logprobs.tokens[0] == "<|im_start|>"
    check_shape(choice, 0)
    assert create(box, tokens_of(box, text), max_tokens=0).choices[0].text == text


@pytest.mark.parametrize("logprobs", [None, 2])
def test_several_prompts_and_choices_whole_and_streamed(
    fake_box: Box, logprobs: int | None
) -> None:
    prompts = ["ab", "The quick brown fox " * 20, "xyz"]
    options = {"model": FAKE, "logprobs": logprobs, "n": 2}
    for max_tokens in (0, 3):
        whole = create(fake_box, prompts, max_tokens=max_tokens, **options)
        asked = [prompt for prompt in prompts for _ in range(2)]
        for choice, prompt in zip(whole.choices, asked, strict=True):
            said = (SENTENCE * 20).decode()[len(prompt) - 1 :][:max_tokens]
            assert choice.text == prompt + said
            if logprobs is not None:
                assert "".join(choice.logprobs.tokens) == choice.text
                check_shape(choice, logprobs)
        assert whole.usage.completion_tokens == 6 * max_tokens
        streamed = create(fake_box, prompts, max_tokens=max_tokens, stream=True, **options)
        assert join(streamed) == [
            (
                one.text,
                one.logprobs.text_offset if one.logprobs else [],
                one.logprobs.token_logprobs if one.logprobs else [],
                one.finish_reason,
            )
            for one in whole.choices
        ]


def join(stream: Any) -> list[tuple[str, list[int], list[float | None], str | None]]:
    texts: dict[int, str] = {}
    offsets: dict[int, list[int]] = {}
    values: dict[int, list[float | None]] = {}
    ends: dict[int, str | None] = {}
    for chunk in stream:
        for choice in chunk.choices:
            index = choice.index
            texts[index] = texts.get(index, "") + choice.text
            held = choice.logprobs
            offsets.setdefault(index, []).extend(held.text_offset if held else [])
            values.setdefault(index, []).extend(held.token_logprobs if held else [])
            ends[index] = choice.finish_reason or ends.get(index)
    return [(texts[n], offsets[n], values[n], ends[n]) for n in sorted(texts)]


def test_a_long_prompt_is_scored_whole(fake_box: Box) -> None:
    """Of twenty likeliest tokens each, more than one frame holds."""
    assert N_VOCAB > 20
    text = SENTENCE.decode() * 150
    choice = create(fake_box, text, model=FAKE, max_tokens=1, logprobs=20).choices[0]
    assert len(choice.logprobs.tokens) == len(text) + 1
    check_shape(choice, 20)
    # The fake model is sure of its sentence, and position n gives the token after it.
    assert all(value < -20 for value in choice.logprobs.token_logprobs[1:-1])
    assert choice.logprobs.token_logprobs[-1] > -0.1


def test_a_prompt_is_said_once_though_its_engine_is_killed(new_box: Callable[..., Box]) -> None:
    """While it is read, and while the answer comes."""
    box = new_box("--model", f"{FAKE}=fake:40", config=UNDRAFTED)  # with drafts it ends at once
    prompt = SENTENCE.decode() * 25
    stream = create(box, prompt, model=FAKE, max_tokens=100, logprobs=1, stream=True)
    chunks = [next(stream), next(stream)]
    killed: set[int] = set()

    def victim() -> int:
        pids = {one["pid"] for one in box.engines() if one["running"]} - killed
        return pids.pop() if pids else 0

    for more in (15, 1):
        killed.add(pid := wait_until(victim, "an engine at work"))
        os.kill(pid, signal.SIGKILL)
        chunks += [next(stream) for _ in range(more)]
    ((text, offsets, values, end),) = join([*chunks, *stream])
    assert text.startswith(prompt) and len(text) == len(prompt) + 100 and end == "length"
    assert offsets == list(range(len(text)))
    assert values[0] is None and None not in values[1:]
    wait_until(lambda: not any(one["running"] for one in box.engines()), "it to be empty")


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"max_tokens": 0, "echo": False}, "max_tokens"),
        ({"max_tokens": -2}, "max_tokens"),
        ({"suffix": "x", "logprobs": 1}, "suffix"),
        ({"logprobs": 21}, "logprobs"),
    ],
)
def test_an_echo_that_cannot_be_given_is_refused(
    fake_box: Box, change: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.UnprocessableEntityError) as caught:
        create(fake_box, model=FAKE, **change)
    assert caught.value.param == param
