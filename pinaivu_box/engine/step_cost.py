"""The step cost model: how long steps take, learned from the steps themselves.

It answers four questions: how many prompt tokens fit into a step without stopping the streams that
decode beside it, how many tokens of texts that are embedded, whether verifying a draft pays, and
whether it pays if a draft model has to make it first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pinaivu_box.engine.ngram_drafter import expected_accepted

# While streams run, prompts get at most 6/7 of the time: a stream's gap grows at most sevenfold,
# and a long prompt takes at most 7/6 of the time that it would take alone.  Smaller chunks would
# cost more than they save: measured in tests/bench/results.
MAX_GAP_STRETCH = 7.0
MIN_STEP_SECONDS = 0.1  # so long a gap is always acceptable, however fast the model
MAX_STEP_SECONDS = 0.8  # also without streams: a new request waits for the end of a step
MIN_PROMPT_TOKENS = 16  # smaller chunks only waste
_LEARNING_RATE = 0.25
_FORGET_STEPS = 512
_MAX_FITTED_ROWS = 64  # the line for numbers of rows that never came is fitted to those up to this
# Lengths of drafts: kernels work on fours and eights of tokens, and the fewer lengths there are,
# the sooner it is known how long each takes.
_DRAFT_TOKENS = (3, 7, 15, 31, 63)
# Of drafts that a model makes: each token takes a step of that model.
_MODEL_DRAFT_TOKENS = (1, 2, 3, 5, 7, 11, 15)
_MIN_SPEEDUP = 1.05  # of tokens per second by a draft; less is within the noise


@dataclass(frozen=True)
class ModelDraft:
    """Drafts of at most `count` tokens for the first `rows` of several rows, and how many seconds
    a token then takes less than without them."""

    rows: int = 0
    count: int = 0
    saved_seconds: float = 0.0


class StepCostModel:
    """Seconds per step, as a function of rows (decoding tokens) and prompt tokens."""

    def __init__(self) -> None:
        self._rows: dict[int, float] = {}  # rows → seconds of a step without prompt tokens
        self._line = _Line()  # through them, up to _MAX_FITTED_ROWS
        self._prompt_token: float | None = None  # seconds
        self._text_token: float | None = None  # seconds, of a text that is embedded
        self._text_seconds = 0.0  # taken by such texts, of the step that is planned
        self._recent: set[int] = set()
        self._observed = 0

    def observe(self, rows: int, prompt_tokens: int, seconds: float) -> None:
        """Learn from a step of `seconds` in which `rows` tokens were decoding."""
        if not prompt_tokens:
            known = self._rows.get(rows)
            self._rows[rows] = now = _learned(known, seconds)
            if rows <= _MAX_FITTED_ROWS:
                self._line.put(rows, known, now)
            self._recent.add(rows)
            self._observed += 1
            if self._observed % _FORGET_STEPS == 0:
                self._forget_old()
            return
        each = max(seconds - self.seconds(rows), 0.1 * seconds) / prompt_tokens
        self._prompt_token = _learned(self._prompt_token, each)

    def knows(self, rows: int) -> bool:
        """Whether a step with so many decoding rows has been observed lately."""
        return rows in self._rows

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

    @property
    def prompt_token_seconds(self) -> float:
        """Of one prompt token; 0 while that is not known."""
        return self._prompt_token or 0.0

    def prompt_budget(self, rows: int, max_tokens: int) -> int:
        """Prompt tokens for a step beside `rows` decoding ones; at most `max_tokens`."""
        if self._prompt_token is None:
            return max_tokens if not rows else min(max_tokens, 8 * MIN_PROMPT_TOKENS)
        seconds = self._spare_seconds(rows) - self._text_seconds
        return _fitting(seconds, self._prompt_token, max_tokens)

    def text_budget(self, rows: int, max_tokens: int, *, prompts: bool) -> int:
        """The same for texts that are embedded; if there are `prompts` too, half of the time."""
        self._text_seconds = 0.0
        if self._text_token is None:
            return min(max_tokens, 8 * MIN_PROMPT_TOKENS)
        seconds = self._spare_seconds(rows) / (2 if prompts else 1)
        return _fitting(seconds, self._text_token, max_tokens)

    def observe_texts(self, tokens: int, seconds: float) -> None:
        """Learn that so many tokens of texts took `seconds` of the step."""
        self._text_seconds = seconds
        if tokens:
            self._text_token = _learned(self._text_token, seconds / tokens)

    def draft_length(self, rows: int, expected: float, rate: float, max_tokens: int) -> int:
        """How many tokens to draft for one of `rows` rows, which are `expected` tokens' worth: as
        many as give the most tokens per second; at most `max_tokens`.

        `rate` is the acceptance rate of a drafted token if those before it are accepted.
        """
        step = self.seconds(rows)
        if not step or not rate:
            return 0
        best, best_speed = 0, _MIN_SPEEDUP * expected / step
        for count in _DRAFT_TOKENS:
            if count > max_tokens:
                break
            tokens = expected + expected_accepted(rate, count)
            seconds = self._optimistic_seconds(rows + count)
            if tokens > best_speed * seconds:
                best, best_speed = count, tokens / seconds
        return best

    def model_draft(
        self,
        rows: int,
        expected: float,
        rates: Sequence[float],
        limits: Sequence[int],
        draft: StepCostModel,
    ) -> ModelDraft:
        """For which of `rows` rows, which are `expected` tokens' worth, a draft model should draft,
        and how much: so that there are the most tokens per second.

        It may draft for those that have `rates` (see `draft_length`), the best first, and each of
        them has a limit of tokens.  A step of the draft model costs what `draft` says.
        """
        plain = self.seconds(rows)
        if not plain or not rates:
            return ModelDraft()
        best, best_speed = ModelDraft(), _MIN_SPEEDUP * expected / plain
        for some in _halves(len(rates)):
            draft_step = draft.seconds(some)
            for count in _MODEL_DRAFT_TOKENS:
                counts = [min(count, limit) for limit in limits[:some]]
                if max(counts) < count:
                    break
                tokens = expected + sum(map(expected_accepted, rates, counts))
                seconds = count * draft_step + self._optimistic_seconds(rows + sum(counts))
                if tokens > best_speed * seconds:
                    best = ModelDraft(some, count, plain / expected - seconds / tokens)
                    best_speed = tokens / seconds
        return best

    def _spare_seconds(self, rows: int) -> float:
        """How much longer a step may take than its `rows` decoding ones."""
        decoding = self.seconds(rows)
        target = MAX_STEP_SECONDS
        if rows:
            target = min(MAX_STEP_SECONDS, max(MIN_STEP_SECONDS, MAX_GAP_STRETCH * decoding))
        return target - decoding

    def _optimistic_seconds(self, rows: int) -> float:
        """As `seconds`; what was never tried is as good as a prompt's tokens, so that it is."""
        largest = max(self._rows)
        if rows <= largest or self._prompt_token is None:
            return self.seconds(rows)
        return self._rows[largest] + (rows - largest) * min(self._slope(), self._prompt_token)

    def _forget_old(self) -> None:
        """Forget numbers of rows that have not come for long: they may have been outliers."""
        self._rows = {n: s for n, s in self._rows.items() if n in self._recent}
        self._recent.clear()
        self._line = _Line()
        for n, s in self._rows.items():
            if n <= _MAX_FITTED_ROWS:
                self._line.put(n, None, s)

    def _slope(self) -> float:
        """Seconds that one more row adds, as far as was observed."""
        if self._line.count > 1:
            return max(0.0, self._line.slope)
        if self._prompt_token is not None:
            return self._prompt_token
        return 0.25 * min(self._rows.values(), default=0.0)


class _Line:
    """A line through points (n, s), by least squares; from sums, since it is asked for in every
    step and each moves one point."""

    def __init__(self) -> None:
        self.count = 0
        self._n = self._s = self._nn = self._ns = 0.0

    def put(self, n: int, before: float | None, s: float) -> None:
        """Put the point at n, where it was at `before`, if it was there, to s."""
        if before is None:
            self.count += 1
            self._n += n
            self._nn += n * n
        more = s - (before or 0.0)
        self._s += more
        self._ns += n * more

    @property
    def slope(self) -> float:
        """Of two points at least."""
        covariance = self._ns - self._n * self._s / self.count
        return covariance / (self._nn - self._n * self._n / self.count)


def _halves(count: int) -> list[int]:
    """All, half, a quarter and so on, down to 1."""
    return [count] if count == 1 else [count, *_halves(count // 2)]


def _fitting(seconds: float, token_seconds: float, max_tokens: int) -> int:
    """Tokens that fit into so many seconds, but not so few that they only waste."""
    return min(max_tokens, max(MIN_PROMPT_TOKENS, int(seconds / token_seconds)))


def _learned(known: float | None, observed: float) -> float:
    """The exponential moving average."""
    return observed if known is None else known + _LEARNING_RATE * (observed - known)
