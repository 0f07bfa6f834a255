"""Drawing tokens: greedy, or Gumbel-max with noise keyed by (seed, position, token id).

The Gumbel-max trick (Gumbel 1954; Maddison et al., "A* Sampling", 2014): the argmax of
logit / temperature + Gumbel noise is distributed as the softmax.  The noise of a token at a
position depends on the seed, the position and the token's id alone, so a sequence can be
preempted, moved or audited in the middle and draws the same tokens.

The order of truncation is llama.cpp's: top-k, top-p, min-p, then temperature.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from pinaivu_box.engine.messages import Sampling

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Ids = npt.NDArray[np.intp]

# SplitMix64 (Steele, Lea, Flood: "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014).
_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_MASK = 2**64 - 1

# Noise comes from 32-bit uniforms (n + 1/2) / 2^32, so it lies in [-3.14, 22.88].
_NOISE_MAX = -math.log(-math.log1p(-(2.0**-33)))
_NOISE_MIN = -math.log(33 * math.log(2))
# A token whose scaled logit is this far below the best one loses whatever the noise: the cut of
# the candidates at this distance is exact.
NOISE_SPAN = _NOISE_MAX - _NOISE_MIN


def splitmix64(seed: int, n: int) -> int:
    """The n-th output (from 0) of SplitMix64 started at `seed`."""
    z = (seed + _GOLDEN * (n + 1)) & _MASK
    z = ((z ^ (z >> 30)) * _MIX_1) & _MASK
    z = ((z ^ (z >> 27)) * _MIX_2) & _MASK
    return z ^ (z >> 31)


def gumbel_noise(seed: int, position: int, ids: Ids) -> Float64:
    """Standard Gumbel noise for token `ids` at `position`; shape of `ids`.

    The uniform of token i is from the i-th output of SplitMix64 started at the position-th output
    of SplitMix64 started at the seed.
    """
    key = splitmix64(seed & _MASK, position)
    with np.errstate(over="ignore"):
        z = np.uint64(key) + np.uint64(_GOLDEN) * (ids.astype(np.uint64) + np.uint64(1))
        z = (z ^ (z >> np.uint64(30))) * np.uint64(_MIX_1)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(_MIX_2)
        z ^= z >> np.uint64(31)
    uniform = ((z >> np.uint64(32)).astype(np.float64) + 0.5) * 2.0**-32
    return np.asarray(-np.log(-np.log(uniform)), dtype=np.float64)


def draw(logits: Float32, sampling: Sampling, position: int) -> int:
    """The token at `position` given its logits, shape (n_vocab,)."""
    if sampling.temperature == 0:
        return int(np.argmax(logits))
    ids = survivors(logits, sampling)
    scores = logits[ids].astype(np.float64) / sampling.temperature
    return int(ids[np.argmax(scores + gumbel_noise(sampling.seed, position, ids))])


def survivors(logits: Float32, sampling: Sampling) -> Ids:
    """Ids that truncation leaves and that the noise can still make the winner."""
    best = float(logits.max())
    drawable = best - NOISE_SPAN * sampling.temperature
    if sampling.top_k:
        ids = _top_k(logits, best, sampling.top_k)
        mass = float(np.exp(logits[ids].astype(np.float64) - best).sum())
    elif sampling.top_p < 1:
        ids = np.flatnonzero(logits >= drawable)
        mass = float(np.exp(logits - np.float32(best)).sum(dtype=np.float64))
    else:
        ids = np.flatnonzero(logits >= drawable)
        mass = 0.0  # not needed
    if sampling.top_p < 1:
        ids = _top_p(logits, ids, best, mass * sampling.top_p)
    floor = drawable
    if sampling.min_p > 0:
        floor = max(floor, best + math.log(sampling.min_p))
    return ids[logits[ids] >= floor]


def _top_k(logits: Float32, best: float, k: int) -> Ids:
    """The k largest, best first; among equals the lower id."""
    ids = np.flatnonzero(logits >= best - 8)  # usually holds the k largest: saves a full sort
    if len(ids) < k:
        k = min(k, len(logits))
        kth = np.partition(logits, len(logits) - k)[len(logits) - k]
        ids = np.flatnonzero(logits >= kth)
    return ids[np.argsort(-logits[ids], kind="stable")[:k]]


def _top_p(logits: Float32, ids: Ids, best: float, mass: float) -> Ids:
    """The fewest most likely of `ids` whose unnormalised probabilities reach `mass`."""
    ids = ids[np.argsort(-logits[ids], kind="stable")]
    reached = np.cumsum(np.exp(logits[ids].astype(np.float64) - best))
    return ids[: int(np.searchsorted(reached, mass)) + 1]
