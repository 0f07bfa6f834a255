"""Drawing tokens: reproducible, distributed as promised, and cut exactly."""

from __future__ import annotations

import itertools
import math

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pinaivu_box.engine.messages import Sampling
from pinaivu_box.engine.sampling import survivors
from pinaivu_box.engine.splitmix import NOISE_SPAN, gumbels, row_keys, splitmix64
from tests.support.draws import draw

Float32 = npt.NDArray[np.float32]

SEEDS = st.integers(-(2**63), 2**63 - 1)
# Half steps make ties common; the range is wider than what noise can bridge.
LOGITS = st.lists(
    st.one_of(st.integers(-60, 60).map(lambda n: n / 2), st.floats(-30, 30, width=32)),
    min_size=1,
    max_size=60,
).map(lambda values: np.array(values, np.float32))


def sampling(
    temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0, min_p: float = 0.0, seed: int = 7
) -> Sampling:
    return Sampling(temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, seed=seed)


def plain_splitmix64(seed: int, n: int) -> int:
    """The n-th output of SplitMix64, as its authors write it."""
    z = (seed + 0x9E3779B97F4A7C15 * (n + 1)) % 2**64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
    return z ^ (z >> 31)


@pytest.mark.parametrize(
    ("seed", "outputs"),
    [
        (
            0,
            [
                0xE220A8397B1DCDAF,
                0x6E789E6AA1B965F4,
                0x06C45D188009454F,
                0xF88BB8A8724C81EC,
                0x1B39896A51A8749B,
            ],
        ),
        (
            1234567,
            [
                6457827717110365317,
                3203168211198807973,
                9817491932198370423,
                4593380528125082431,
                16408922859458223821,
            ],
        ),
    ],
)
def test_splitmix64_gives_the_published_outputs(seed: int, outputs: list[int]) -> None:
    assert [plain_splitmix64(seed, n) for n in range(5)] == outputs
    vectorised = splitmix64(np.array([seed], np.uint64), np.arange(5, dtype=np.uint64))
    assert vectorised.tolist() == outputs


@given(SEEDS, st.integers(0, 2**20), st.integers(0, 300_000))
def test_noise_of_a_token_is_splitmix_of_seed_position_and_id(
    seed: int, position: int, token: int
) -> None:
    """The vectorised hash is the plain one, so that anybody can recompute a draw."""
    bits = plain_splitmix64(plain_splitmix64(seed % 2**64, position), token) >> 32
    expected = -math.log(-math.log((bits + 0.5) / 2**32))
    assert gumbels(row_keys([seed], np.array([position])), np.array([token]))[0] == pytest.approx(
        expected, rel=1e-12
    )


def test_noise_never_leaves_its_span() -> None:
    """The ends of the 32-bit uniforms are within what the cut counts with."""
    ends = [-math.log(-math.log((bits + 0.5) / 2**32)) for bits in (0, 2**32 - 1)]
    assert ends[1] - ends[0] <= NOISE_SPAN * (1 + 1e-12)
    noise = gumbels(row_keys([3], np.array([5])), np.arange(100_000))
    assert noise.min() >= ends[0] and noise.max() <= ends[1]
    assert noise.mean() == pytest.approx(0.5772, abs=0.02)  # Euler's constant
    assert noise.std() == pytest.approx(math.pi / math.sqrt(6), abs=0.02)


@given(LOGITS, SEEDS, st.integers(0, 10_000))
def test_temperature_zero_takes_the_most_likely(logits: Float32, seed: int, at: int) -> None:
    assert draw(logits, sampling(0, seed=seed), at) == int(np.argmax(logits))


@given(LOGITS, SEEDS, st.integers(0, 10_000))
def test_the_same_seed_and_position_draw_the_same_token(
    logits: Float32, seed: int, at: int
) -> None:
    """No state, and the logits stay as they were."""
    given_logits = logits.copy()
    first = draw(logits, sampling(seed=seed), at)
    draw(logits, sampling(seed=seed ^ 1), at + 1)
    assert draw(logits, sampling(seed=seed), at) == first
    assert np.array_equal(logits, given_logits)


def test_other_seeds_and_other_positions_draw_other_tokens() -> None:
    flat = np.zeros(1000, np.float32)
    by_seed = {draw(flat, sampling(seed=seed), 5) for seed in range(100)}
    by_position = {draw(flat, sampling(seed=1), position) for position in range(100)}
    assert len(by_seed) > 80 and len(by_position) > 80


def test_a_draw_does_not_depend_on_the_rest_of_the_batch() -> None:
    """A row of a matrix is drawn as it is alone, in whatever order and company."""
    rows = np.random.default_rng(1).normal(0, 3, (16, 500)).astype(np.float32)
    kinds = [sampling(0.5 + n / 8, seed=n, top_p=0.9 if n % 2 else 1.0) for n in range(16)]
    alone = [draw(rows[n].copy(), kinds[n], 10 + n) for n in range(16)]
    assert [draw(rows[n], kinds[n], 10 + n) for n in range(16)] == alone
    reordered = np.ascontiguousarray(rows[::-1])
    assert [draw(reordered[15 - n], kinds[n], 10 + n) for n in range(16)] == alone


CHI_LOGITS = np.array([2.0, 1.5, 1.0, 0.5, 0.0, -0.5, -1.0, -1.5], np.float32)
CHI_LIMIT = 29.9  # chi-square, 7 degrees of freedom, p = 0.0001


def softmax(logits: Float32, temperature: float) -> npt.NDArray[np.float64]:
    weights = np.exp(logits.astype(np.float64) / temperature)
    return np.asarray(weights / weights.sum(), np.float64)


def chi_square(temperature: float, assumed: float, seed: int, draws: int = 4000) -> float:
    kind = sampling(temperature, seed=seed)
    counts = np.bincount(
        [draw(CHI_LOGITS, kind, position) for position in range(draws)], minlength=8
    )
    expected = softmax(CHI_LOGITS, assumed) * draws
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
@pytest.mark.parametrize("seed", [1, 424242, -5])
def test_draws_over_many_positions_are_distributed_as_the_softmax(
    temperature: float, seed: int
) -> None:
    """Chi-square with fixed seeds; the same draws do not pass for another temperature."""
    assert chi_square(temperature, temperature, seed) < CHI_LIMIT
    assert chi_square(temperature, temperature * 1.4, seed) > 3 * CHI_LIMIT


def test_draws_over_many_seeds_at_one_position_are_distributed_as_the_softmax() -> None:
    draws = [draw(CHI_LOGITS, sampling(seed=seed), 3) for seed in range(4000)]
    expected = softmax(CHI_LOGITS, 1.0) * 4000
    counts = np.bincount(draws, minlength=8)
    assert float(((counts - expected) ** 2 / expected).sum()) < CHI_LIMIT


def test_draws_at_successive_positions_are_independent() -> None:
    """Chi-square of the pairs (this draw, the next)."""
    logits = np.zeros(4, np.float32)
    draws = [draw(logits, sampling(seed=9), position) for position in range(8001)]
    pairs = np.zeros((4, 4))
    for now, later in itertools.pairwise(draws):
        pairs[now, later] += 1
    expected = 8000 / 16
    assert float(((pairs - expected) ** 2 / expected).sum()) < 44.3  # 15 degrees, p = 0.0001


def whole_vocabulary(logits: Float32, kind: Sampling, position: int, allowed: list[int]) -> int:
    """The draw without any cut: noise for every token, the best of the allowed."""
    noise = gumbels(row_keys([kind.seed], np.array([position])), np.arange(len(logits)))
    scores = logits.astype(np.float64) / kind.temperature + noise
    return max(allowed, key=lambda token: scores[token])


@settings(max_examples=500)
@given(LOGITS, st.floats(0.05, 2), SEEDS, st.integers(0, 100_000))
def test_the_cut_of_undrawable_tokens_is_exact(
    logits: Float32, temperature: float, seed: int, position: int
) -> None:
    kind = sampling(temperature, seed=seed)
    everything = list(range(len(logits)))
    assert draw(logits, kind, position) == whole_vocabulary(logits, kind, position, everything)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_the_cut_is_exact_on_a_large_vocabulary(temperature: float) -> None:
    random = np.random.default_rng(3)
    for position in range(40):
        logits = random.normal(0, 4, 49_152).astype(np.float32)
        kind = sampling(temperature, seed=position * 7919)
        ids = survivors(logits, kind)
        winner = whole_vocabulary(logits, kind, position, list(range(len(logits))))
        assert draw(logits, kind, position) == winner
        assert winner in ids
    assert temperature > 1 or len(ids) < len(logits)  # something was cut


@settings(max_examples=200)
@given(st.floats(-40, 40, width=32), st.floats(0.05, 2), st.floats(0.001, 5))
def test_the_cut_lies_beyond_any_noise(best: float, temperature: float, margin: float) -> None:
    """At the edge: just inside the span survives, just outside does not."""
    edge = best - NOISE_SPAN * temperature
    logits = np.array([best, edge + margin * temperature, edge - margin * temperature], np.float32)
    assume(edge + margin * temperature < best)
    assert set(survivors(logits, sampling(temperature)).tolist()) == {0, 1}


def reference(logits: Float32, kind: Sampling) -> list[int]:
    """Truncation as its definitions read: top-k, then top-p, then min-p, all before temperature.

    Skips the example where rounding alone would decide.
    """
    order = sorted(range(len(logits)), key=lambda token: (-float(logits[token]), token))
    if kind.top_k:
        order = order[: kind.top_k]
    weights = [math.exp(float(logits[token]) - float(logits.max())) for token in order]
    total = math.fsum(weights)
    if kind.top_p < 1:
        kept, reached = 0, 0.0
        for kept, weight in enumerate(weights, start=1):  # noqa: B007 - used after the loop
            reached += weight / total
            assume(abs(reached - kind.top_p) > 1e-5)
            if reached >= kind.top_p:
                break
        order, weights = order[:kept], weights[:kept]
    if kind.min_p:
        assume(all(abs(weight - kind.min_p) > 1e-5 * kind.min_p for weight in weights))
        order = [t for t, weight in zip(order, weights, strict=True) if weight >= kind.min_p]
    return order


@settings(max_examples=800)
@given(
    LOGITS,
    st.sampled_from([0.2, 0.7, 1.0, 1.5, 2.0]),
    st.one_of(st.just(0), st.integers(1, 70)),
    st.one_of(st.just(1.0), st.floats(0.001, 0.999)),
    st.one_of(st.just(0.0), st.floats(0.001, 0.999)),
    SEEDS,
)
def test_truncation_is_that_of_the_definitions(
    logits: Float32, temperature: float, top_k: int, top_p: float, min_p: float, seed: int
) -> None:
    """What survives is the reference's set less what noise cannot make win; same draw."""
    kind = sampling(temperature, top_p, top_k, min_p, seed)
    expected = reference(logits, kind)
    found = survivors(logits, kind).tolist()
    assert len(found) == len(set(found))
    assert set(found) <= set(expected)
    edge = float(logits.max()) - NOISE_SPAN * temperature
    assert all(logits[token] < edge + 1e-4 for token in set(expected) - set(found))
    assert draw(logits, kind, 11) == whole_vocabulary(logits, kind, 11, expected)


def test_truncations_one_by_one() -> None:
    """Probabilities 0.5, 0.25, 0.125, 0.0625, 0.0625, shuffled."""
    logits = np.log(np.array([0.0625, 0.5, 0.125, 0.25, 0.0625], np.float32))
    assert sorted(survivors(logits, sampling(top_k=1))) == [1]
    assert sorted(survivors(logits, sampling(top_k=3))) == [1, 2, 3]
    assert sorted(survivors(logits, sampling(top_k=4))) == [0, 1, 2, 3]  # of equals the lower id
    assert sorted(survivors(logits, sampling(top_k=50))) == [0, 1, 2, 3, 4]
    assert sorted(survivors(logits, sampling(top_p=0.4))) == [1]
    assert sorted(survivors(logits, sampling(top_p=0.7))) == [1, 3]
    assert sorted(survivors(logits, sampling(top_p=0.8))) == [1, 2, 3]
    assert sorted(survivors(logits, sampling(min_p=0.3))) == [1, 3]
    assert sorted(survivors(logits, sampling(min_p=0.2))) == [1, 2, 3]
    # Top-p counts what top-k has left: of 0.5 and 0.25, the first alone is two thirds.
    assert sorted(survivors(logits, sampling(top_k=2, top_p=0.6))) == [1]
    # Temperature comes last: it does not change what is left.
    assert sorted(survivors(logits, sampling(temperature=2, top_p=0.4))) == [1]
