"""What a request has used so far: one record of each leg, of each choice, and of it all.

A leg has one record, whoever wants to know how it went: the receipt, the measured load, a peer's
reputation.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import Any

from pinaivu_box.amount import Prices
from pinaivu_box.engine.messages import Output, Prompt
from pinaivu_box.gateway.backend import Counted, Job, Proved, Started
from pinaivu_box.gateway.logprob_records import records
from pinaivu_box.receipts.commitment import Extras

ENGINE_LOST = "engine_lost"  # finish reason of a leg whose engine died


@dataclass(eq=False)
class LegRecord:
    """What one node did of a job.  `route` is why it was this one, for the receipt, and `header`
    for the client.  `began` is monotonic, `started_at` Unix seconds.

    Of an upstream's leg tokens are not known: `prompt` and `tokens` are empty, and their numbers
    are `counted`.  `extras` are those of this leg.  `choice_extras` go on from those of the
    choice's earlier legs; of a first leg both are the same.
    """

    job: Job
    started: Started
    earlier: Extras | None = None
    route: dict[str, Any] | None = None
    header: str = ""
    began: float = field(default_factory=time.monotonic)
    started_at: float = field(default_factory=time.time)
    prompt: list[int] | None = None
    tokens: list[int] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    finish_reason: str = ENGINE_LOST
    ttft_ms: int | None = None
    cached_tokens: int = 0
    shifted_tokens: int = 0
    logprobs: int = 0
    begun: bool = False  # the engine has computed something of it
    queue_ms: float = 0.0
    mark: str | None = None
    numbers: bytes | None = None  # with its end, of an engine here
    proved: Proved | None = None
    counted: Counted | None = None

    def __post_init__(self) -> None:
        self.extras = Extras()
        self.choice_extras = self.extras if self.earlier is None else self.earlier.copy()
        self._heard = self.began  # when its last output came

    @property
    def duration_ms(self) -> int:
        return round((self._heard - self.began) * 1000)

    @property
    def prompt_tokens(self) -> int:
        return len(self.prompt or ()) if self.counted is None else self.counted.prompt

    @property
    def completion_tokens(self) -> int:
        return len(self.tokens) if self.counted is None else self.counted.completion

    def take(self, event: Prompt | Counted | Output | Proved) -> None:
        """Record the next event of the leg."""
        if isinstance(event, Output):
            self.take_output(event)
        elif isinstance(event, Proved):
            self.proved = event
        elif isinstance(event, Counted):
            self.counted, self.cached_tokens = event, event.cached
        else:
            self.prompt = event.tokens

    def take_output(self, output: Output) -> None:
        """Record what was made since the last one."""
        self._heard = time.monotonic()
        self.tokens += output.tokens
        self.text.append(output.text)
        self.shifted_tokens = output.shifted_tokens
        self.mark = output.mark
        if self.ttft_ms is None and has_content(output):
            self.ttft_ms = self.duration_ms
        if output.queue_ms is not None:
            self.begun, self.queue_ms = True, output.queue_ms
        if output.cached_tokens is not None:
            self.cached_tokens = output.cached_tokens
        if output.finish_reason is not None:
            self.finish_reason = output.finish_reason
            self.numbers = output.numbers
        if output.logprobs or output.vectors:
            self._take_extras(output)

    def _take_extras(self, event: Output) -> None:
        logprob_records = records(self.job, event.logprobs, self.logprobs)
        self.logprobs += len(event.logprobs)
        self.extras.add(logprob_records, event.vectors)
        if self.choice_extras is not self.extras:
            self.choice_extras.add(logprob_records, event.vectors)

    @property
    def tokens_per_s(self) -> float | None:
        """The speed after the first token; None if there are too few tokens to say."""
        tokens = self.completion_tokens
        if self.ttft_ms is None or tokens < 2 or self.duration_ms <= self.ttft_ms:
            return None
        return (tokens - 1) * 1000 / (self.duration_ms - self.ttft_ms)


def has_content(output: Output) -> bool:
    """Whether a token was made of which it tells; an upstream's are known by their text alone."""
    return bool(output.tokens or output.text)


@dataclass(frozen=True)
class FailedLeg:
    """A leg that ended in an error before its first output; `ended` in Unix seconds, `error` is
    its code."""

    job: Job
    node_id: str
    ended: float
    error: str


@dataclass
class ChoiceRecord:
    """One choice of a request: its job, and the legs that made it.  `lost` are the peers that were
    lost with a leg of it, `failures` the legs that have made nothing."""

    job: Job
    legs: list[LegRecord] = field(default_factory=list)
    lost: tuple[str, ...] = ()
    failures: list[FailedLeg] = field(default_factory=list)
    thinking: bool = False  # whether its prompt ends in the model's thoughts

    def begin(self, leg: LegRecord) -> None:
        """A leg that makes the rest of the choice; one before it that has read nothing is none."""
        self.legs = [*self.served, leg]

    def lost_at(self, node_id: str) -> None:
        """A leg was lost there ("": an engine here); those that were not are asked first."""
        self.lost = (*self.lost, node_id) if node_id else self.lost

    def read(self, prompt: Prompt) -> None:
        """The prompt of the latest leg.  Texts are read anew in each, and whoever was lost gave
        nothing: what it made of them is not what is paid for."""
        self.thinking = prompt.thinking
        if self.job.inputs is not None:
            for leg in self.served:
                leg.prompt = prompt.tokens

    @property
    def has_upstream_output(self) -> bool:
        """Whether an upstream has begun the answer: nobody can go on with text alone."""
        return any(leg.started.upstream is not None and any(leg.text) for leg in self.legs)

    def next_job(self) -> Job:
        """The job of the next leg: it reads and draws as the first one did."""
        job = replace(self.job, scored=self.scored, leg=len(self.served), tried=self.lost)
        if not self.served:
            return job
        first = self.served[0]
        return replace(
            job,
            output=self.tokens,
            drawn_with=first.started.sampling,
            digest=first.started.model_digest,
            exactness=first.started.exactness,
            prompt_tokens=job.prompt_tokens if job.inputs is not None else first.prompt,
            unsaid=self.unsaid,
            thinking=self.thinking or job.thinking,
        )

    @property
    def served(self) -> list[LegRecord]:
        """The legs in which a prompt was at least read: those that have a proof, or a statement."""
        return [leg for leg in self.legs if leg.prompt is not None]

    @property
    def tokens(self) -> list[int]:
        """All tokens of the output so far."""
        return [token for leg in self.legs for token in leg.tokens]

    @property
    def scored(self) -> int:
        """Tokens of its echoed prompt whose log-probabilities have come."""
        prompt = len(self.served[0].prompt or ()) if self.served else 0
        return min(prompt, sum(leg.logprobs for leg in self.served))

    @property
    def unsaid(self) -> int:
        """The last tokens of the output whose log-probabilities have not come: their text was held
        back when the leg was lost."""
        if self.job.logprobs is None:
            return 0
        sent = sum(leg.logprobs for leg in self.served) - (self.scored if self.job.echo else 0)
        return max(0, len(self.tokens) - sent)

    @property
    def text(self) -> str:
        return "".join(part for leg in self.served for part in leg.text)

    @property
    def extras(self) -> Extras:
        """Log-probabilities and vectors of all its legs."""
        return self.served[-1].choice_extras if self.served else Extras()


@dataclass
class RequestRecord:
    """Of one request, from its arrival to its receipt.

    `period`: when the period of the key's budget began (see `store.keys.charge`).
    """

    choices: list[ChoiceRecord]
    key_id: str
    prices: Prices
    period: int = 0
    cost: int = 0  # 10^-9 of the currency, once there is a receipt
    metered: bool = False  # there is one
    created: float = field(default_factory=time.time)  # Unix seconds
    began: float = field(default_factory=time.monotonic)
    queue_ms: int | None = None
    ttft_ms: int | None = None

    @property
    def job(self) -> Job:
        """The first; request id, model and tenant are the same for all."""
        return self.choices[0].job

    def take(self, output: Output) -> None:
        """Record when the first choice was begun, and when the first token came."""
        if output.queue_ms is not None and self.queue_ms is None:
            self.queue_ms = round(output.queue_ms)
        if self.ttft_ms is None and has_content(output):
            self.ttft_ms = self.elapsed_ms()

    @property
    def served(self) -> list[LegRecord]:
        """The legs that have a proof, in the order of the proofs."""
        return [leg for choice in self.choices for leg in choice.served]

    @property
    def prompts(self) -> list[LegRecord]:
        """The first leg of each prompt: choices share it, and pay for it once."""
        first: dict[int, LegRecord] = {}
        for leg in self.served:
            first.setdefault(leg.job.prompt_number, leg)
        return [first[number] for number in sorted(first)]

    @property
    def prompt_tokens(self) -> int:
        return sum(leg.prompt_tokens for leg in self.prompts)

    @property
    def cached_tokens(self) -> int:
        return sum(leg.cached_tokens for leg in self.prompts)

    @property
    def shifted_tokens(self) -> int:
        return sum(leg.shifted_tokens for leg in self.served)

    @property
    def completion_tokens(self) -> int:
        return sum(leg.completion_tokens for leg in self.served)

    def elapsed_ms(self) -> int:
        return round((time.monotonic() - self.began) * 1000)

    @property
    def tokens_per_s(self) -> float | None:
        """The speed after the first token until now, of all choices together; None if there are too
        few tokens to say."""
        tokens, seconds = self.completion_tokens, 0.0
        if self.ttft_ms is not None:
            seconds = (self.elapsed_ms() - self.ttft_ms) / 1000
        return round((tokens - 1) / seconds, 1) if tokens > 1 and seconds > 0 else None
