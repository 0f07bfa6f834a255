"""Gumbel noise from SplitMix64 (Steele, Lea, Flood: "Fast Splittable Pseudorandom Number
Generators", OOPSLA 2014): for arrays, and for single numbers, where numpy would take longer."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

UInt64 = npt.NDArray[np.uint64]
Float64 = npt.NDArray[np.float64]

_GOLDEN, _MIX_1, _MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_MASK = 2**64 - 1
_UNIT = 2.0**-32
_GOLDEN_64, _MIX_1_64, _MIX_2_64 = map(np.uint64, (_GOLDEN, _MIX_1, _MIX_2))
_1, _27, _30, _31, _32 = map(np.uint64, (1, 27, 30, 31, 32))

# Noise comes from 32-bit uniforms (n + 1/2) / 2^32, so it lies in [-3.14, 22.88]: a token whose
# scaled logit is further than this below the best one loses whatever the noise.
_NOISE_MAX = -math.log(-math.log1p(-(2.0**-33)))
_NOISE_MIN = -math.log(33 * math.log(2))
NOISE_SPAN = _NOISE_MAX - _NOISE_MIN


def splitmix64(seeds: UInt64 | np.uint64, n: UInt64) -> UInt64:
    """The n-th output (from 0) of SplitMix64 started at each seed; the arrays are broadcast."""
    z: UInt64 = seeds + _GOLDEN_64 * (n + _1)  # array arithmetic wraps around
    z ^= z >> _30
    z *= _MIX_1_64
    z ^= z >> _27
    z *= _MIX_2_64
    z ^= z >> _31
    return z


def row_keys(seeds: Sequence[int], positions: npt.NDArray[np.integer]) -> UInt64:
    """What keys the noise of rows with these seeds at these positions, shape (…, rows): the
    position-th output of SplitMix64 started at the seed."""
    masked = np.array([seed & _MASK for seed in seeds], np.uint64)
    return splitmix64(masked, positions.astype(np.uint64))


def gumbels(keys: UInt64 | np.uint64, ids: npt.NDArray[np.intp]) -> Float64:
    """Standard Gumbel noise of tokens: the uniform of token i is from the i-th output of SplitMix64
    started at the key.  The arrays are broadcast."""
    random = splitmix64(keys, ids.astype(np.uint64)) >> _32
    noise: Float64 = np.add(random, 0.5, dtype=np.float64)
    noise *= _UNIT
    for _ in range(2):
        np.log(noise, out=noise)
        np.negative(noise, out=noise)
    return noise


def gumbel(key: int, token: int) -> float:
    """The same of one token."""
    z = key + _GOLDEN * (token + 1) & _MASK
    z = (z ^ z >> 30) * _MIX_1 & _MASK
    z = (z ^ z >> 27) * _MIX_2 & _MASK
    z ^= z >> 31
    return -math.log(-math.log(((z >> 32) + 0.5) * _UNIT))
