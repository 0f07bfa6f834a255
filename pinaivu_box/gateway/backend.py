"""The interface between a request and whatever can serve it: an engine here, or a peer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from pinaivu_box.engine.messages import (
    Constraint,
    Output,
    Prompt,
    Sampling,
    SamplingParams,
    Tokenized,
    Tools,
)
from pinaivu_box.errors import NoNodesAvailable
from pinaivu_box.models.catalog import Model
from pinaivu_box.peering_config import RoutingPolicy
from pinaivu_box.receipts.commitment import Opening, new_nonce, prompt_text
from pinaivu_box.receipts.receipt import VERSION, EngineBuild, LegStatement, SignedProof
from pinaivu_box.tracing.context import TraceContext

_SYSTEM_ROLES = ("system", "developer")


@dataclass(frozen=True)
class Job:
    """One answer to be made; a request has one for each of its choices.

    Fields that are not described here are those of `engine.messages.Add`.  Messages with images are
    as described there.
    """

    request_id: str
    model: Model
    messages: list[dict[str, Any]]
    sampling: SamplingParams  # as the client has set it
    max_tokens: int | None
    stop: list[str]
    tenant: str
    usual_stop: bool = False  # the stop strings are the model's own: the client has set none
    choice: int = 0  # its number in the request
    prompt_number: int = 0  # choices with the same one share their prompt
    nonce: str = field(default_factory=new_nonce)  # hex, of the commitment to the prompt
    priority: int = 0
    prompt: str | list[int] | None = None
    tools: Tools | None = None
    template: dict[str, Any] = field(default_factory=dict)
    constraint: Constraint | None = None
    logprobs: int | None = None
    prediction: str = ""
    images: dict[str, bytes] = field(default_factory=dict)
    suffix: str = ""
    echo: bool = False
    scored: int = 0
    unsaid: int = 0
    inputs: list[str | list[int]] | None = None  # texts whose vectors are wanted, and no answer
    dimensions: int | None = None  # of the vectors
    weight: float = 1.0
    prompt_tokens: list[int] | None = None  # if the prompt was tokenized before
    prompt_estimate: int | None = None  # of their number, if nobody here can tokenize it
    seeded: bool = False  # the seed is the client's
    thinking: bool = False
    # Caching: `scope` says with whom prefixes are shared (see `gateway.scopes`), if `cache` is set.
    cache: bool = True
    scope: str = ""
    shared_prefixes: bool = False
    keep_alive: float | None = None  # seconds that the client wants the model to stay loaded here
    # Earlier legs: the tokens that they have made, how they drew them, with the file of which
    # digest (this leg has to draw likewise) and of which exactness, and the nodes that were lost.
    leg: int = 0  # the number of this one
    output: list[int] = field(default_factory=list)
    drawn_with: Sampling | None = None
    digest: str | None = None
    exactness: str = ""
    tried: tuple[str, ...] = ()
    # Routing: the peers that may serve it (names or node ids; none: any), and the key's own policy.
    local_only: bool = False
    peers: tuple[str, ...] = ()
    routing: RoutingPolicy | None = None
    name: str = ""  # that this box gave a peer's job
    system: str = ""  # what the model's publisher recommends where a chat has no system prompt
    # The spans of the request and of this leg, if it is traced.
    request_trace: TraceContext | None = None
    trace: TraceContext | None = None

    def as_leg(self) -> Job:
        """The job with a span of its own, if it is traced."""
        if self.request_trace is None:
            return self
        return replace(self, trace=self.request_trace.child())

    def with_usual_stop(self) -> Job:
        """The job with the model's own stop strings if the client has set none."""
        if self.stop or self.inputs is not None or not self.model.parameters.stop:
            return self
        return replace(self, stop=list(self.model.parameters.stop), usual_stop=True)

    @property
    def id(self) -> str:
        """Of its sequence in an engine: its `name`, if it has one."""
        if self.name:
            return self.name
        return f"{self.request_id}.{self.choice}" if self.choice else self.request_id

    @property
    def rendered(self) -> list[dict[str, Any]]:
        """The messages that the template gets: those of the request, which alone are committed to,
        after `system` if none of them is a system prompt."""
        if not (self.system and self.messages) or any(
            message["role"] in _SYSTEM_ROLES for message in self.messages
        ):
            return self.messages
        return [{"role": "system", "content": self.system}, *self.messages]

    @property
    def prompt_length(self) -> int:
        """Tokens of its prompt, as far as they were counted or estimated."""
        if self.prompt_tokens is not None:
            return len(self.prompt_tokens)
        return self.prompt_estimate or 0

    def with_prompt(self, prompt: Tokenized) -> Job:
        """The job with the tokens of its prompt, or the estimate of their number."""
        if prompt.count is not None:
            return replace(self, prompt_estimate=prompt.count)
        return replace(self, prompt_tokens=prompt.tokens, thinking=prompt.thinking)


def committed(tools: Tools | None, constraint: Constraint | None) -> dict[str, Any]:
    """What a chat's prompt commitment covers beside messages and stop strings."""
    parts: dict[str, Any] = {}
    if tools is not None:
        parts["tools"] = tools.functions
    if constraint is not None:
        parts["constraint"] = constraint.text
    return parts


def asked_text(job: Job) -> str:
    """What the client asked, as the prompt's commitment covers it."""
    if job.inputs is not None:
        return prompt_text([], job.stop, input=job.inputs)
    if job.prompt is None:
        return prompt_text(job.messages, job.stop, **committed(job.tools, job.constraint))
    more = {"suffix": job.suffix} if job.suffix else {}
    return prompt_text([], job.stop, prompt=[job.prompt], **more)


@dataclass(frozen=True)
class UpstreamModel:
    """A model of another server: the name of that server in the configuration, and the model's name
    there."""

    upstream: str
    model: str


@dataclass(frozen=True)
class Started:
    """A backend has taken the job: who it is and what it will use.

    `tool_style` and `thinks` say how the model writes (see `chat_format`).  Of a peer, `nonce`
    (hex) is of its commitment to the output, and `proof` the version of its proof (see
    `receipts.receipt`), which is another one if it has an `exactness` ("statistical" where nothing
    is promised).  With `upstream` no box computes the leg: tokens are not known, only their numbers
    are `Counted`, and `sent` are the parameters that were sent.
    """

    node_id: str
    model_digest: str
    engine: EngineBuild
    sampling: Sampling
    tool_style: str
    thinks: bool
    nonce: str | None = None
    proof: int = VERSION
    upstream: UpstreamModel | None = None
    sent: dict[str, Any] = field(default_factory=dict)
    exactness: str = ""


@dataclass(frozen=True)
class Counted:
    """The numbers of tokens of a leg so far: an upstream's own, or `estimated`."""

    prompt: int
    cached: int
    completion: int
    estimated: bool


@dataclass(frozen=True)
class Proved:
    """A peer's proof (or its statement about an upstream), checked against what it sent and
    accepted."""

    proof: LegStatement
    signed: SignedProof
    opening: Opening
    acceptance: bytes


Event = Started | Prompt | Counted | Output | Proved


class Leg(Protocol):
    """One leg of a job, at one backend."""

    async def run(self, take: Callable[[Event], None]) -> None:
        """Run the job; called once.

        `take` gets one Started, one Prompt, then Outputs up to one with a finish reason; a peer's
        Proved comes before that, as does what an upstream has Counted (and before Prompt, an
        estimate).  It is called where the event is found, and no task is woken for it: what it
        raises ends the leg, and is raised here.  Raises ApiError; EngineLost means that another leg
        may go on.
        """
        ...

    def cancel(self) -> None:
        """Stop within a step; the last Output then says "cancelled".  It may be called at any time:
        a leg that is cancelled before anybody was asked to compute it has no events."""
        ...


class Backend(Protocol):
    def start(self, job: Job) -> Leg:
        """A leg of the job, which does nothing until it is run."""
        ...


class Tokenizer(Protocol):
    async def tokenize(
        self,
        job: Job,
        tokens: list[int] | None = None,
        *,
        plain: bool = False,
        count: bool = False,
    ) -> tuple[Tokenized, int]:
        """The tokens of the job's prompt, or the text of `tokens` (see `engine.messages.Tokenize`),
        and the context of its model.  Raises ApiError."""
        ...


def stopped() -> NoNodesAvailable:
    """The error of a request that was cancelled before anything was computed.  If its client has
    left nobody sees it."""
    return NoNodesAvailable("The request was stopped before it had begun: send it elsewhere.")
