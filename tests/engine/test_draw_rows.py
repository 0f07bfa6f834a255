"""Many rows at once: each draws what it would draw alone, whatever its company."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pinaivu_box.engine.messages import Sampling
from pinaivu_box.engine.sampling import (
    Draw,
    PenaltyWindow,
    Sampler,
    draw_rows,
    survivors,
)
from pinaivu_box.engine.splitmix import gumbels, row_keys
from tests.support.draws import draw

Float32 = npt.NDArray[np.float32]

SIZES = st.one_of(st.integers(5, 300), st.sampled_from([1023, 2049, 4096, 5000]))
TOP_K = st.sampled_from([0, 1, 2, 5, 40, 70, 256, 257, 6000])
KINDS = st.builds(
    Sampling,
    temperature=st.sampled_from([0, 0, 0.3, 1.0, 2.0]),
    top_p=st.sampled_from([1.0, 1.0, 0.9, 0.3]),
    top_k=TOP_K,
    min_p=st.sampled_from([0.0, 0.0, 0.05, 0.5]),
    seed=st.integers(-(2**63), 2**63 - 1),
    ignore_eos=st.booleans(),
    presence_penalty=st.sampled_from([0.0, 0.0, 1.0]),
    logit_bias=st.sampled_from([{}, {}, {"3": 2.0, "4": -100.0}]),
)
ENDS = np.array([0, 2], np.intp)


@st.composite
def matrices(draw: st.DrawFn, rows: int) -> Float32:
    """Logits of all sorts: spread out, with many ties, and almost all alike."""
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    logits = random.normal(0, draw(st.sampled_from([0.01, 1, 6])), (rows, draw(SIZES)))
    if steps := draw(st.sampled_from([0, 1, 2])):
        logits = np.round(logits * steps) / steps
    return logits.astype(np.float32)


@settings(max_examples=200)
@given(st.lists(KINDS, min_size=2, max_size=8), st.data())
def test_a_row_draws_the_same_token_in_a_mixed_batch_and_alone(
    kinds: list[Sampling], data: st.DataObject
) -> None:
    logits = data.draw(matrices(len(kinds)))
    output = data.draw(st.lists(st.integers(0, 4), max_size=5))
    draws = [Draw(kind, 100 + n, PenaltyWindow(output)) for n, kind in enumerate(kinds)]
    by_itself = [draw_rows(logits[n : n + 1].copy(), [one], ENDS)[0] for n, one in enumerate(draws)]
    assert draw_rows(logits.copy(), draws, ENDS) == by_itself
    order = data.draw(st.permutations(range(len(kinds))))
    shuffled = draw_rows(logits[list(order)], [draws[n] for n in order], ENDS)
    assert shuffled == [by_itself[n] for n in order]


@pytest.mark.parametrize("mixed", [False, True])
def test_a_row_draws_the_same_token_in_a_thread_and_alone(mixed: bool) -> None:
    """64 rows of 70,000 tokens are worth four threads."""
    random = np.random.default_rng(0)
    logits = random.normal(0, 3, (64, 70_000)).astype(np.float32)
    kinds = [Sampling(0.8, 0.95, 40, 0.05, seed) for seed in range(64)]
    if mixed:
        kinds[::3] = [Sampling(0.0, 1, 0, 0, 0)] * 22
        kinds[1::3] = [Sampling(1.0, 0.9, 0, 0, seed) for seed in range(21)]
    draws = [Draw(kind, 7 * n) for n, kind in enumerate(kinds)]
    by_itself = [draw_rows(logits[n : n + 1].copy(), [one])[0] for n, one in enumerate(draws)]
    assert len(set(by_itself)) > 32
    sampler = Sampler(kinds)
    for _ in range(3):
        assert sampler.draw(logits.copy(), [7 * n for n in range(64)]) == by_itself


@settings(max_examples=50)
@given(st.lists(KINDS, min_size=1, max_size=5), st.data())
def test_a_sampler_draws_the_same_step_after_step(
    kinds: list[Sampling], data: st.DataObject
) -> None:
    """It keeps nothing of a step for the next one."""
    sampler = Sampler(kinds, ENDS)
    for step in range(3):
        logits = data.draw(matrices(len(kinds)))
        pasts = [PenaltyWindow([step, n % 5]) for n in range(len(kinds))]
        positions = [1000 * n + step for n in range(len(kinds))]
        draws = [Draw(*one) for one in zip(kinds, positions, pasts, strict=True)]
        drawn = sampler.draw(logits.copy(), np.array(positions, np.int32), pasts)
        assert drawn == draw_rows(logits.copy(), draws, ENDS)


def plain_top_k(logits: Float32, k: int) -> list[int]:
    return [int(index) for index in np.argsort(-logits, kind="stable")[:k]]


@settings(max_examples=200)
@given(st.integers(1, 300), st.data())
def test_top_k_is_that_of_a_plain_stable_sort(k: int, data: st.DataObject) -> None:
    """Of equals the lower id.  So hot, the noise alone decides among the k."""
    logits = data.draw(matrices(6))
    hot = Sampling(temperature=1e6, top_p=1, top_k=k, min_p=0, seed=7)
    expected = []
    for position, row in enumerate(logits):
        ids = plain_top_k(row, k)
        scores = row[ids].astype(np.float64) / 1e6 + gumbels(
            row_keys([7], np.array([position])), np.array(ids)
        )
        expected.append(ids[int(scores.argmax())])
        assert sorted(survivors(row, hot)) == sorted(ids)
    assert draw_rows(logits.copy(), [Draw(hot, n) for n in range(6)]) == expected


@pytest.mark.parametrize("size", [320, 5000])
@pytest.mark.parametrize("k", [1, 2, 50])
def test_among_equals_top_k_takes_the_lower_ids(size: int, k: int) -> None:
    """All alike; and one better one, far behind, beside equals."""
    hot = Sampling(temperature=1e6, top_p=1, top_k=k, min_p=0, seed=1)
    flat = np.zeros(size, np.float32)
    assert {draw(flat, hot, n) for n in range(400)} == set(range(k))
    flat[size - 1] = 1
    assert {draw(flat, hot, n) for n in range(400)} == {size - 1, *range(k - 1)}


def test_a_banned_token_is_not_drawn_for_want_of_others() -> None:
    """A top-k that is larger than what is left draws from what is left."""
    logits = np.full((3, 64), -np.inf, np.float32)
    logits[:, [5, 9]] = [1.0, 0.5]
    kinds = [Sampling(1.0, top_p, 40, min_p, 3) for top_p, min_p in ((1, 0), (0.99, 0), (1, 0.01))]
    for position in range(50):
        drawn = draw_rows(logits.copy(), [Draw(kind, position) for kind in kinds])
        assert set(drawn) <= {5, 9}
