"""Computing an answer again: its tokens are known, and each draw is compared with the recorded one.

A sequence with a `Replay` runs as any other, through the same plan, steps and sampler; only that it
goes on with the recorded tokens, whatever is drawn.  Those are drafted, as many as a step takes,
and all of them are kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pinaivu_box.engine.messages import ReplayedToken
from pinaivu_box.engine.runner import Float32
from pinaivu_box.engine.sampling import Draw, is_possible, noise, redraw

if TYPE_CHECKING:
    from pinaivu_box.engine.grammar import Grammar

# Each draft costs a look-up in the grammar, and perhaps a mask, within one step.
_MAX_DRAFT_WITH_GRAMMAR = 8


@dataclass
class Replay:
    """The recorded tokens of a sequence's output, of which the first `done` were computed."""

    recorded: list[int]
    done: int = 0
    forbidden: bool = False  # by the grammar: what comes after such a token cannot be compared

    def draft(self, limit: int, *, grammar: bool) -> list[int]:
        """Of the tokens that come next as many as a draft may have; the one after them is drawn in
        the same step."""
        most = min(limit, _MAX_DRAFT_WITH_GRAMMAR) if grammar else limit
        return self.recorded[self.done : self.done + most + 1][:-1]


class ReplayedStep:
    """The rows of a sequence in one step: logits after penalties and biases, the `raw` ones as the
    model gave them, and what was `drawn` from each."""

    def __init__(self, rows: Float32, raw: Float32, draws: list[Draw], drawn: list[int]) -> None:
        self._rows, self._raw, self._draws, self._drawn = rows, raw, draws, drawn

    def compare(
        self, replay: Replay, grammar: Grammar | None, end_tokens: frozenset[int]
    ) -> list[ReplayedToken]:
        """The recorded tokens of these rows beside the draws, up to where the answer ends: with an
        end token, with the grammar, or with a token that the grammar forbids."""
        compared: list[ReplayedToken] = []
        for number, recorded in enumerate(replay.recorded[replay.done :][: len(self._drawn)]):
            if grammar is not None:
                self._restrict(number, grammar)
                replay.forbidden = not grammar.allows(recorded)
            compared.append(self._compared(number, recorded, forbidden=replay.forbidden))
            if replay.forbidden or recorded in end_tokens:
                break
            if grammar is not None:
                grammar.take(recorded)
                if grammar.done or grammar.broken:
                    break
        replay.done += len(compared)
        return compared

    def _restrict(self, number: int, grammar: Grammar) -> None:
        """Draw again what the grammar forbids, as `Engine._follow` does."""
        if not grammar.allows(self._drawn[number]):
            grammar.mask(self._rows[number])
            draw = self._draws[number]
            self._drawn[number] = redraw(self._rows[number], draw.sampling, draw.position)

    def _compared(self, number: int, recorded: int, *, forbidden: bool) -> ReplayedToken:
        row, raw, draw = self._rows[number], self._raw[number], self._draws[number]
        drawn = self._drawn[number]
        logits = float(raw[recorded]), float(raw[drawn])
        if drawn == recorded:
            return ReplayedToken(recorded, drawn, *logits)
        possible = not forbidden and is_possible(row, draw.sampling, recorded)
        margin = _score(row, draw, drawn) - _score(row, draw, recorded)
        return ReplayedToken(recorded, drawn, *logits, margin, possible)


def _score(row: Float32, draw: Draw, token: int) -> float:
    """What the sampler takes the largest of: the logit over the temperature, with the noise of the
    token at that position (Gumbel-max)."""
    temperature = draw.sampling.temperature
    logit = float(row[token])
    return logit / temperature + noise(draw, token) if temperature else logit
