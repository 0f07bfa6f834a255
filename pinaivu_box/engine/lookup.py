"""Prompt-lookup drafting: what followed the last time these tokens came (Saxena, 2023).

Text that is edited, quoted or summarised repeats what is in the prompt.  A draft is checked in the
same step as the next token; since the draw at a position depends on logits, seed and position
alone, a drafted token is right exactly when it equals the draw, and the output never changes.
"""

from __future__ import annotations

from collections.abc import Sequence

NGRAM = 3
_PRIOR = 0.5
_FORGET = 0.2  # how fast the acceptance rate follows what happens


class Lookup:
    """Of one sequence.  `acceptance` estimates the chance that a drafted token is right."""

    def __init__(self) -> None:
        self.acceptance = _PRIOR
        self._ends: dict[tuple[int, ...], int] = {}  # n-gram → where the text after it begins
        self._seen = NGRAM - 1

    def draft(self, tokens: Sequence[int], most: int) -> list[int]:
        """At most `most` tokens that may come after `tokens`, none if nothing like it came."""
        last = len(tokens)
        for end in range(self._seen + 1, last):
            self._ends[tuple(tokens[end - NGRAM : end])] = end
        self._seen = max(self._seen, last - 1)
        start = self._ends.get(tuple(tokens[last - NGRAM :])) if most > 0 else None
        return [] if start is None else list(tokens[start : start + most])

    def judge(self, drafted: int, accepted: int) -> None:
        """Of `drafted` tokens the first `accepted` were right."""
        for right in [True] * accepted + [False] * (accepted < drafted):
            self.acceptance += _FORGET * (right - self.acceptance)
