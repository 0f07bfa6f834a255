"""A single row's draw with top-k, in few calls.

After a step of llama.cpp the processor's caches hold weights, so what a draw takes is what it
touches: each of numpy's functions is some microseconds then, however little it is given.  So numpy
finds the candidates here, and the rest is arithmetic on some forty of them, the same as for many
rows in `sampling`.
"""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left, bisect_right
from itertools import accumulate
from operator import neg

import numpy as np

from pinaivu_box.engine.messages import Sampling
from pinaivu_box.engine.runner import Float32
from pinaivu_box.engine.splitmix import gumbel
from pinaivu_box.engine.top_k import top_k

_COLUMNS = 768
_LEAST_COLUMN = 8  # tokens; smaller vocabularies are sorted


def draw_one(logits: Float32, sampling: Sampling, key: int) -> int:
    """A token from logits, shape (n_vocab,), with top-k."""
    ids, values = _candidates(logits, sampling.top_k)
    return _pick(ids, values, sampling, key)


def _candidates(logits: Float32, k: int) -> tuple[list[int], list[float]]:
    """As `top_k`."""
    rows = len(logits) // _COLUMNS
    whole = rows * _COLUMNS
    if rows < _LEAST_COLUMN or k > _COLUMNS // 2:
        found, their = top_k(logits[np.newaxis], k)
        return found[0].tolist(), their[0].tolist()
    # Column c holds the tokens c, c + _COLUMNS, …  At least k tokens reach the k-th best of the
    # columns' best ones, and they are in the columns whose best one does.
    grid = logits[:whole].reshape(rows, _COLUMNS)
    peaks = grid.max(axis=0)
    # Methods, since numpy's functions pass several of Python before they call them.
    ordered = peaks.copy()
    ordered.partition(_COLUMNS - k)
    floor = ordered[_COLUMNS - k]
    columns = (peaks >= floor).nonzero()[0]
    inside = grid.take(columns, axis=1).ravel()
    at = (inside >= floor).nonzero()[0]
    values, count, chosen = inside.take(at).tolist(), len(columns), columns.tolist()
    ids = [n // count * _COLUMNS + chosen[n % count] for n in at.tolist()]
    if whole < len(logits):
        rest = (logits[whole:] >= floor).nonzero()[0] + whole
        ids += rest.tolist()
        values += logits.take(rest).tolist()
    # Stable: of equals the lower id is first.
    best = sorted(range(len(ids)), key=values.__getitem__, reverse=True)[:k]
    if not best:  # not a number: a broken model
        best, ids, values = [0], [0], [0.0]
    return [ids[n] for n in best], [values[n] for n in best]


def _pick(ids: list[int], values: list[float], sampling: Sampling, key: int) -> int:
    """A token of these, which come best first with their logits."""
    best = values[0]
    # As numpy does it for many rows, the difference is rounded to 32 bits.
    weights = list(map(math.exp, array("f", [value - best for value in values])))
    width = len(weights)
    if sampling.top_p < 1:
        mass = list(accumulate(weights))
        # The first token that reaches the mass is the last one kept.
        width = bisect_left(mass, mass[-1] * sampling.top_p) + 1
    width = min(width, bisect_right(weights, -sampling.min_p, key=neg))
    if width <= 1:
        return ids[0]
    temperature = sampling.temperature
    scores = [values[n] / temperature + gumbel(key, ids[n]) for n in range(width)]
    return ids[scores.index(max(scores))]
