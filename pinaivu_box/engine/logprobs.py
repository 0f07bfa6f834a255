"""Log-probabilities of tokens, from a position's logits."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from pinaivu_box.engine.messages import TokenLogprob
from pinaivu_box.engine.runner import Float32
from pinaivu_box.engine.sampling import top_k


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
