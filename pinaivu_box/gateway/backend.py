"""The seam between a request and whoever can serve it: an engine here, later a peer or upstream."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from pinaivu_box.config import SamplingConfig
from pinaivu_box.engine.messages import Sampling
from pinaivu_box.models.catalog import Model
from pinaivu_box.receipts.receipt import EngineInfo


@dataclass(frozen=True)
class Job:
    """One request as a backend gets it.  `asked` is what the client said of sampling."""

    request_id: str
    model: Model
    messages: list[dict[str, Any]]
    asked: SamplingConfig
    seed: int
    max_tokens: int | None
    stop: list[str]
    tenant: str
    ignore_eos: bool = False
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: dict[str, float] = field(default_factory=dict)
    priority: int = 0


@dataclass(frozen=True)
class Started:
    """A backend has taken the job: who it is and what it will use."""

    node_id: str
    model_digest: str
    engine: EngineInfo
    sampling: Sampling


@dataclass(frozen=True)
class Prompt:
    """The prompt was tokenized."""

    tokens: list[int]


@dataclass(frozen=True)
class Output:
    """New text and tokens; the last one has a finish reason.  `queue_ms` and `cached_tokens` (of
    the prompt) come with the first.  `shifted_tokens` were forgotten so far (context shift)."""

    text: str
    tokens: list[int]
    finish_reason: str | None
    queue_ms: float | None
    cached_tokens: int | None = None
    shifted_tokens: int = 0


Event = Started | Prompt | Output


class Backend(Protocol):
    def serve(self, job: Job, made: list[int]) -> AsyncIterator[Event]:
        """Run the job, going on after the tokens `made` by earlier legs.

        Yields one Started, one Prompt, then Outputs up to one with a finish reason.  Raises
        ApiError; EngineLost means that another leg may go on.
        """
        ...

    def cancel(self, request_id: str) -> None:
        """Stop within a step; the last Output then says "cancelled"."""
        ...
