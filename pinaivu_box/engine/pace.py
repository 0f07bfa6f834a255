"""How long steps take, learned from the steps themselves, and what follows from it.

Two questions: how many prompt tokens fit into a step without stopping the streams that run beside
it, and whether it pays to check a draft.
"""

from __future__ import annotations

# While streams run, prompts get at most 7/8 of the time: a stream's gap grows at most eightfold,
# and a long prompt takes at most 8/7 of the time that it would take alone.
PROMPT_STRETCH = 8.0
SHORTEST = 0.1  # seconds; a gap that nobody minds, however fast the model
LONGEST = 0.8  # seconds; also without streams: so long waits who comes in the middle of a step
LEAST_PROMPT = 16  # tokens; smaller chunks only waste
_LEARN = 0.25
_LARGEST_ROWS = 48  # the line for drafts is fitted to steps up to so many rows


class Pace:
    """Seconds per step, as a function of rows (tokens that give logits) and prompt tokens."""

    def __init__(self) -> None:
        self._rows: dict[int, float] = {}  # rows → seconds of a step without prompt tokens
        self._prompt_token: float | None = None  # seconds

    def observe(self, rows: int, prompt_tokens: int, seconds: float) -> None:
        """A step took `seconds`; `rows` tokens of it were decoding."""
        if not prompt_tokens:
            before = self._rows.get(rows, seconds)
            self._rows[rows] = before + _LEARN * (seconds - before)
            return
        each = max(seconds - self.seconds(rows), 0.1 * seconds) / prompt_tokens
        before = each if self._prompt_token is None else self._prompt_token
        self._prompt_token = before + _LEARN * (each - before)

    def seconds(self, rows: int) -> float:
        """Of a step with so many decoding rows, as far as known."""
        if not rows or not self._rows:
            return 0.0
        if rows in self._rows:
            return self._rows[rows]
        nearest = min(self._rows, key=lambda known: abs(known - rows))
        return max(0.0, self._rows[nearest] + (rows - nearest) * self._slope())

    def prompt_budget(self, rows: int, most: int) -> int:
        """Prompt tokens for a step beside `rows` decoding ones; at most `most`."""
        if self._prompt_token is None:
            return most if not rows else min(most, 8 * LEAST_PROMPT)
        decoding = self.seconds(rows)
        target = LONGEST
        if rows:
            target = min(LONGEST, max(SHORTEST, PROMPT_STRETCH * decoding))
        fits = int((target - decoding) / self._prompt_token)
        return max(min(LEAST_PROMPT, most), min(fits, most))

    def draft_length(self, rows: int, expected: float, acceptance: float, most: int) -> int:
        """How many tokens to draft for one of `rows` rows, which are `expected` tokens' worth.

        A drafted token pays while its chance, per second that it adds, is better than what the step
        gives anyway.
        """
        step, each = self.seconds(rows), self._slope()
        chance, count = acceptance, 0
        while count < most and chance * step > expected * each:
            step += each
            expected += chance
            chance *= acceptance
            count += 1
        return count

    def _slope(self) -> float:
        """Seconds that one more row adds: a line through what was seen (least squares)."""
        known = [(n, s) for n, s in self._rows.items() if n <= _LARGEST_ROWS]
        if len(known) > 1:
            mean_n = sum(n for n, _ in known) / len(known)
            mean_s = sum(s for _, s in known) / len(known)
            covariance = sum((n - mean_n) * (s - mean_s) for n, s in known)
            return max(0.0, covariance / sum((n - mean_n) ** 2 for n, _ in known))
        if self._prompt_token is not None:
            return self._prompt_token
        return 0.25 * min(self._rows.values(), default=0.0)
