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

from pinaivu_box.engine import single_row
from pinaivu_box.engine.messages import Sampling, TokenLogprob
from pinaivu_box.engine.runner import Float32, Int32
from pinaivu_box.engine.splitmix import NOISE_SPAN, UInt64, gumbel, gumbels, row_keys
from pinaivu_box.engine.top_k import Ids, top_k

Float64 = npt.NDArray[np.float64]
Positions = Sequence[int] | Int32

_NONE: Ids = np.empty(0, np.intp)
_GREEDY, _TYPICAL = -1, -2  # kinds of rows beside their top-k
_REPEAT_LAST_TOKENS = 64  # llama.cpp's default of penalty_last_n
_MAX_BATCHED_TOP_K = 256  # a larger top-k is drawn row by row
_FEW = 4  # rows, which are drawn one by one
_INITIAL_DEPTH = 6.0  # in logits; e^-6 of the best one
_MIN_LOGITS_PER_THREAD = 1 << 20  # logits; half a millisecond's work or more
_MAX_THREADS = (
    len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
)


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
            row
            for row, sampling in enumerate(samplings)
            if sampling.logit_bias or sampling.looks_back
        ]
        endless = [row for row, sampling in enumerate(samplings) if sampling.ignore_eos]
        self._endless = np.array(endless, np.intp)[:, np.newaxis]
        self._seeds = [sampling.seed for sampling in samplings]
        kinds: dict[int, list[int]] = {}
        for row, sampling in enumerate(samplings):
            kinds.setdefault(_kind(sampling), []).append(row)
        self._kinds = kinds
        self._groups: list[_Group] = []
        # What was adjusted in the last draw, by row: ids, and their logits before that.
        self._before: dict[int, tuple[Ids, Float32]] = {}

    @property
    def adjusts(self) -> bool:
        """Whether penalties or biases change logits before a draw."""
        return bool(self._adjusted)

    def draw(
        self, logits: Float32, positions: Positions, windows: Sequence[PenaltyWindow] = ()
    ) -> list[int]:
        """Tokens of the rows of `logits`, which may be changed, at these positions."""
        return self.draw_keyed(logits, self.keys(np.asarray(positions)), windows)

    def keys(self, positions: Int32 | Ids) -> UInt64:
        """What keys the noise of each row at these positions, shape (…, rows)."""
        return row_keys(self._seeds, positions)

    def draw_keyed(
        self, logits: Float32, keys: UInt64, windows: Sequence[PenaltyWindow] = ()
    ) -> list[int]:
        """As `draw`, from the `keys` of the rows' positions, shape (rows,)."""
        for row in self._adjusted:
            sampling = self._samplings[row]
            window = windows[row] if sampling.looks_back else NO_WINDOW
            ids = _adjustable(sampling, window, logits.shape[1])
            self._before[row] = ids, logits[row, ids]
            _adjust(logits[row], sampling, window)
        if self._endless.size:
            logits[self._endless, self._end_tokens] = -np.inf
        if not self._groups:
            self._groups = self._grouped(logits.shape[1])
        if len(self._groups) == 1:
            return self._groups[0].draw(logits, keys)
        # Most of it is done outside the interpreter's lock.
        run = map if logits.size <= 2 * _MIN_LOGITS_PER_THREAD else _threads().map
        tokens = [0] * len(self._samplings)
        drawn = run(lambda group: group.draw(logits[group.index], keys[group.index]), self._groups)
        for group, of_group in zip(self._groups, drawn, strict=True):
            for row, token in zip(group.rows, of_group, strict=True):
                tokens[row] = token
        return tokens

    def raw(self, logits: Float32, rows: Ids, tokens: Sequence[int]) -> Float32:
        """The logits of these rows' tokens as the model gave them, of `logits` that were drawn
        from (and so adjusted) last; such a token is none that was banned."""
        raw = np.asarray(logits[rows, tokens])
        for number, row in enumerate(rows.tolist() if self._before else ()):
            if (before := self._before.get(row)) is not None:
                ids, values = before
                at = int(np.searchsorted(ids, tokens[number]))
                if at < len(ids) and ids[at] == tokens[number]:
                    raw[number] = values[at]
        return raw

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
        self.index = slice(rows[0], rows[-1] + 1) if contiguous else np.array(rows)
        self.samplings = [samplings[row] for row in rows]
        self._few = 0 < kind <= _MAX_BATCHED_TOP_K and len(rows) <= _FEW
        if self._few or kind == _GREEDY:
            return
        self.temperature = np.array([[each.temperature] for each in self.samplings])
        self.min_p = np.array([[each.min_p] for each in self.samplings])
        self.truncates = any(each.top_p < 1 for each in self.samplings)
        # Of the whole mass; it never reaches infinity, so that nothing is cut.
        top_p = [[each.top_p if each.top_p < 1 else math.inf] for each in self.samplings]
        self.top_p = np.array(top_p)

    def draw(self, logits: Float32, keys: UInt64) -> list[int]:
        """Tokens of its rows."""
        if self._kind == _GREEDY:
            return _integers(logits.argmax(axis=1))
        if self._few:
            return [
                single_row.draw_one(row, sampling, key)
                for row, sampling, key in zip(logits, self.samplings, keys.tolist(), strict=True)
            ]
        if 0 < self._kind <= _MAX_BATCHED_TOP_K:
            return _draw_top_k(logits, self, keys, self._kind)
        return [
            _draw_one(row, sampling, key)
            for row, sampling, key in zip(logits, self.samplings, keys, strict=True)
        ]


def _kind(sampling: Sampling) -> int:
    if sampling.temperature == 0:
        return _GREEDY
    return _TYPICAL if sampling.typical_p < 1 else sampling.top_k


def _repeated(window: PenaltyWindow, n_vocab: int) -> Ids:
    ids = np.unique(np.array(window.tokens[-_REPEAT_LAST_TOKENS:], np.intp))
    return np.asarray(ids[ids < n_vocab])  # those of images are beyond the vocabulary


def _adjustable(sampling: Sampling, window: PenaltyWindow, n_vocab: int) -> Ids:
    """The ids whose logits `_adjust` may change, in order."""
    output = np.array(window.tokens[window.prompt_length :], np.intp)
    biased = np.array([int(token) for token in sampling.logit_bias], np.intp)
    return np.unique(np.concatenate([_repeated(window, n_vocab), output, biased]))


def _adjust(row: Float32, sampling: Sampling, window: PenaltyWindow) -> None:
    """Apply penalties and biases, in place."""
    if sampling.repeat_penalty != 1 and len(window.tokens):
        ids = _repeated(window, len(row))
        penalty = np.float32(sampling.repeat_penalty)
        row[ids] = np.where(row[ids] > 0, row[ids] / penalty, row[ids] * penalty)
    if len(window.tokens) > window.prompt_length:
        output = np.array(window.tokens[window.prompt_length :], np.intp)
        ids, counts = np.unique(output, return_counts=True)
        subtracted = counts * sampling.frequency_penalty + sampling.presence_penalty
        row[ids] -= subtracted.astype(np.float32)
    for token, bias in sampling.logit_bias.items():
        row[int(token)] += bias


# -- top-k: the candidates of all rows in one matrix ---------------------------------------------


def _draw_top_k(logits: Float32, group: _Group, keys: UInt64, k: int) -> list[int]:
    ids, values = top_k(logits, k)
    weights = np.exp((values - values[:, :1]).astype(np.float64))
    kept = weights >= group.min_p
    if group.truncates:
        mass = weights.cumsum(axis=1)
        # The first token that reaches the mass is the last one kept.
        kept[:, 1:] &= mass[:, :-1] < mass[:, -1:] * group.top_p
    # Each row keeps its first ones: often so few that the rest need not be looked at.
    width = int(kept.sum(axis=1).max())
    if width <= 1:
        return _integers(ids[:, 0])
    ids, kept = ids[:, :width], kept[:, :width]
    scores = values[:, :width] / group.temperature
    scores += gumbels(keys[:, np.newaxis], ids)
    scores[~kept] = -np.inf
    return _integers(ids[np.arange(len(ids)), scores.argmax(axis=1)])


def _integers(ids: Ids) -> list[int]:
    listed: list[int] = ids.tolist()
    return listed


# -- without top-k: one row's survivors -----------------------------------------------------------


def _draw_one(logits: Float32, sampling: Sampling, key: np.uint64) -> int:
    ids = survivors(logits, sampling)
    scores = logits[ids].astype(np.float64) / sampling.temperature
    return int(ids[np.argmax(scores + gumbels(key, ids))])


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


def is_possible(row: Float32, sampling: Sampling, token: int) -> bool:
    """Whether that token can be drawn from a position's adjusted logits, whatever the noise."""
    if sampling.temperature == 0:
        return bool(row[token] == row.max())
    return bool(row[token] > -np.inf) and token in survivors(row, sampling)


def noise(draw: Draw, token: int) -> float:
    """The Gumbel noise of a token at that position."""
    return gumbel(int(row_keys([draw.sampling.seed], np.array([draw.position]))[0]), token)


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
