"""How busy this box is, model by model, and how fast it was lately: for the router and adverts."""

from __future__ import annotations

import contextlib
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from statistics import median

from pinaivu_box.gateway.placement import Placement
from pinaivu_box.gateway.records import LegRecord
from pinaivu_box.gossip.adverts import ModelLoad
from pinaivu_box.models.catalog import Model

_LATELY = 32  # legs that a median is of
_TTFT_MS, _TOKENS_PER_S = 200.0, 20.0  # until something was measured
# Of a model that no engine has yet: an engine's start, and its file read at 1 GB/s.
_STARTING_MS, _BYTES_A_MS = 1000.0, 1e6


class LoadTracker:
    """`taken` brackets every leg that an engine here serves, ours and those of peers.

    `changed` is called with each.
    """

    def __init__(self, placement: Placement) -> None:
        self.changed: Callable[[], None] = lambda: None
        self._placement = placement
        self._cpu_variant = ""
        self._legs: Counter[str] = Counter()
        self._ttft: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=_LATELY))
        self._speed: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=_LATELY))

    @property
    def idle(self) -> bool:
        return not self._legs.total()

    @contextlib.contextmanager
    def taken(self, model_id: str) -> Iterator[None]:
        self._legs[model_id] += 1
        self.changed()
        try:
            yield
        finally:
            self._legs[model_id] -= 1
            self.changed()

    def measured(self, model_id: str, leg: LegRecord) -> None:
        """A leg has ended.  What it waited in the queue says nothing about how fast we are."""
        if leg.ttft_ms is not None:
            self._ttft[model_id].append(max(0.0, leg.ttft_ms - leg.queue_ms))
        if (speed := leg.tokens_per_s) is not None:
            self._speed[model_id].append(speed)

    def ttft_ms(self, model: Model) -> float:
        """The median of lately, and about what loading takes if no engine has the model.  If that
        were thought to take long, nobody would ever send to a box that has not begun."""
        loading = _STARTING_MS + model.size / _BYTES_A_MS
        if self._placement.replicas(model.id):
            loading = 0.0
        return median(self._ttft[model.id] or [_TTFT_MS]) + loading

    def tokens_per_s(self, model_id: str) -> float:
        """Of one stream."""
        return median(self._speed[model_id] or [_TOKENS_PER_S])

    def measured_tokens_per_s(self, model_id: str) -> float | None:
        """As `tokens_per_s`; None before anything was measured."""
        return median(speeds) if (speeds := self._speed.get(model_id)) else None

    def cpu_variant(self) -> str:
        """Of ggml's library for the CPU in the engines of this box; empty if none has run yet."""
        for engine in self._placement.engines:
            self._cpu_variant = engine.ready.cpu_variant or self._cpu_variant
        return self._cpu_variant

    def places(self, model_id: str) -> int:
        """How many sequences of the model can run at a time."""
        return self._placement.places(model_id)

    def of(self, model_id: str) -> ModelLoad:
        """The load of this moment.  What cache an engine would have is not known before it runs."""
        legs, engines = self._legs[model_id], self._placement.replicas(model_id)
        places, kv_free = self.places(model_id), 2**20
        if engines:
            kv_free = max(max(0, each.ready.kv_tokens - each.load.kv_used) for each in engines)
        return ModelLoad(max(0, places - legs), kv_free, max(0, legs - places))
