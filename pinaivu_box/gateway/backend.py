"""The interface between a request and whatever can serve it: an engine here, or a peer."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any, Protocol

from pinaivu_box.config import RoutingPolicy
from pinaivu_box.engine.messages import Constraint, Output, Sampling, SamplingParams, Tools
from pinaivu_box.errors import NoNodesAvailable
from pinaivu_box.models.catalog import Model
from pinaivu_box.receipts.commitment import Opening, new_nonce
from pinaivu_box.receipts.receipt import VERSION, EngineBuild, Proof, SignedProof


@dataclass(frozen=True)
class Job:
    """One answer to be made; a request has one for each of its choices.

    `sampling` is what the client said of it.  `prompt_number` tells its prompt from others of
    the request, and `nonce` is of the commitment to it, in hex.  `leg` is the number of this leg,
    `output` are the tokens that earlier ones have made, `tried` the nodes that were lost, and
    `settled` is how an earlier leg drew, with the file of that `digest`: this one has to draw
    likewise.  `local_only` jobs stay on this box, others go to `peers` (names or node ids; None:
    any) at most, as `routing` says, or else the box's policy.  A peer's job has a `name` that we
    gave it.  `scope` is with whom cached prefixes are shared (see `scopes`), if `cache` is not
    False.  `keep_alive` is for how many seconds the client wants the model to stay loaded here.

    The rest is as in `engine.messages.Add`.
    """

    request_id: str
    model: Model
    messages: list[dict[str, Any]]
    sampling: SamplingParams
    max_tokens: int | None
    stop: list[str]
    tenant: str
    choice: int = 0
    prompt_number: int = 0
    priority: int = 0
    prompt: str | list[int] | None = None
    tools: Tools | None = None
    template: dict[str, Any] = field(default_factory=dict)
    constraint: Constraint | None = None
    logprobs: int | None = None
    prediction: str = ""
    cache: bool = True
    scope: str = ""
    named: bool = False
    suffix: str = ""
    echo: bool = False
    scored: int = 0
    unsaid: int = 0
    inputs: list[str | list[int]] | None = None  # texts whose vectors are wanted, no more
    dimensions: int | None = None  # of the vectors
    weight: float = 1.0
    read: list[int] | None = None
    thinking: bool = False
    nonce: str = field(default_factory=new_nonce)
    leg: int = 0
    output: list[int] = field(default_factory=list)
    tried: tuple[str, ...] = ()
    settled: Sampling | None = None
    digest: str | None = None
    local_only: bool = False
    peers: tuple[str, ...] | None = None
    routing: RoutingPolicy | None = None
    keep_alive: float | None = None
    name: str = ""

    @property
    def id(self) -> str:
        """Of its sequence in an engine: its `name`, if it has one."""
        if self.name:
            return self.name
        return f"{self.request_id}.{self.choice}" if self.choice else self.request_id


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
class Prompt:
    """The prompt was tokenized.  With `thinking` the output begins inside the model's thoughts.
    `text` is of an echo."""

    tokens: list[int]
    thinking: bool = False
    text: str = ""


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


def stopped() -> NoNodesAvailable:
    """The error of a request that was cancelled before anything was computed.  If its client has
    left nobody sees it."""
    return NoNodesAvailable("The request was stopped before it had begun: send it elsewhere.")
