"""Decode steps that go on as the last one did: the same sequences, each with its next token.

Most steps are like that, and on a fast device the Python of a whole plan would cost more than the
step.  Here a step is: the drawn tokens in, positions plus one, decode, draw.
"""

from __future__ import annotations

from collections import abc

import numpy as np

from pinaivu_box.engine.runner import Batch, Float32
from pinaivu_box.engine.sampling import PenaltyWindow, Sampler
from pinaivu_box.engine.sequence import Sequence
from pinaivu_box.engine.top_k import Ids

_FEW = 4  # rows


class SteadySteps:
    """`left` is how many steps may still follow without a plan.

    The sequences are kept up to date; the scheduler is behind by `steps` until it catches up.
    """

    def __init__(self, sequences: list[Sequence], left: int, end_tokens: Ids) -> None:
        self.sequences = sequences
        self.ids = [sequence.id for sequence in sequences]
        self.left = left
        self.steps = 0
        self._tokens = [sequence.tokens for sequence in sequences]
        self._rows = np.arange(len(sequences))
        self._sampler = Sampler([sequence.sampling for sequence in sequences], end_tokens)
        # Of few rows that are not adjusted, the logits are as the model gave them.
        self._few_plain = len(sequences) <= _FEW and not self._sampler.adjusts
        self._looks_back = any(sequence.sampling.looks_back for sequence in sequences)
        # Those of all steps at once: in each step it would take longer than what it is for.
        positions = np.array([sequence.length for sequence in sequences])
        self._keys = self._sampler.keys(positions + np.arange(left)[:, np.newaxis])
        self.batch = Batch.of(
            [tokens[-1] for tokens in self._tokens],
            [sequence.position(sequence.computed) for sequence in sequences],
            [sequence.sequence_id for sequence in sequences],
            [1] * len(sequences),
        )

    def draw(self, logits: Float32) -> tuple[list[int], abc.Sequence[np.float32] | Float32]:
        """Append and return each sequence's next token, drawn from the logits of `batch`; and that
        token's logit as the model gave it."""
        batch, sequences, positions = self.batch, self.sequences, self.batch.positions
        windows: list[PenaltyWindow] = []
        if self._looks_back:
            windows = [PenaltyWindow(each.tokens, each.prompt_length) for each in sequences]
        positions += 1
        drawn = self._sampler.draw_keyed(logits, self._keys[self.steps], windows)
        batch.tokens[:] = drawn
        for sequence, tokens, token in zip(sequences, self._tokens, drawn, strict=True):
            tokens.append(token)
            sequence.computed += 1
        self.steps += 1
        self.left -= 1
        if self._few_plain:
            return drawn, [row[token] for row, token in zip(logits, drawn, strict=True)]
        return drawn, self._sampler.raw(logits, self._rows, drawn)
