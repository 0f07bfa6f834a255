"""Exact mode at llama.cpp: batches of which its CPU attention computes each row in the way that
`exact_path` says, also after llama.cpp has cut them into parts of its own."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from pinaivu_box.engine.exact_path import MOST_ROWS
from pinaivu_box.engine.runner import Batch, Int32

# Of so many cells llama.cpp pads the number that attention looks at to a multiple; from 512 on the
# kernel has another way for a row that is alone.
_PADDED_CELLS = 256


def parts(batch: Batch, *, pool: bool) -> list[Batch]:
    """What is computed by a call each: blocks of one sequence, as llama.cpp would not cut those
    of several at their borders; and in a pool, whose rows attention sees as one, fewer rows than a
    block has."""
    size = len(batch.tokens)
    if batch.in_blocks:
        cuts = [*np.flatnonzero(np.diff(batch.sequence_ids, prepend=-1)).tolist(), size]
    elif pool:
        count = -(-size // MOST_ROWS)
        cuts = [size * number // count for number in range(count + 1)]
    else:
        return [batch]
    return [batch.part(start, stop) for start, stop in pairwise(cuts)]


def with_company(batch: Batch, *, pool: bool, ubatch: int) -> tuple[Batch, dict[int, int]]:
    """The batch with one more row after each that would be alone in a part of its own, since from
    512 cells on the kernel has another way for those; and the positions of these rows, which are to
    be thrown away, by their sequence ids."""
    if batch.in_blocks:
        return batch, {}
    alone = range(2 - len(batch.tokens)) if pool else _alone(batch.sequence_ids, ubatch)
    alone = [row for row in alone if pool or batch.positions[row] >= _PADDED_CELLS]
    if not alone:
        return batch, {}
    after = [row + 1 for row in alone]
    positions = batch.positions[alone] + 1
    ids = batch.sequence_ids[alone]
    company = Batch(
        np.insert(batch.tokens, after, batch.tokens[alone]),
        np.insert(batch.positions, after, positions),
        np.insert(batch.sequence_ids, after, ids),
        np.insert(batch.outputs, after, np.zeros(len(alone), np.int8)),
        batch.single,
    )
    return company, dict(zip(ids.tolist(), positions.tolist(), strict=True))


def _alone(sequence_ids: Int32, ubatch: int) -> list[int]:
    """The rows that llama.cpp computes alone: as `llama_batch_allocr::split_equal`, which puts as
    many rows of each of several sequences into a part as all of them have, if their ids follow one
    another."""
    ids, counts = np.unique(sequence_ids, return_counts=True)
    left = dict(zip(ids.tolist(), counts.tolist(), strict=True))
    alone: list[int] = []
    while left:
        run: list[int] = []
        for sequence_id in left:
            if run and sequence_id != run[-1] + 1:
                break
            run.append(sequence_id)
        rows = min(min(left[sequence_id] for sequence_id in run), max(1, ubatch // len(run)))
        if len(run) == rows == 1:
            alone.append(int(np.flatnonzero(sequence_ids == run[0])[-left[run[0]]]))
        for sequence_id in run:
            left[sequence_id] -= rows
        left = {sequence_id: count for sequence_id, count in left.items() if count}
    return alone
