"""Prompt-lookup decoding (Saxena, 2023): n-gram drafts from the sequence's own text.

Text that is edited, quoted or summarised repeats what is in the prompt: the draft is what followed
the last occurrence of the n-gram at the end.  It is verified in the same step as the next token;
since the draw at a position depends on logits, seed and position alone, a drafted token is accepted
exactly when it equals the draw, and the output never changes.
"""

from __future__ import annotations

from collections.abc import Sequence

NGRAM = 3
# The longer the match, the likelier the next token: the acceptance rate is learned apart for
# matches of at least so many tokens, and begins with this.
_PRIORS = {NGRAM: 0.4, 5: 0.7, 9: 0.9}
_LEARNING_RATE = 0.2
_SHARED_LEARNING_RATE = 0.02


class DraftStatistics:
    """Acceptance rates over all sequences of an engine; a new sequence begins with them."""

    def __init__(self) -> None:
        self.rates = dict(_PRIORS)  # by the least length of the match

    def learn(self, match_length: int, accepted: bool) -> None:
        rate = self.rates[match_length]
        self.rates[match_length] = rate + _SHARED_LEARNING_RATE * (accepted - rate)


def expected_accepted(rate: float, count: int) -> float:
    """The mean number of `count` drafted tokens that are accepted, before the first that is not.
    `rate` is that of a token if those before it are."""
    return count if rate == 1 else rate * (1 - rate**count) / (1 - rate)


class NgramDrafter:
    """Drafts for one sequence: `match`, then perhaps `draft`.

    Whether a draft is verified or not, the next `match` sees what came and learns from it.
    `prediction` are tokens that may come, as if the text began with them.
    """

    def __init__(
        self, statistics: DraftStatistics | None = None, prediction: Sequence[int] = ()
    ) -> None:
        self._prediction = prediction
        self._statistics = statistics or DraftStatistics()
        # Whoever gives a prediction knows better than the statistics.
        self._rates = dict(_PRIORS if prediction else self._statistics.rates)
        self._ends: dict[tuple[int, ...], int] = {}  # n-gram → where the text after it begins
        self._indexed = NGRAM - 1
        self._match_length = NGRAM  # the key of its rate
        self._start = 0  # where the text begins that should follow `_last`
        self._last = 0  # length of the text that was matched; 0: nothing was

    def match(self, tokens: Sequence[int]) -> float:
        """The expected acceptance rate of a draft after `tokens`; 0 if their end has not occurred
        before."""
        tokens = self._with_prediction(tokens)
        self._learn(tokens)
        last = len(tokens)
        for end in range(self._indexed + 1, last):
            self._ends[tuple(tokens[end - NGRAM : end])] = end
        self._indexed = max(self._indexed, last - 1)
        start = self._ends.get(tuple(tokens[last - NGRAM :]))
        if start is None:
            self._last = 0
            return 0.0
        length, max_length = NGRAM, min(max(_PRIORS), start)
        while length < max_length and tokens[start - length - 1] == tokens[last - length - 1]:
            length += 1
        self._start, self._last = start, last
        self._match_length = max(known for known in _PRIORS if known <= length)
        return self._rates[self._match_length]

    def draft(self, tokens: Sequence[int], count: int) -> list[int]:
        """`count` tokens that may come after `tokens`, which have just been matched."""
        tokens = self._with_prediction(tokens)
        drafted = list(tokens[self._start : self._start + count])
        # Beyond the end of the text, what was drafted is the text: so a loop goes on and on.
        period = len(tokens) - self._start
        while len(drafted) < count:
            drafted.append(drafted[-period])
        return drafted

    def _with_prediction(self, tokens: Sequence[int]) -> Sequence[int]:
        return [*self._prediction, *tokens] if self._prediction else tokens

    def _learn(self, tokens: Sequence[int]) -> None:
        if not self._last:
            return
        rate = self._rates[self._match_length]
        for position in range(self._last, len(tokens)):
            accepted = tokens[position] == tokens[self._start + position - self._last]
            rate += _LEARNING_RATE * (accepted - rate)
            if not self._prediction:
                self._statistics.learn(self._match_length, accepted)
            if not accepted:
                break  # what comes after it says nothing
        self._rates[self._match_length], self._last = rate, len(tokens)
