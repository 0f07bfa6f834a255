"""How likely it is that an honest node gives an answer that differs so much.

An honest answer on another kind of processor differs where two tokens are nearly equal: rarely, and
by little.  So two counts are compared with what honest runs have at most: the tokens that differ,
and those that differ by more than `LARGE` after the noise.  Each count of n tokens is binomial with
the honest rate; the smaller of the two tail probabilities, doubled, is the p-value, and an answer
whose p-value is below `FALSE_ALARM_RATE` is not an honest one's.  That holds for tokens whose
differences are independent, which they are: each position is computed from the recorded tokens
before it, not from those drawn now.

The rates are upper bounds of those in `tests/bench/results/2026-12-01-audit.md`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pinaivu_box.engine.messages import ReplayedToken

FALSE_ALARM_RATE = 0.001
LARGE = 0.5  # a margin, in units of logit / temperature
HONEST_RATE = 0.065  # of tokens that differ at all
HONEST_LARGE_RATE = 0.013  # of those that differ by more than `LARGE`


@dataclass(frozen=True)
class Divergence:
    """Of `tokens` compared, so many `differ`, and so many by more than `LARGE`, or in a way that
    nothing explains."""

    tokens: int
    differ: int
    large: int

    @classmethod
    def of(cls, tokens: Sequence[ReplayedToken]) -> Divergence:
        differing = [token for token in tokens if token.drawn != token.recorded]
        return cls(len(tokens), len(differing), sum(token.margin > LARGE for token in differing))

    @property
    def p_value(self) -> float:
        """How likely that much, or more, is of an honest node."""
        tails = (
            binomial_tail(self.tokens, self.differ, HONEST_RATE),
            binomial_tail(self.tokens, self.large, HONEST_LARGE_RATE),
        )
        return min(1.0, len(tails) * min(tails))

    @property
    def fault(self) -> str:
        """Why it is no honest answer, empty if it may be one."""
        if self.p_value >= FALSE_ALARM_RATE:
            return ""
        return (
            f"{self._counts}: of an honest node that is less likely than {FALSE_ALARM_RATE:g} "
            f"(p = {self.p_value:.2g})"
        )

    @property
    def meaning(self) -> str:
        """What is found of one that may be honest."""
        return (
            f"{self._counts}, as of an honest node with other rounding (p = {self.p_value:.2g}; "
            f"false alarms {FALSE_ALARM_RATE:g})"
        )

    @property
    def _counts(self) -> str:
        if not self.tokens:
            return "there is no token to compare"
        agreeing = self.tokens - self.differ
        return (
            f"{agreeing} of {self.tokens} draws agree ({agreeing / self.tokens:.1%}), and "
            f"{self.large} of the others are off by more than {LARGE:g}"
        )


def binomial_tail(trials: int, successes: int, rate: float) -> float:
    """The probability of at least so many successes."""
    if successes <= 0:
        return 1.0
    logs = (
        math.lgamma(trials + 1)
        - math.lgamma(k + 1)
        - math.lgamma(trials - k + 1)
        + k * math.log(rate)
        + (trials - k) * math.log1p(-rate)
        for k in range(successes, trials + 1)
    )
    return min(1.0, math.fsum(map(math.exp, logs)))
