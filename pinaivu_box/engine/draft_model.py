"""Drafts by a second, smaller model with the same vocabulary, over all sequences that draft.

The draft model draws as the model does: with the request's parameters and with the same noise,
which depends on seed, position and token id alone.  So where both find the same tokens likely they
draw the same one, also at a high temperature.

Its KV cache follows the model's: what the scheduler does to cells it does here as well, to those
that are there.  So a sequence that starts with another one's prefix starts with what is known of
that here, and one that is preempted, shifted or ended leaves nothing behind.  What is missing is
computed before the sequence is drafted for.
"""

from __future__ import annotations

import time
from collections import abc
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from pinaivu_box.engine.prefix_cache import common_prefix
from pinaivu_box.engine.runner import Batch, Float32, KVCells, NoSlot, Runner
from pinaivu_box.engine.sampling import draw_rows, redraw
from pinaivu_box.engine.sequence import Sequence
from pinaivu_box.engine.step_cost import StepCostModel
from pinaivu_box.engine.top_k import Ids

# Tokens of a sequence that are computed with its draft; if more are missing, they are read before.
_MAX_UNREAD_TOKENS = 32


@dataclass
class _Cells:
    """What is in the cells of a sequence id: its first `length` tokens, then `guess`, of which it
    is not known yet whether they came."""

    length: int = 0
    guess: list[int] = field(default_factory=list)


@dataclass
class _Draft:
    """A draft while it is made, of `count` tokens at most.  `tried` counts those that the
    sequence's grammar was given for it."""

    sequence: Sequence
    count: int
    tokens: list[int] = field(default_factory=list)
    tried: int = 0


class _TokenRun(NamedTuple):
    """Tokens at positions from `start` on."""

    sequence_id: int
    start: int
    tokens: list[int]


class DraftModel:
    """The `runner` of the smaller model, which computes at most `batch_tokens` at a time.

    Its `KVCells` are those of both models: what it is told it passes on to `cells`, the model's.
    Of its tokens the first `n_vocab` are the model's as well.
    """

    def __init__(
        self, runner: Runner, cells: KVCells, *, batch_tokens: int, n_vocab: int, end_tokens: Ids
    ) -> None:
        self.cost = StepCostModel()  # of its own steps
        self.seconds = 0.0  # that it has computed so far
        self._runner = runner
        self._model_cells = cells
        self.batch_tokens = batch_tokens
        self._n_vocab = n_vocab
        self._known_tokens = min(n_vocab, runner.facts.n_vocab)
        self._end_tokens = end_tokens
        self._cells: dict[int, _Cells] = {}

    # -- drafts ----------------------------------------------------------------------------------

    def unread(self, sequence: Sequence) -> int:
        """How many tokens of a running sequence it has to read before it can draft for it."""
        return max(0, len(sequence.tokens) - self._follow(sequence).length - _MAX_UNREAD_TOKENS)

    def limit(self, sequence: Sequence) -> int:
        """How many tokens it can draft for the sequence at most; 0 if it cannot read it."""
        known = self._follow(sequence).length
        if max(sequence.tokens[known:], default=0) >= self._known_tokens:
            return 0
        return max(0, self._runner.facts.context - len(sequence.tokens))

    def read(self, sequence: Sequence, count: int) -> None:
        """Compute the next `count` tokens that it does not know of the sequence."""
        began = time.perf_counter()
        known = self._follow(sequence)
        end = known.length + count
        run = _TokenRun(sequence.sequence_id, known.length, sequence.tokens[known.length : end])
        if self._decode([run]) is not None:
            self._cells[sequence.sequence_id] = _Cells(end)
            self.cost.observe(0, count, time.perf_counter() - began)
        self.seconds += time.perf_counter() - began

    def draft(self, counts: Mapping[Sequence, int]) -> dict[Sequence, list[int]]:
        """For each sequence at most so many tokens that may come next; it has read them all."""
        began = time.perf_counter()
        drafts = [_Draft(sequence, count) for sequence, count in counts.items()]
        drafts.sort(key=lambda draft: draft.sequence.sequence_id)
        going, steps = drafts, 0
        while going and self._step(going):
            steps += 1
            going = [draft for draft in going if len(draft.tokens) == steps < draft.count]
        for draft in drafts:
            if draft.tried and draft.sequence.grammar is not None:
                draft.sequence.grammar.take_back(draft.tried)
        seconds = time.perf_counter() - began
        self.seconds += seconds
        if steps:
            self.cost.observe(len(drafts), 0, seconds / steps)
        return {draft.sequence: draft.tokens for draft in drafts if draft.tokens}

    def _step(self, drafts: list[_Draft]) -> bool:
        """Draw the next token of each; False if there is no room for that."""
        runs = [self._next_run(draft) for draft in drafts]
        logits = self._decode(runs, rows=True)
        if logits is None:
            return False
        for draft, run in zip(drafts, runs, strict=True):
            self._note(draft, run)
        logits = self._in_the_models_vocabulary(logits)
        draws = [draft.sequence.draw(draft.tokens) for draft in drafts]
        drawn = draw_rows(logits, draws, self._end_tokens)
        for draft, row, token in zip(drafts, logits, drawn, strict=True):
            self._add(draft, row, token)
        return True

    def _in_the_models_vocabulary(self, logits: Float32) -> Float32:
        missing = self._n_vocab - logits.shape[1]
        if missing <= 0:
            return logits[:, : self._n_vocab]
        return np.pad(logits, ((0, 0), (0, missing)), constant_values=-np.inf)

    def _next_run(self, draft: _Draft) -> _TokenRun:
        """The tokens of its sequence and of the draft that are in no cell yet."""
        sequence = draft.sequence
        if draft.tokens:
            position = len(sequence.tokens) + len(draft.tokens) - 1
            return _TokenRun(sequence.sequence_id, position, draft.tokens[-1:])
        # The last token's logits are wanted, so it is computed again if it was already.
        start = min(self._follow(sequence).length, len(sequence.tokens) - 1)
        self._cut(sequence.sequence_id, start)
        return _TokenRun(sequence.sequence_id, start, sequence.tokens[start:])

    def _note(self, draft: _Draft, run: _TokenRun) -> None:
        """Note that these tokens are in their cells now."""
        if draft.tokens:
            self._cells[run.sequence_id].guess += run.tokens
        else:
            self._cells[run.sequence_id] = _Cells(run.start + len(run.tokens))

    def _add(self, draft: _Draft, row: Float32, token: int) -> None:
        """Add a token that was drawn from this row to the draft, or what its grammar has instead.
        A token that ends the sequence is none that could be accepted."""
        grammar = draft.sequence.grammar
        if grammar is not None:
            if grammar.done or not grammar.has_time:
                return
            if not grammar.allows(token):
                grammar.mask(row)
                position = draft.sequence.length + len(draft.tokens)
                token = redraw(row, draft.sequence.sampling, position)
                if not grammar.allows(token):
                    return  # what it allows is not in this vocabulary
        if token in self._end_tokens or token >= self._known_tokens:
            return
        if grammar is not None:
            grammar.try_out(token)
            draft.tried += 1
        draft.tokens.append(token)

    def _decode(self, runs: abc.Sequence[_TokenRun], *, rows: bool = False) -> Float32 | None:
        """Compute these tokens; with `rows` returns the logits after the last one of each run.
        None if there is no room, also after all that is not needed now was forgotten."""
        batch = _batch_of(runs, rows=rows)
        try:
            return self._compute(batch)
        except NoSlot:
            needed = {run.sequence_id for run in runs}
            for sequence_id in self._cells.keys() - needed:
                self._forget(sequence_id)
        for run in runs:  # a part of it may have been computed
            if run.start:
                self._runner.truncate(run.sequence_id, run.start)
            else:
                self._runner.remove(run.sequence_id)
        try:
            return self._compute(batch)
        except NoSlot:
            for sequence_id in {*self._cells, *needed}:
                self._runner.remove(sequence_id)
            self._cells.clear()
        return None

    def _compute(self, batch: Batch) -> Float32:
        """Raises NoSlot, also after a part of it was computed."""
        size = len(batch.tokens)
        if size <= self.batch_tokens:
            return self._runner.decode(batch)
        starts = range(0, size, self.batch_tokens)
        parts = [batch.part(start, start + self.batch_tokens) for start in starts]
        return np.concatenate([self._runner.decode(part).copy() for part in parts])

    # -- cells -----------------------------------------------------------------------------------

    def remove(self, sequence_id: int) -> None:
        self._model_cells.remove(sequence_id)
        self._forget(sequence_id)

    def truncate(self, sequence_id: int, length: int) -> None:
        self._model_cells.truncate(sequence_id, length)
        self._cut(sequence_id, length)

    def copy(self, source: int, target: int, length: int) -> None:
        self._model_cells.copy(source, target, length)
        known = self._cells.get(source)
        if known is not None and (shared := min(length, known.length)):
            self._runner.copy(source, target, shared)
            self._cells[target] = _Cells(shared)

    def _forget(self, sequence_id: int) -> None:
        if self._cells.pop(sequence_id, None) is not None:
            self._runner.remove(sequence_id)

    def _cut(self, sequence_id: int, length: int) -> None:
        known = self._cells.get(sequence_id)
        if known is None or length >= known.length + len(known.guess):
            return
        if length == 0:
            self._forget(sequence_id)
            return
        self._runner.truncate(sequence_id, length)
        known.guess = known.guess[: max(0, length - known.length)]
        known.length = min(known.length, length)

    def _follow(self, sequence: Sequence) -> _Cells:
        """Its cells, without what was guessed wrong."""
        known = self._cells.get(sequence.sequence_id)
        if known is None:
            return _Cells()
        if known.guess:
            right = common_prefix(known.guess, sequence.tokens, known.length)
            self._cut(sequence.sequence_id, known.length + right)
            known.length, known.guess = known.length + right, []
        return known


def _batch_of(runs: abc.Sequence[_TokenRun], *, rows: bool) -> Batch:
    tokens: list[int] = []
    positions: list[int] = []
    ids: list[int] = []
    outputs: list[int] = []
    for run in runs:
        size = len(run.tokens)
        tokens += run.tokens
        positions += range(run.start, run.start + size)
        ids += [run.sequence_id] * size
        outputs += [0] * (size - 1) + [int(rows)]
    return Batch.of(tokens, positions, ids, outputs)
