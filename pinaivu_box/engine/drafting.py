"""Which sequences get drafts in the next step, of what kind and how long.

A draft comes from a recorded output (`replay`), from the grammar (tokens that it forces), from
earlier text (`ngram_drafter`), which costs nothing to make, or from a draft model (`draft_model`),
which takes steps of its own.  Earlier text goes first, unless the model's tokens are accepted more
often.  Each is made only where `step_cost` expects more tokens per second from it.

That expectation may be wrong.  So what the draft model takes in vain is bounded too, by allowances:
a small share of all computing time and what its drafts have saved is added to them, and what it has
taken is subtracted.  The same allowance pays for a draft now and then where none is expected to
pay, since nothing else would show that it does by now.
"""

from __future__ import annotations

import itertools
from collections import abc
from dataclasses import dataclass, field

from pinaivu_box.engine.draft_model import DraftModel
from pinaivu_box.engine.images import FIRST_IMAGE_TOKEN
from pinaivu_box.engine.ngram_drafter import expected_accepted
from pinaivu_box.engine.sequence import Sequence
from pinaivu_box.engine.step_cost import ModelDraft, StepCostModel

MAX_DRAFT_TOKENS = 63  # a step of 64 rows is as long as one token should take
_INITIAL_RATE = 0.6  # of a draft model's tokens, before any was verified
_LEARNING_RATE = 0.1
_SHARED_LEARNING_RATE = 0.02
_LOSS_SHARE = 0.01  # of a plain step, which an allowance gets with each step
MAX_ALLOWANCE_STEPS = 8
_PLAIN_STEP_INTERVAL = 64  # steps, of which one has no drafts of the model
_TRIAL_INTERVAL = 32  # steps, after drafts that did not pay
# What loses more than so many plain steps was an accident, such as another program's work.
_MAX_LOST_STEPS = 2
_TRIAL = ModelDraft(rows=1, count=3)
_FEW = 4  # sequences
_MIN_MORE_TOKENS = 32  # that an answer goes on for, it is expected, or as long as it is already


class Allowance:
    """Time that may be lost, in plain steps."""

    def __init__(self) -> None:
        self.left: float = MAX_ALLOWANCE_STEPS / 2

    @property
    def ample(self) -> bool:
        return self.left >= MAX_ALLOWANCE_STEPS / 4

    def add(self, steps: float) -> None:
        self.left = min(MAX_ALLOWANCE_STEPS, self.left + steps)


@dataclass
class _Planned:
    """The next step: its `rows`, how many tokens are `expected` of them, and how many more find
    `room`."""

    rows: int
    expected: float
    room: int
    drafts: dict[Sequence, list[int]] = field(default_factory=dict)

    def limit(self, sequence: Sequence) -> int:
        """How many tokens a draft for the sequence may have."""
        left = min(sequence.max_length - sequence.shifted, sequence.context) - len(sequence.tokens)
        return max(0, min(self.room, left - 1, MAX_DRAFT_TOKENS))

    def add(self, sequence: Sequence, draft: list[int], expected: float) -> None:
        if draft:
            self.drafts[sequence] = draft
            self.rows += len(draft)
            self.room -= len(draft)
            self.expected += expected


@dataclass
class _ModelStep:
    """What the draft model has done for a step, which had `rows` rows without that: for whom, how
    many seconds it took, and how many the accepted tokens would have taken."""

    rows: int = 0
    drafted: abc.Set[Sequence] = frozenset()
    seconds: float = 0.0
    saved: float = 0.0
    observed: bool = False


class Drafting:
    """Drafts for the steps that `step_cost` knows, with a draft `model` if there is one.

    That model may lose what `for_drafts` allows by its drafts, and what `for_reading` allows by
    reading what came before them.
    """

    def __init__(self, step_cost: StepCostModel, model: DraftModel | None = None) -> None:
        self._step_cost = step_cost
        self._model = model
        self._rate = _INITIAL_RATE  # over all sequences
        self.for_drafts, self.for_reading = Allowance(), Allowance()
        self._reading: set[Sequence] = set()
        self._last = _ModelStep()
        self._steps = 0
        self._steps_without_plan = 0
        self._next_trial = 0  # the number of that step

    # -- in each step ----------------------------------------------------------------------------

    def wants_draft(self, running: abc.Sequence[Sequence]) -> bool:
        """Whether it pays to check a draft in the next step, if all that runs decodes.  Called
        after a step without a plan."""
        self._steps += 1
        self._steps_without_plan += 1
        if self._model_wants(running):
            return True
        drafting = [(s.drafter, s.tokens) for s in running if s.drafter is not None]
        # Of few it is found sooner that none repeats anything than whether a draft could pay.
        if len(drafting) > _FEW and not self._pays(len(running), 1.0):
            return False  # however good the draft were
        for drafter, tokens in drafting:
            rate = drafter.match(tokens)
            if rate and self._pays(len(running), rate):
                return True
        return False

    def drafts(self, sequences: abc.Sequence[Sequence], room: int) -> dict[Sequence, list[int]]:
        """Tokens to check after the next ones of these sequences, which all decode, for those that
        get a draft; `room` is for how many in all."""
        self._settle()
        self._steps += 1
        self._steps_without_plan = 0
        planned = _Planned(len(sequences), float(len(sequences)), room)
        rates = self._draft_from_text(planned, sequences)
        # What drafts save can only be told where it is known how long a step takes without them.
        plain = not self._steps % _PLAIN_STEP_INTERVAL or not self._step_cost.knows(len(sequences))
        if self._model is not None and not plain:
            self._draft_by_model(planned, self._model, sequences)
        for sequence, rate in rates.items():
            if sequence not in planned.drafts:
                self._draft_ngram(planned, sequence, rate)
        return planned.drafts

    def observe(self, seconds: float) -> None:
        """Note that the step was computed in so many seconds."""
        if self._model is None:
            return
        for allowance in (self.for_drafts, self.for_reading):
            allowance.add(_LOSS_SHARE)
        last = self._last
        if last.drafted and not last.observed:
            last.observed = True
            last.seconds += max(0.0, seconds - self._step_cost.seconds(last.rows))

    def learn(self, sequence: Sequence, drafted: int, accepted: int) -> None:
        """Note that so many of the drafted tokens were right."""
        last = self._last
        if sequence not in last.drafted:
            return
        rate = self._rate_of(sequence)
        for number in range(min(drafted, accepted + 1)):
            rate += _LEARNING_RATE * ((number < accepted) - rate)
            self._rate += _SHARED_LEARNING_RATE * ((number < accepted) - self._rate)
        sequence.draft_rate = rate
        last.saved += accepted * self._step_cost.seconds(last.rows) / last.rows

    def _settle(self) -> None:
        """The accounts of the last step with drafts of the model."""
        last, self._last = self._last, _ModelStep()
        if not last.drafted or not self._step_cost.seconds(last.rows):
            return
        plain = self._step_cost.seconds(last.rows)
        balance = max((last.saved - last.seconds) / plain, -_MAX_LOST_STEPS)
        for allowance in (self.for_drafts, self.for_reading):
            allowance.add(balance)
        if balance < 0:
            self._next_trial = self._steps + _TRIAL_INTERVAL

    # -- from text -------------------------------------------------------------------------------

    def _draft_from_text(
        self, planned: _Planned, sequences: abc.Sequence[Sequence]
    ) -> dict[Sequence, float]:
        """Plan what grammars force, and n-gram drafts where they are better than the model's.
        Returns the rates of the n-gram drafts that were left out for those."""
        left_out: dict[Sequence, float] = {}
        for sequence in sequences:
            limit = planned.limit(sequence)
            if sequence.replay is not None:
                known = sequence.replay.draft(limit, grammar=sequence.grammar is not None)
                planned.add(sequence, known, len(known))
                continue
            if sequence.grammar is not None and limit:
                forced = sequence.grammar.forced()[:limit]
                planned.add(sequence, forced, len(forced))
            if sequence.drafter is None or not limit or sequence in planned.drafts:
                continue
            rate = sequence.drafter.match(sequence.tokens)
            if self._model is not None and rate < self._rate_of(sequence):
                left_out[sequence] = rate
            else:
                self._draft_ngram(planned, sequence, rate)
        return left_out

    def _draft_ngram(self, planned: _Planned, sequence: Sequence, rate: float) -> None:
        limit = planned.limit(sequence)
        count = self._step_cost.draft_length(planned.rows, planned.expected, rate, limit)
        if count and sequence.drafter is not None:
            draft = _text_only(sequence.drafter.draft(sequence.tokens, count))
            planned.add(sequence, draft, expected_accepted(rate, len(draft)))

    def _pays(self, rows: int, rate: float) -> bool:
        """Whether it pays to check a draft of that acceptance rate beside all that runs."""
        return self._step_cost.draft_length(rows, float(rows), rate, MAX_DRAFT_TOKENS) > 0

    # -- by the model ----------------------------------------------------------------------------

    def _rate_of(self, sequence: Sequence) -> float:
        return self._rate if sequence.draft_rate is None else sequence.draft_rate

    def _model_wants(self, running: abc.Sequence[Sequence]) -> bool:
        """The question takes time, so it is asked less and less often between two plans."""
        asked = self._steps_without_plan
        if self._model is None or asked & (asked - 1):
            return False
        room = len(running) * MAX_DRAFT_TOKENS
        planned = _Planned(len(running), float(len(running)), room)
        return self._model_draft(planned, self._model, self._candidates(planned, running)).rows > 0

    def _candidates(self, planned: _Planned, sequences: abc.Iterable[Sequence]) -> list[Sequence]:
        """Those that the model may draft for, the best first."""
        some = [
            sequence
            for sequence in sequences
            if sequence not in planned.drafts
            and not sequence.images  # which it would not see
            and sequence.replay is None
            and len(sequence.tokens) >= sequence.draft_from
            and planned.limit(sequence)
        ]
        return sorted(some, key=self._rate_of, reverse=True)

    def _model_draft(
        self, planned: _Planned, model: DraftModel, candidates: list[Sequence]
    ) -> ModelDraft:
        """For how many of the candidates the model should draft, and how much."""
        if not candidates or self.for_drafts.left <= 0:
            return ModelDraft()
        rates = [self._rate_of(sequence) for sequence in candidates]
        limits = [planned.limit(sequence) for sequence in candidates]
        draft = self._step_cost.model_draft(
            planned.rows, planned.expected, rates, limits, model.cost
        )
        if not draft.rows and self.for_drafts.ample and self._steps >= self._next_trial:
            return _TRIAL
        return draft

    def _draft_by_model(
        self, planned: _Planned, model: DraftModel, sequences: abc.Sequence[Sequence]
    ) -> None:
        candidates = self._candidates(planned, sequences)
        draft = self._model_draft(planned, model, candidates)
        chosen = [s for s in candidates[: draft.rows] if self._is_readable(model, s)]
        self._read(planned, model, chosen, draft)
        counts: dict[Sequence, int] = {}
        room = planned.room
        for sequence in chosen:
            count = min(draft.count, room, planned.limit(sequence), model.limit(sequence))
            if count and not model.unread(sequence):
                counts[sequence] = count
                room -= count
        if not counts:
            return
        rows, before = planned.rows, model.seconds
        drafts = model.draft(counts)
        for sequence, tokens in drafts.items():
            expected = expected_accepted(self._rate_of(sequence), len(tokens))
            planned.add(sequence, tokens, expected)
        self._last = _ModelStep(rows, counts.keys(), model.seconds - before)

    def _is_readable(self, model: DraftModel, sequence: Sequence) -> bool:
        if model.limit(sequence):
            return True
        sequence.draft_from = sequence.max_length + 1
        return False

    def _read(
        self, planned: _Planned, model: DraftModel, chosen: list[Sequence], draft: ModelDraft
    ) -> None:
        """Have the model read what it does not know of these sequences, as much as does not hold up
        the step for long, and only what the drafts are expected to be worth."""
        budget = model.cost.prompt_budget(1, model.batch_tokens)
        self._reading.intersection_update(chosen)
        before = model.seconds
        for sequence in chosen:
            unread = model.unread(sequence)
            if unread and not self._reads(model, sequence, unread, draft):
                made = len(sequence.tokens) - sequence.prompt_length
                sequence.draft_from = len(sequence.tokens) + max(made, _MIN_MORE_TOKENS)
            elif unread and budget:
                count = min(unread, budget)
                budget -= count
                model.read(sequence, count)
        plain = self._step_cost.seconds(planned.rows)
        if plain:
            self.for_reading.add((before - model.seconds) / plain)

    def _reads(self, model: DraftModel, sequence: Sequence, unread: int, draft: ModelDraft) -> bool:
        """Whether the model goes on reading the sequence, or begins to."""
        if sequence not in self._reading and not self._worth_reading(
            model, sequence, unread, draft
        ):
            return False
        self._reading.add(sequence)
        return True

    def _worth_reading(
        self, model: DraftModel, sequence: Sequence, unread: int, draft: ModelDraft
    ) -> bool:
        if draft is _TRIAL:
            return self.for_reading.ample
        length = len(sequence.tokens)
        more = max(_MIN_MORE_TOKENS, length - sequence.prompt_length)
        more = min(more, sequence.max_length - sequence.shifted - length)
        worth = unread * model.cost.prompt_token_seconds <= more * draft.saved_seconds
        return worth and self.for_reading.left > 0


def _text_only(draft: list[int]) -> list[int]:
    """Its tokens up to the first that stands for an image, which no output has."""
    return list(itertools.takewhile(lambda token: token < FIRST_IMAGE_TOKEN, draft))
