"""Prompt-lookup drafting: what followed the last time these tokens came (Saxena, 2023).

Text that is edited, quoted or summarised repeats what is in the prompt.  A draft is checked in the
same step as the next token; since the draw at a position depends on logits, seed and position
alone, a drafted token is right exactly when it equals the draw, and the output never changes.
"""

from __future__ import annotations

from collections.abc import Sequence

NGRAM = 3
# The more tokens agree, the likelier is the next one: for matches from so many tokens on, the
# chance is learned apart, beginning with this.
_PRIORS = {NGRAM: 0.4, 5: 0.7, 9: 0.9}
_FORGET = 0.2  # how fast a chance follows what happens
_FORGET_ALL = 0.02  # the same of what all sequences have in common


class DraftStatistics:
    """What an engine's sequences learned of drafts: the next one begins with that."""

    def __init__(self) -> None:
        self.chances = dict(_PRIORS)  # by the least length of the match

    def learn(self, kind: int, right: bool) -> None:
        self.chances[kind] += _FORGET_ALL * (right - self.chances[kind])


def expected_right(chance: float, count: int) -> float:
    """How many of `count` drafted tokens will be right, before the first that is not."""
    return count if chance == 1 else chance * (1 - chance**count) / (1 - chance)


class NgramDrafter:
    """Of one sequence: `match`, then perhaps `draft`.

    Whether a draft is checked or not: the next `match` sees what came, and learns from that.
    `prediction`: tokens that may come, as if the text began with them.
    """

    def __init__(
        self, experience: DraftStatistics | None = None, prediction: Sequence[int] = ()
    ) -> None:
        self._prediction = prediction
        self._experience = experience or DraftStatistics()
        # Who gives a prediction knows better than experience.
        self._chances = dict(_PRIORS if prediction else self._experience.chances)
        self._ends: dict[tuple[int, ...], int] = {}  # n-gram → where the text after it begins
        self._seen = NGRAM - 1
        self._kind = NGRAM
        self._start = 0  # what should come from `_last` on, if anything was matched
        self._last = 0

    def match(self, tokens: Sequence[int]) -> float:
        """The chance that a drafted token would be right; 0 if nothing like the end of `tokens`
        came before."""
        tokens = self._with_prediction(tokens)
        self._learn(tokens)
        last = len(tokens)
        for end in range(self._seen + 1, last):
            self._ends[tuple(tokens[end - NGRAM : end])] = end
        self._seen = max(self._seen, last - 1)
        start = self._ends.get(tuple(tokens[last - NGRAM :]))
        if start is None:
            self._last = 0
            return 0.0
        length, most = NGRAM, min(max(_PRIORS), start)
        while length < most and tokens[start - length - 1] == tokens[last - length - 1]:
            length += 1
        self._start, self._last = start, last
        self._kind = max(kind for kind in _PRIORS if kind <= length)
        return self._chances[self._kind]

    def draft(self, tokens: Sequence[int], count: int) -> list[int]:
        """`count` tokens that may come after `tokens`, which have just been matched."""
        tokens = self._with_prediction(tokens)
        made = list(tokens[self._start : self._start + count])
        # Beyond the end of the text, what was drafted is the text: so a loop goes on and on.
        period = len(tokens) - self._start
        while len(made) < count:
            made.append(made[-period])
        return made

    def _with_prediction(self, tokens: Sequence[int]) -> Sequence[int]:
        return [*self._prediction, *tokens] if self._prediction else tokens

    def _learn(self, tokens: Sequence[int]) -> None:
        if not self._last:
            return
        chance = self._chances[self._kind]
        for at in range(self._last, len(tokens)):
            right = tokens[at] == tokens[self._start + at - self._last]
            chance += _FORGET * (right - chance)
            if not self._prediction:
                self._experience.learn(self._kind, right)
            if not right:
                break  # what comes after it says nothing
        self._chances[self._kind], self._last = chance, len(tokens)
