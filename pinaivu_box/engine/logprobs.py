"""Log-probabilities of tokens, from a position's logits."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from pinaivu_box.engine.messages import TokenLogprob
from pinaivu_box.engine.runner import Float32
from pinaivu_box.engine.sampling import Float64, Ids, top_k

_NONE: Ids = np.empty(0, np.intp)


def token_logprob(
    row: Float32, token: int, count: int, spelling: Callable[[int], bytes]
) -> TokenLogprob:
    """The log-probability of `token` and those of the `count` likeliest ones, from a position's
    logits, shape (n_vocab,).  `spelling` gives the bytes of a token."""
    values, top = log_probabilities(row, [token], count)
    likeliest = zip(top.tolist(), values[1:].tolist(), strict=True)
    return TokenLogprob(
        spelling(token),
        float(values[0]),
        [(spelling(other), logprob) for other, logprob in likeliest],
    )


def log_probabilities(row: Float32, tokens: Sequence[int], count: int) -> tuple[Float64, Ids]:
    """Natural log-probabilities of `tokens` and then of the `count` likeliest ones, which are also
    returned; of the whole vocabulary at temperature 1."""
    best = float(row.max())
    total = best + math.log(np.exp(row - np.float32(best)).sum(dtype=np.float64))
    top = top_k(row[np.newaxis], count)[0][0] if count else _NONE
    ids = np.concatenate([np.array(tokens, np.intp), top])
    return np.asarray(row[ids].astype(np.float64) - total), top
