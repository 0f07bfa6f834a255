"""The interface between a request and whatever can serve it: an engine here, or a peer."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from pinaivu_box.config import RoutingPolicy
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
from pinaivu_box.receipts.commitment import Opening, new_nonce
from pinaivu_box.receipts.receipt import VERSION, EngineBuild, Proof, SignedProof


@dataclass(frozen=True)
class Job:
    """One answer to be made; a request has one for each of its choices.

    Fields that are not described here are those of `engine.messages.Add`.
    """

    request_id: str
    model: Model
    messages: list[dict[str, Any]]
    sampling: SamplingParams  # as the client has set it
    max_tokens: int | None
    stop: list[str]
    tenant: str
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
    suffix: str = ""
    echo: bool = False
    scored: int = 0
    unsaid: int = 0
    inputs: list[str | list[int]] | None = None  # texts whose vectors are wanted, and no answer
    dimensions: int | None = None  # of the vectors
    weight: float = 1.0
    prompt_tokens: list[int] | None = None  # if the prompt was tokenized before
    thinking: bool = False
    # Caching: `scope` says with whom prefixes are shared (see `gateway.scopes`), if `cache` is set.
    cache: bool = True
    scope: str = ""
    shared_prefixes: bool = False
    keep_alive: float | None = None  # seconds that the client wants the model to stay loaded here
    # Earlier legs: the tokens that they have made, how they drew them, with the file of which
    # digest (this leg has to draw likewise), and the nodes that were lost.
    leg: int = 0  # the number of this one
    output: list[int] = field(default_factory=list)
    drawn_with: Sampling | None = None
    digest: str | None = None
    tried: tuple[str, ...] = ()
    # Routing: the peers that may serve it (names or node ids; none: any), and the key's own policy.
    local_only: bool = False
    peers: tuple[str, ...] = ()
    routing: RoutingPolicy | None = None
    name: str = ""  # that this box gave a peer's job

    @property
    def id(self) -> str:
        """Of its sequence in an engine: its `name`, if it has one."""
        if self.name:
            return self.name
        return f"{self.request_id}.{self.choice}" if self.choice else self.request_id

    def with_prompt(self, prompt: Tokenized) -> Job:
        """The job with the tokens of its prompt."""
        return replace(self, prompt_tokens=prompt.tokens, thinking=prompt.thinking)


def committed(tools: Tools | None, constraint: Constraint | None) -> dict[str, Any]:
    """What a chat's prompt commitment covers beside messages and stop strings."""
    parts: dict[str, Any] = {}
    if tools is not None:
        parts["tools"] = tools.functions
    if constraint is not None:
        parts["constraint"] = constraint.text
    return parts


@dataclass(frozen=True)
class Started:
    """A backend has taken the job: who it is and what it will use.

    `tool_style` and `thinks` say how the model writes (see `chat_format`).  Of a peer, `nonce`
    (hex) is of its commitment to the output, and `proof` the version of its proof (see
    `receipts.receipt`).
    """

    node_id: str
    model_digest: str
    engine: EngineBuild
    sampling: Sampling
    tool_style: str
    thinks: bool
    nonce: str | None = None
    proof: int = VERSION


@dataclass(frozen=True)
class Proved:
    """A peer's proof, checked against what it sent and accepted."""

    proof: Proof
    signed: SignedProof
    opening: Opening
    acceptance: bytes


Event = Started | Prompt | Output | Proved


class Leg(Protocol):
    """One leg of a job, at one backend."""

    def events(self) -> AsyncGenerator[Event]:
        """Run the job; called once.

        Yields one Started, one Prompt, then Outputs up to one with a finish reason; a peer's Proved
        comes before that.  Raises ApiError; EngineLost means that another leg may go on.
        """
        ...

    def cancel(self) -> None:
        """Stop within a step; the last Output then says "cancelled".  It may be called at any time:
        a leg that is cancelled before anybody was asked to compute it has no events."""
        ...


class Backend(Protocol):
    def start(self, job: Job) -> Leg:
        """A leg of the job, which runs when its events are read."""
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
