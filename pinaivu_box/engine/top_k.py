"""The k largest logits of each of many rows, without sorting a vocabulary.

A row is seen as columns of tokens, a column's best one as its peak, and the peaks in groups.  The
k-th best of the groups' peaks is a floor that at least k tokens reach and hardly more do, so all
but one pass over the vocabulary is work on a few tokens a row.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pinaivu_box.engine.runner import Float32

Ids = npt.NDArray[np.intp]

_COLUMN = 16  # tokens of a column, which lie far apart: each one that is looked at is a cache miss
_MIN_GROUPS = 64
_GROUPS_PER_K = 3  # the more groups, the fewer tokens beyond k reach the floor


class _Columns(NamedTuple):
    """Column c holds the tokens c + `offsets`, shape (_COLUMN, 1); tokens from `whole` on are in
    none."""

    groups: int
    number: int
    whole: int
    offsets: Ids
    first_k: Ids


@lru_cache(maxsize=64)
def _columns(n_vocab: int, k: int) -> _Columns:
    groups = _MIN_GROUPS
    while groups < _GROUPS_PER_K * k:
        groups *= 2
    count = n_vocab // (_COLUMN * groups) * groups
    offsets = np.arange(_COLUMN)[:, np.newaxis] * count
    return _Columns(groups, count, count * _COLUMN, offsets, np.arange(k))


def top_k(logits: Float32, k: int) -> tuple[Ids, Float32]:
    """Ids and logits of each row's k largest, best first; among equals the lower id.

    Shapes (rows, min(k, n_vocab)).
    """
    rows, n_vocab = logits.shape
    columns = _columns(n_vocab, k)
    if not columns.number:
        return _sorted(logits, k)
    # Their maxima are one streaming pass.
    grid = logits[:, : columns.whole].reshape(rows, _COLUMN, columns.number)
    peaks = grid.max(axis=1)
    best = peaks.reshape(rows, -1, columns.groups).max(axis=1)
    best.partition(columns.groups - k, axis=1)
    floors = best[:, columns.groups - k, np.newaxis]
    # Tokens of a column one after another, each of all columns: so the ids of a row ascend.
    at = _reaching(peaks, floors, n_vocab) + columns.offsets
    values = logits.take(at)
    reach = values >= (floors if rows == 1 else floors.take(at[0] // n_vocab))
    at, values = at[reach], values[reach]
    if columns.whole < n_vocab:
        last = _reaching(logits[:, columns.whole :], floors, n_vocab) + columns.whole
        at, values = np.concatenate([at, last]), np.concatenate([values, logits.take(last)])
    if rows == 1:
        if len(at) < k:
            return _sorted(logits, k)
        chosen = np.argsort(-values, kind="stable")[np.newaxis, :k]
        return at[chosen], values[chosen]
    row = at // n_vocab
    counts = np.bincount(row, minlength=rows)
    if counts.min() < k:  # there are values that are no numbers: a broken model
        return _sorted(logits, k)
    # Stable: equals stay in the order of their ids.
    order = np.lexsort((-values, row))
    begins = counts.cumsum() - counts
    chosen = order.take(begins[:, np.newaxis] + columns.first_k)
    return at.take(chosen) % n_vocab, values.take(chosen)


def _reaching(values: Float32, floors: Float32, n_vocab: int) -> Ids:
    """Where the values are that are not below their row's floor, in order, if rows are `n_vocab`
    long."""
    found = np.flatnonzero(values >= floors)
    rows, length = values.shape
    return found if rows == 1 else found + found // length * (n_vocab - length)


def _sorted(logits: Float32, k: int) -> tuple[Ids, Float32]:
    ids = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    return ids, np.take_along_axis(logits, ids, axis=1)
