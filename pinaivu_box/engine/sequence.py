"""One request's sequence inside an engine, and the states that it goes through."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from pinaivu_box.engine.detokenizer import Detokenizer
from pinaivu_box.engine.messages import Sampling


class State(enum.Enum):
    """WAITING → RUNNING → gone; RUNNING → PREEMPTED → RUNNING when the KV cache was full."""

    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"


@dataclass(eq=False)
class Sequence:
    """`tokens` is prompt then output; the first `computed` of them are in the KV cache."""

    id: str
    tenant: str
    tokens: list[int]
    prompt_length: int
    max_length: int
    sampling: Sampling
    detokenizer: Detokenizer
    arrival: int  # a counter: lower is older
    arrived_at: float  # time.monotonic()
    queue_ms: float | None = None  # waited for its first step; None until then
    state: State = State.WAITING
    sequence_id: int = -1  # in the KV cache; -1 while not running
    computed: int = 0

    @property
    def pending(self) -> int:
        """Tokens that are known but not yet in the KV cache; 1 when decoding."""
        return len(self.tokens) - self.computed
