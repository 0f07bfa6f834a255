"""How long steps take, learned from the steps themselves, and what follows from it.

Three questions: how many prompt tokens fit into a step without stopping the streams that run beside
it, how many tokens of texts that are embedded, and whether it pays to check a draft.
"""

from __future__ import annotations

from pinaivu_box.engine.ngram_drafter import expected_right

# While streams run, prompts get at most 6/7 of the time: a stream's gap grows at most sevenfold,
# and a long prompt takes at most 7/6 of the time that it would take alone.  Smaller chunks would
# cost more than they save: measured in tests/bench/results.
PROMPT_STRETCH = 7.0
SHORTEST = 0.1  # seconds; a gap that nobody minds, however fast the model
LONGEST = 0.8  # seconds; also without streams: so long waits who comes in the middle of a step
LEAST_PROMPT = 16  # tokens; smaller chunks only waste
_LEARN = 0.25
_REMEMBER = 512  # steps
_LARGEST_ROWS = 64  # the line for numbers of rows that never came is fitted to those up to so many
# Lengths of drafts: kernels work on fours and eights of tokens, and the fewer there are the sooner
# it is known how long each takes.
_DRAFTS = (3, 7, 15, 31, 63)
_WORTH = 1.05  # times the tokens per second of a step without drafts; below is within the noise


class StepCostModel:
    """Seconds per step, as a function of rows (tokens that give logits) and prompt tokens."""

    def __init__(self) -> None:
        self._rows: dict[int, float] = {}  # rows → seconds of a step without prompt tokens
        self._prompt_token: float | None = None  # seconds
        self._text_token: float | None = None  # of a text that is embedded
        self._taken = 0.0  # by such texts, of the step that is planned
        self._fresh: set[int] = set()
        self._observed = 0

    def observe(self, rows: int, prompt_tokens: int, seconds: float) -> None:
        """A step took `seconds`; `rows` tokens of it were decoding."""
        if not prompt_tokens:
            before = self._rows.get(rows, seconds)
            self._rows[rows] = before + _LEARN * (seconds - before)
            self._note(rows)
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
        below = max((known for known in self._rows if known < rows), default=None)
        above = min((known for known in self._rows if known > rows), default=None)
        if below is not None and above is not None:
            part = (rows - below) / (above - below)
            return self._rows[below] + part * (self._rows[above] - self._rows[below])
        nearest = below or above or 0
        return max(0.0, self._rows[nearest] + (rows - nearest) * self._slope())

    def prompt_budget(self, rows: int, most: int) -> int:
        """Prompt tokens for a step beside `rows` decoding ones; at most `most`."""
        if self._prompt_token is None:
            return most if not rows else min(most, 8 * LEAST_PROMPT)
        fits = int((self._beside(rows) - self._taken) / self._prompt_token)
        return max(min(LEAST_PROMPT, most), min(fits, most))

    def text_budget(self, rows: int, most: int, *, prompts: bool) -> int:
        """The same for texts that are embedded; if there are `prompts` too, half of the time."""
        self._taken = 0.0
        if self._text_token is None:
            return min(most, 8 * LEAST_PROMPT)
        seconds = self._beside(rows) / (2 if prompts else 1)
        return max(min(LEAST_PROMPT, most), min(int(seconds / self._text_token), most))

    def observe_texts(self, tokens: int, seconds: float) -> None:
        """So many tokens of texts took `seconds` of the step."""
        self._taken = seconds
        if tokens:
            each = seconds / tokens
            before = each if self._text_token is None else self._text_token
            self._text_token = before + _LEARN * (each - before)

    def _beside(self, rows: int) -> float:
        """Seconds that a step may take longer than its `rows` decoding ones."""
        decoding = self.seconds(rows)
        target = LONGEST
        if rows:
            target = min(LONGEST, max(SHORTEST, PROMPT_STRETCH * decoding))
        return target - decoding

    def draft_length(self, rows: int, expected: float, chance: float, most: int) -> int:
        """How many tokens to draft for one of `rows` rows, which are `expected` tokens' worth: as
        many as give the most tokens per second.

        `chance` is that of each drafted token to be right if those before it are.
        """
        step = self.seconds(rows)
        if not step or not chance:
            return 0
        best, rate = 0, _WORTH * expected / step
        for count in _DRAFTS:
            if count > most:
                break
            tokens = expected + expected_right(chance, count)
            seconds = self._at_best(rows + count)
            if tokens > rate * seconds:
                best, rate = count, tokens / seconds
        return best

    def _at_best(self, rows: int) -> float:
        """As `seconds`; what was never tried is as good as a prompt's tokens, so that it is."""
        largest = max(self._rows)
        if rows <= largest or self._prompt_token is None:
            return self.seconds(rows)
        return self._rows[largest] + (rows - largest) * min(self._slope(), self._prompt_token)

    def _note(self, rows: int) -> None:
        """Forget what was not seen for long: it may have been an accident."""
        self._fresh.add(rows)
        self._observed += 1
        if self._observed % _REMEMBER == 0:
            self._rows = {n: s for n, s in self._rows.items() if n in self._fresh}
            self._fresh.clear()

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
