"""Drawing tokens: greedy, or Gumbel-max with noise keyed by (seed, position, token id); and their
log-probabilities.

The Gumbel-max trick (Gumbel 1954; Maddison et al., "A* Sampling", 2014): the argmax of
logit / temperature + Gumbel noise is distributed as the softmax.  The noise of a token at a
position depends on the seed, the position and the token's id alone, so a sequence can be
preempted, moved or audited in the middle and draws the same tokens.

The order of truncation is llama.cpp's: top-k, typical-p, top-p, min-p, then temperature.

A vocabulary has up to 260,000 tokens and a step up to 256 rows, so nothing here sorts a vocabulary:
what cannot be drawn is cut first, in ways that are exact, and rows of one kind are drawn together.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache

import msgspec
import numpy as np
import numpy.typing as npt

from pinaivu_box.engine.messages import Sampling, TokenLogprob
from pinaivu_box.engine.runner import Float32, Int32

Float64 = npt.NDArray[np.float64]
Ids = npt.NDArray[np.intp]
UInt64 = npt.NDArray[np.uint64]
Positions = Sequence[int] | Int32

_NONE: Ids = np.empty(0, np.intp)
_GREEDY, _TYPICAL = -1, -2  # kinds of rows beside their top-k
_REPEAT_LAST_TOKENS = 64  # llama.cpp's default of penalty_last_n
_MAX_BATCHED_TOP_K = 256  # a larger top-k is drawn row by row
# Tokens are looked at in columns of so many first: only columns whose best token is good enough are
# looked into.  One pass over the vocabulary, then almost nothing.
_COLUMN = 32
_INITIAL_DEPTH = 6.0  # in logits; e^-6 of the best one
_MIN_LOGITS_PER_THREAD = 1 << 20  # logits; half a millisecond's work or more
_MAX_THREADS = (
    len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
)

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


def splitmix64(seeds: UInt64, n: UInt64) -> UInt64:
    """The n-th output (from 0) of SplitMix64 started at each seed; the arrays are broadcast."""
    z = seeds + np.uint64(_GOLDEN) * (n + np.uint64(1))  # array arithmetic wraps around
    z ^= z >> np.uint64(30)
    z *= np.uint64(_MIX_1)
    z ^= z >> np.uint64(27)
    z *= np.uint64(_MIX_2)
    z ^= z >> np.uint64(31)
    return z


def gumbel_noise(seed: int, position: int, ids: Ids) -> Float64:
    """Standard Gumbel noise for token `ids` at `position`; shape of `ids`.

    The uniform of token i is from the i-th output of SplitMix64 started at the position-th output
    of SplitMix64 started at the seed.
    """
    seeds, positions = np.array([seed & _MASK], np.uint64), np.array([position], np.uint64)
    return _noise(splitmix64(seeds, positions), ids)


def _noise(keys: UInt64, ids: Ids) -> Float64:
    uniform = (splitmix64(keys, ids.astype(np.uint64)) >> np.uint64(32)).astype(np.float64)
    uniform += 0.5
    uniform *= 2.0**-32
    noise = -np.log(-np.log(uniform))
    return np.asarray(noise, dtype=np.float64)


@dataclass(frozen=True)
class PenaltyWindow:
    """The tokens before a position, where penalties need them; the first `prompt_length` are the
    prompt's."""

    tokens: Sequence[int] = ()
    prompt_length: int = 0


NO_WINDOW = PenaltyWindow()


@dataclass(frozen=True)
class Draw:
    """What decides one row's draw."""

    sampling: Sampling
    position: int
    window: PenaltyWindow = NO_WINDOW


def draw_rows(logits: Float32, draws: Sequence[Draw], end_tokens: Ids = _NONE) -> list[int]:
    """One token for each row of `logits`, shape (rows, n_vocab), which may be changed."""
    sampler = Sampler([each.sampling for each in draws], end_tokens)
    positions, windows = [each.position for each in draws], [each.window for each in draws]
    return sampler.draw(logits, positions, windows)


def redraw(row: Float32, sampling: Sampling, position: int) -> int:
    """A token from a row that `draw_rows` has already drawn from, and so adjusted."""
    adjusted = msgspec.structs.replace(
        sampling,
        frequency_penalty=0.0,
        presence_penalty=0.0,
        repeat_penalty=1.0,
        logit_bias={},
        ignore_eos=False,
    )
    return draw_rows(row[np.newaxis], [Draw(adjusted, position)])[0]


class Sampler:
    """Draws for rows with these parameters, step after step.

    A row's token does not depend on the other rows; those with the same kind of truncation are only
    computed together.
    """

    def __init__(self, samplings: Sequence[Sampling], end_tokens: Ids = _NONE) -> None:
        self._samplings = samplings
        self._end_tokens = end_tokens
        self._adjusted = [
            row for row, sampling in enumerate(samplings)
            if sampling.ignore_eos or sampling.logit_bias or sampling.looks_back
        ]  # fmt: skip
        kinds: dict[int, list[int]] = {}
        for row, sampling in enumerate(samplings):
            kinds.setdefault(_kind(sampling), []).append(row)
        self._kinds = kinds
        self._groups: list[_Group] = []

    def draw(
        self, logits: Float32, positions: Positions, windows: Sequence[PenaltyWindow] = ()
    ) -> list[int]:
        """Tokens of the rows of `logits`, which may be changed, at these positions."""
        for row in self._adjusted:
            window = windows[row] if self._samplings[row].looks_back else NO_WINDOW
            _adjust(logits[row], self._samplings[row], window, self._end_tokens)
        if not self._groups:
            self._groups = self._grouped(logits.shape[1])
        positions = np.asarray(positions)
        if len(self._groups) == 1:
            return self._groups[0].draw(logits, positions)
        # Most of it is done outside the interpreter's lock.
        run = map if logits.size <= 2 * _MIN_LOGITS_PER_THREAD else _threads().map
        tokens = [0] * len(self._samplings)
        drawn = run(lambda group: group.draw(logits, positions), self._groups)
        for group, of_group in zip(self._groups, drawn, strict=True):
            for row, token in zip(group.rows, of_group, strict=True):
                tokens[row] = token
        return tokens

    def _grouped(self, n_vocab: int) -> list[_Group]:
        """Rows of a kind, in parts that are worth a thread each."""
        groups = []
        for kind, rows in self._kinds.items():
            parts = max(1, min(_MAX_THREADS, len(rows) * n_vocab // _MIN_LOGITS_PER_THREAD))
            size = -(-len(rows) // parts)
            for start in range(0, len(rows), size):
                groups.append(_Group(kind, rows[start : start + size], self._samplings))
        return groups


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_MAX_THREADS, "sampling")


class _Group:
    """Rows with the same kind of truncation, and their parameters in columns."""

    def __init__(self, kind: int, rows: list[int], samplings: Sequence[Sampling]) -> None:
        self.rows = rows
        self._kind = kind
        # The logits of all rows are many megabytes: do not copy them without need.
        contiguous = rows[-1] - rows[0] == len(rows) - 1
        self._index = slice(rows[0], rows[-1] + 1) if contiguous else np.array(rows)
        self.samplings = [samplings[row] for row in rows]
        self.temperature = np.array([[each.temperature] for each in self.samplings])
        self.top_p = np.array([[each.top_p] for each in self.samplings])
        self.min_p = np.array([[each.min_p] for each in self.samplings])
        self.seeds = np.array([each.seed & _MASK for each in self.samplings], np.uint64)
        self.truncates = bool((self.top_p < 1).any())

    def draw(self, logits: Float32, positions: Int32) -> list[int]:
        """Tokens of its rows; the arguments are those of all rows."""
        logits, positions = logits[self._index], positions[self._index]
        if self._kind == _GREEDY:
            greedy: list[int] = logits.argmax(axis=1).tolist()
            return greedy
        if 0 < self._kind <= _MAX_BATCHED_TOP_K:
            return _draw_top_k(logits, self, positions, self._kind)
        return [
            _draw_one(row, sampling, int(position))
            for row, sampling, position in zip(logits, self.samplings, positions, strict=True)
        ]

    def keys(self, positions: Int32) -> UInt64:
        """What keys each row's noise, shape (rows, 1)."""
        return splitmix64(self.seeds, positions.astype(np.uint64))[:, np.newaxis]


def _kind(sampling: Sampling) -> int:
    if sampling.temperature == 0:
        return _GREEDY
    return _TYPICAL if sampling.typical_p < 1 else sampling.top_k


def _adjust(row: Float32, sampling: Sampling, window: PenaltyWindow, end_tokens: Ids) -> None:
    """Apply penalties and biases, in place."""
    if sampling.repeat_penalty != 1 and len(window.tokens):
        ids = np.unique(np.array(window.tokens[-_REPEAT_LAST_TOKENS:], np.intp))
        penalty = np.float32(sampling.repeat_penalty)
        row[ids] = np.where(row[ids] > 0, row[ids] / penalty, row[ids] * penalty)
    if len(window.tokens) > window.prompt_length:
        output = np.array(window.tokens[window.prompt_length :], np.intp)
        ids, counts = np.unique(output, return_counts=True)
        subtracted = counts * sampling.frequency_penalty + sampling.presence_penalty
        row[ids] -= subtracted.astype(np.float32)
    for token, bias in sampling.logit_bias.items():
        row[int(token)] += bias
    if sampling.ignore_eos:
        row[end_tokens] = -np.inf


# -- top-k: the candidates of all rows in one matrix ---------------------------------------------


def _draw_top_k(logits: Float32, group: _Group, positions: Int32, k: int) -> list[int]:
    ids, values = top_k(logits, k)
    weights = np.exp((values - values[:, :1]).astype(np.float64))
    dropped = weights < group.min_p
    if group.truncates:
        mass = weights.cumsum(axis=1)
        # The first token that reaches the mass is the last one kept.
        beyond = mass[:, :-1] >= mass[:, -1:] * group.top_p
        dropped[:, 1:] |= beyond & (group.top_p < 1)
    scores = values / group.temperature
    scores += _noise(group.keys(positions), ids)
    scores[dropped] = -np.inf
    tokens: list[int] = ids[np.arange(len(ids)), scores.argmax(axis=1)].tolist()
    return tokens


def top_k(logits: Float32, k: int) -> tuple[Ids, Float32]:
    """Ids and logits of each row's k largest, best first; among equals the lower id.

    Shapes (rows, min(k, n_vocab)).
    """
    rows, n_vocab = logits.shape
    columns = n_vocab // _COLUMN
    if columns <= 2 * k:
        return _largest(logits, np.broadcast_to(np.arange(n_vocab), logits.shape), k)
    # Column c holds the tokens c, c + columns, …: their maxima are one streaming pass.
    whole = columns * _COLUMN
    peaks = logits[:, :whole].reshape(rows, _COLUMN, columns).max(axis=1)
    chosen = peaks.argpartition(columns - k, axis=1)[:, columns - k :]
    inside = (chosen[:, np.newaxis] + np.arange(0, whole, columns)[:, np.newaxis]).reshape(rows, -1)
    if whole < n_vocab:
        rest = np.broadcast_to(np.arange(whole, n_vocab), (rows, n_vocab - whole))
        inside = np.concatenate([inside, rest], axis=1)
    ids, values = _largest(logits, inside, k)
    # k columns have a token as good as the k-th: another column can only have its equal.
    tied = (peaks >= values[:, -1:]).sum(axis=1) > k
    for row in np.flatnonzero(tied):
        ids[row] = np.argsort(-logits[row], kind="stable")[:k]
        values[row] = logits[row, ids[row]]
    return ids, values


def _largest(logits: Float32, candidates: Ids, k: int) -> tuple[Ids, Float32]:
    """The k largest of each row's candidates, as `top_k` gives them."""
    size = candidates.shape[1]
    row = np.arange(len(logits))[:, np.newaxis]
    values = logits[row, candidates]
    if size > 2 * k:
        best = values.argpartition(size - k, axis=1)[:, size - k :]
        kth = values[row, best[:, :1]]
        ties = int((values >= kth).sum(axis=1).max())
        if ties > k:  # equals of the k-th that were left out may have lower ids
            best = values.argpartition(size - ties, axis=1)[:, size - ties :]
        candidates, values = candidates[row, best], values[row, best]
    order = np.lexsort((candidates, -values), axis=1)[:, :k]
    return candidates[row, order], values[row, order]


# -- without top-k: one row's survivors -----------------------------------------------------------


def _draw_one(logits: Float32, sampling: Sampling, position: int) -> int:
    ids = survivors(logits, sampling)
    scores = logits[ids].astype(np.float64) / sampling.temperature
    return int(ids[np.argmax(scores + gumbel_noise(sampling.seed, position, ids))])


def survivors(logits: Float32, sampling: Sampling) -> Ids:
    """Ids that truncation leaves and that the noise can still make the winner."""
    if sampling.typical_p < 1:
        ids = _typical(logits, sampling)
    elif sampling.top_k:
        ids = top_k(logits[np.newaxis], sampling.top_k)[0][0]
    elif sampling.top_p < 1:
        ids = _nucleus(logits, sampling.top_p)
    else:
        return np.flatnonzero(logits >= _floor(logits.max(), sampling))
    if sampling.top_p < 1 and (sampling.typical_p < 1 or sampling.top_k):
        ids = _top_p(logits[ids], ids, sampling.top_p)
    return np.asarray(ids[logits[ids] >= _floor(logits[ids[0]], sampling)])


def _floor(best: np.float32, sampling: Sampling) -> np.float32:
    """The logit below which min-p cuts tokens, or the noise cannot make them the winner."""
    below = -NOISE_SPAN * sampling.temperature
    if sampling.min_p > 0:
        below = max(below, math.log(sampling.min_p))
    return np.float32(float(best) + below)


def _typical(logits: Float32, sampling: Sampling) -> Ids:
    """Locally typical sampling (Meister et al., 2022) after top-k; best first.

    Tokens whose surprise is closest to the expected one are kept until they reach `typical_p`.
    """
    k = sampling.top_k or len(logits)
    ids = np.argsort(-logits, kind="stable")[:k]
    ids = ids[logits[ids] > -np.inf]
    surprise = -_log_softmax(logits[ids])
    probabilities = np.exp(-surprise)
    entropy = (probabilities * surprise).sum()
    closest = np.argsort(np.abs(surprise - entropy), kind="stable")
    mass = np.cumsum(probabilities[closest])
    typical = closest[: int(np.searchsorted(mass, sampling.typical_p)) + 1]
    return np.asarray(ids[np.sort(typical)])


def _log_softmax(values: Float32) -> Float64:
    wide = values.astype(np.float64)
    wide -= wide.max()
    return np.asarray(wide - math.log(np.exp(wide).sum()))


def _top_p(values: Float32, ids: Ids, top_p: float) -> Ids:
    """The first of these ids, best first, whose probabilities reach `top_p`."""
    mass = np.cumsum(np.exp(values.astype(np.float64) - float(values[0])))
    return ids[: int(np.searchsorted(mass, mass[-1] * top_p)) + 1]


def _nucleus(logits: Float32, top_p: float) -> Ids:
    """The smallest set of most likely ids whose probabilities reach `top_p`, best first.

    Only the upper part of the vocabulary is sorted, as much of it as holds that mass.
    """
    best = float(logits.max())
    mass = float(np.exp(logits - np.float32(best)).sum(dtype=np.float64)) * top_p
    depth = _INITIAL_DEPTH
    while True:
        ids = np.flatnonzero(logits >= np.float32(best - depth))
        weights = np.exp(logits[ids].astype(np.float64) - best)
        if weights.sum() >= mass or len(ids) == len(logits):
            break
        depth *= 2
    order = np.argsort(-logits[ids], kind="stable")
    reached = np.cumsum(weights[order])
    return ids[order[: int(np.searchsorted(reached, mass)) + 1]]


# -- log-probabilities -----------------------------------------------------------------------------


def token_logprob(
    row: Float32, token: int, count: int, spelling: Callable[[int], bytes]
) -> TokenLogprob:
    """The natural log-probability of `token` and those of the `count` likeliest ones, at
    temperature 1, from a position's logits, shape (n_vocab,).  `spelling` gives a token's bytes."""
    best = float(row.max())
    total = best + math.log(np.exp(row - np.float32(best)).sum(dtype=np.float64))
    likeliest = top_k(row[np.newaxis], count)[0][0].tolist() if count else []
    return TokenLogprob(
        spelling(token),
        float(row[token]) - total,
        [(spelling(other), float(row[other]) - total) for other in likeliest],
    )
