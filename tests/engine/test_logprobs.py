"""Log-probabilities are the model's own, whatever else decides the draw."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from pinaivu_box.engine.llama_runner import LlamaRunner
from pinaivu_box.engine.runner import Batch
from tests.engine.harness import Engine, Fixed, add, make, run, sampling
from tests.engine.test_llama_runner import real_runner

TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def reference() -> Iterator[LlamaRunner]:
    runner = real_runner(max_sequences=1)
    yield runner
    runner.close()


def forced(runner: LlamaRunner, prompt: list[int], made: list[int]) -> np.ndarray:
    """Log-probabilities of each token that was made, shape (len(made), n_vocab).

    The prompt in one batch, then one token after another, as it was generated: in one prefill of
    both, llama.cpp's kernels for Q8_0 round differently (measured over 512 positions: 0.02 in the
    median; with weights in F32 and a cache in F16 still 0.0005, at most 0.01).
    """
    runner.remove(0)
    rows = [runner.decode(batch(prompt, 0))[0].copy()]
    for number, token in enumerate(made[:-1]):
        rows.append(runner.decode(batch([token], len(prompt) + number))[0].copy())
    logits = np.array(rows, np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def batch(tokens: list[int], start: int) -> Batch:
    count = len(tokens)
    outputs = np.zeros(count, np.int8)
    outputs[-1] = 1
    positions = np.arange(start, start + count, dtype=np.int32)
    return Batch(np.array(tokens, np.int32), positions, np.zeros(count, np.int32), outputs)


def test_they_agree_with_a_separate_computation(reference: LlamaRunner) -> None:
    """500 positions; greedy, hot, biased and penalised, eight beside each other."""
    kinds = [
        sampling(0),
        sampling(0.8, seed=1),
        sampling(1.5, seed=2, top_k=0, top_p=1.0, min_p=0.0),
        sampling(0.8, seed=3, frequency_penalty=1.0, presence_penalty=1.0),
        sampling(0.8, seed=4, logit_bias={"28": 5.0}),
        sampling(0.8, seed=5, repeat_penalty=1.3),
        sampling(0.8, seed=6, ignore_eos=True),
        sampling(0, logit_bias={"28": -5.0}),
    ]
    adds = [
        add(f"r{n}", f"Write about the number {n}.", 64, sampling=kind, logprobs=5)
        for n, kind in enumerate(kinds)
    ]
    runner = real_runner()
    heard = run(Engine(runner, token_budget=256, policy=Fixed()), adds)
    compared = 0
    for one in adds:
        prompt, made = heard.prompts[one.id], heard.tokens[one.id]
        expected = forced(reference, prompt, made)
        probed = heard.logprobs[one.id]
        said = [token for token in made if token not in runner.facts.end_tokens]
        assert len(probed) == len(said)
        for token, row, got in zip(said, expected, probed, strict=False):
            assert got.token == runner.piece(token)
            assert got.logprob == pytest.approx(row[token], abs=TOLERANCE)
            best = np.sort(row)[::-1][:5]
            assert [value for _, value in got.top] == pytest.approx(list(best), abs=TOLERANCE)
            compared += 1
    runner.close()
    assert compared >= 500


def test_those_of_a_stop_string_do_not_come() -> None:
    one = add("r", "x", 40, logprobs=0)
    whole = run(make()[0], [one])
    text = whole.text["r"]
    stopped = run(make()[0], [add("r", "x", 40, logprobs=0, stop=[text[20:25]])])
    assert stopped.text["r"] == text[:20]
    probed = b"".join(entry.token for entry in stopped.logprobs["r"])
    assert probed.decode() == text[:20]


def test_they_come_once_for_each_token_of_the_text() -> None:
    """With drafts, and in whatever pieces the text goes out."""
    adds = [add(f"r{n}", "abcabc" * 3, 30, seed=n, logprobs=2) for n in range(4)]
    plain, drafted = run(make()[0], adds), run(make(draft=5)[0], adds)
    for one in adds:
        entries = plain.logprobs[one.id]
        assert b"".join(entry.token for entry in entries).decode() == plain.text[one.id]
        assert entries == drafted.logprobs[one.id]
        for entry in entries:
            values = [value for _, value in entry.top]
            assert values == sorted(values, reverse=True) and len(values) == 2
            assert entry.logprob <= values[0]
